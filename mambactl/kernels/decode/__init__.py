"""Operations of a decode step: a PyTorch reference and its Triton kernels, file by file."""
