"""The decode kernels in Triton; each has the signature of its reference in `kernels.window`."""
