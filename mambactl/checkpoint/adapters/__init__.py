"""Foreign checkpoint formats as this project's model: one small module per format."""
