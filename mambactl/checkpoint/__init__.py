"""Checkpoints in and out: found, read lazily, loaded strictly, written atomically."""
