"""Checkpoints for other programs: a module for each form, and the parts they share."""
