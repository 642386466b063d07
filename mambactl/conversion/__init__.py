"""Attention into a recurrent layer: what is replaced, initial values, closed-form fit."""
