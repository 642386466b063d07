"""Prompts from files and command lines, answered by the decode engine."""
