"""Decoding without the host: draft, verify, accept and commit as one CUDA graph."""
