"""A model with every kind of mixer."""

import pytest


@pytest.fixture(scope="session")
def mixed_model(make_hybrid):
    """bf16 weights beside fp32 state space parameters, with tensors of odd sizes."""
    import torch

    mixers = ["mamba2", "attention", "mamba1", "attention"]
    return make_hybrid(mixers, vocab_size=91).to(torch.bfloat16)
