"""Reference of one decode pass in plain PyTorch: the definition of correct for the GPU kernels.

A segment is the T tokens that a pass adds to each of B sequences; rows are M = B * T, b-major.
"""
