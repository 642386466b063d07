"""mambactl: turn a Llama-family checkpoint into a hybrid Mamba model, and decode it fast."""

__version__ = "0.1.0"
