"""What a model is worth: fidelity to a teacher, task scores, speed and memory."""
