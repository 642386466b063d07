"""Triton kernels over whole sequences: convolution, scans, attention, norms, gates, divergences."""
