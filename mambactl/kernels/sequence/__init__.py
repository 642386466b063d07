"""Triton kernels over whole sequences: convolution, scans, attention, divergences."""
