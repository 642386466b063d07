"""Recurrent maths: tensors in, tensors out. `reference` is plain PyTorch and defines correct."""
