"""Mamba-1's scan against a dense formula in fp64."""

import pytest
import torch
from torch import Tensor

from mambactl.kernels import reference as kernels

pytestmark = pytest.mark.one_in(3)


def dense(x, dt, A, B, C, state, seq_idx=None) -> tuple[Tensor, Tensor]:
    """S_t[d, n] = sum_s exp(A[d, n] sum_(s<r<=t) dt_r[d]) dt_s[d] B_s[n] x_s[d], all t at once."""
    repeat = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)  # [B, T, Ch, N]
    length = x.shape[1]
    documents = torch.zeros(x.shape[:2]) if seq_idx is None else seq_idx
    states = []
    for t in range(length):
        total = torch.zeros_like(state)
        for s in range(t, -1, -1):
            same = (documents[:, s : t + 1] == documents[:, t : t + 1]).all(1)  # [B]
            gap = dt[:, s + 1 : t + 1].sum(1)[..., None] * A  # [B, Ch, N]
            fresh = (dt[:, s] * x[:, s])[..., None] * B[:, s]
            total = total + same[:, None, None] * gap.exp() * fresh
        same = (documents[:, : t + 1] == documents[:, t : t + 1]).all(1)
        start = (dt[:, : t + 1].sum(1)[..., None] * A).exp() * state
        states.append(total + same[:, None, None] * start)
    S = torch.stack(states, 1)  # [B, T, Ch, N]
    return (S * C).sum(-1), S[:, -1]


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("length", [1, 37, 63])
def test_scan_is_the_dense_formula(draw_scan, assert_near, length, groups) -> None:
    inputs = draw_scan(2, length, groups)
    y, final = kernels.selective_scan(*inputs)
    expected = dense(*inputs.double())
    assert_near(y, expected[0])
    assert_near(final, expected[1])


@pytest.mark.parametrize("rows", ["ragged", "returning"])
def test_documents_of_a_packed_row_never_meet(draw_scan, assert_near, packed_rows, rows) -> None:
    inputs, seq_idx = draw_scan(2, 45), packed_rows[rows](45)
    y, final = kernels.selective_scan(*inputs, seq_idx)
    expected = dense(*inputs.double(), seq_idx)
    assert not torch.allclose(expected[0], dense(*inputs.double())[0])
    assert_near(y, expected[0])
    assert_near(final, expected[1])


@pytest.mark.parametrize("cut", [0, 1, 20, 36])
def test_final_state_continues_the_sequence_bit_for_bit(draw_scan, cut) -> None:
    inputs = draw_scan(3, 37)
    y, final = kernels.selective_scan(*inputs)
    first, middle = kernels.selective_scan(*inputs.tokens(0, cut))
    second, last = kernels.selective_scan(*inputs.tokens(cut, 37)._replace(state=middle))
    assert torch.equal(torch.cat([first, second], 1), y)
    assert torch.equal(last, final)


def test_no_initial_state_is_a_state_of_zeros(draw_scan) -> None:
    inputs = draw_scan(2, 20)
    zeros = kernels.selective_scan(*inputs[:5], torch.zeros_like(inputs.state))
    for actual, expected in zip(kernels.selective_scan(*inputs[:5]), zeros, strict=True):
        assert torch.equal(actual, expected)
