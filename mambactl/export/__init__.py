"""Checkpoints for other programs: a file for each form, and what is common to all of them."""
