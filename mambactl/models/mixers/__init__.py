"""Token mixers of a layer: attention, Mamba-2 or Mamba-1, all called the same way."""
