"""Decode kernels in Triton; each has the signature of its twin in `kernels.decode.reference`."""
