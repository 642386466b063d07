"""Conversion of attention into recurrent layers: choice, initial values, closed-form fit."""
