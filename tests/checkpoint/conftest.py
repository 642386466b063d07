"""A model with every kind of mixer, and a checkpoint that a test may damage."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mixed_model(make_hybrid):
    """bf16 weights beside fp32 state space parameters, with tensors of odd sizes."""
    import torch

    mixers = ["mamba2", "attention", "mamba1", "attention"]
    return make_hybrid(mixers, vocab_size=91).to(torch.bfloat16)


@pytest.fixture
def llama(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A private copy that a test may damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "llama"))
