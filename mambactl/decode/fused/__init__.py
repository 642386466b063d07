"""Decoding without the host: draft, verify, accept and commit as one captured sequence of kernels."""
