"""A tiny teacher, a student that shares everything but mixers, and random packed rows."""

import numpy as np
import pytest

from mambactl.data.format import Example
from mambactl.data.pack import pack


@pytest.fixture
def pair(make_hybrid):
    """(student, teacher): the student's layers 0 and 2 are mamba2 and mamba1."""
    teacher = make_hybrid(["attention"] * 4, seed=1).requires_grad_(False)
    student = make_hybrid(["mamba2", "attention", "mamba1", "attention"], seed=2)
    shared = {k: v for k, v in teacher.state_dict().items() if k in student.state_dict()}
    student.load_state_dict(shared, strict=False)
    return student, teacher


@pytest.fixture
def rows():
    """Twelve or so packed rows of 32 tokens."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 30, 24)
    examples = [
        Example(draw.integers(3, 97, n).astype(np.int32), np.ones(n, bool)) for n in lengths
    ]
    return pack(examples, 32)
