"""Evaluation of a model: fidelity to a teacher, recall, and task scores."""
