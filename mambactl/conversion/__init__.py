"""Attention into a recurrent layer: which layers, initial values, closed-form fit, replacement."""
