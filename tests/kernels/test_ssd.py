"""Chunked SSD against one step at a time and against a dense quadratic formula in fp64."""

import pytest
import torch
from torch import Tensor

from mambactl.kernels import reference as kernels

pytestmark = pytest.mark.one_in(3)

LENGTHS = [1, 37, 63, 100, 129]


def dense(x, dt, A, B, C, state, seq_idx=None) -> tuple[Tensor, Tensor]:
    """Every pair of tokens at once: y_t = sum_s exp(sum_(s<r<=t) dt_r A) dt_s (C_t.B_s) x_s."""
    repeat = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)  # [B, T, H, N]
    length = x.shape[1]
    log_decay = (dt * A).permute(0, 2, 1)  # [B, H, T]
    r, s, t = torch.meshgrid(*[torch.arange(length)] * 3, indexing="ij")
    between = ((s < r) & (r <= t)).double().flatten(1)  # [T, S * T]
    decay = (log_decay @ between).exp().unflatten(-1, (length, length)).mT  # [B, H, T, S]
    start = log_decay.cumsum(-1).exp()  # [B, H, T], what is left of the initial state
    allowed = torch.ones(x.shape[0], length, length, dtype=torch.bool).tril()
    if seq_idx is not None:
        changes = torch.zeros(seq_idx.shape)
        for index in range(1, length):
            changed = seq_idx[:, index] != seq_idx[:, index - 1]
            changes[:, index] = changes[:, index - 1] + changed
        allowed = allowed & (changes[:, :, None] == changes[:, None, :])
        start = start * (changes == 0)[:, None]
    weight = decay * dt.permute(0, 2, 1)[:, :, None] * allowed[:, None]  # [B, H, T, S]
    scores = torch.einsum("bthn,bshn->bhts", C, B)
    y = torch.einsum("bhts,bshp->bthp", scores * weight, x)
    y = y + torch.einsum("bht,bthn,bhpn->bthp", start, C, state)
    final = torch.einsum("bhs,bshp,bshn->bhpn", weight[:, :, -1], x, B)
    return y, final + start[..., -1, None, None] * state


def stepwise(inputs, seq_idx=None):
    step = kernels.bind(kernels.ssd_step, inputs.A)
    return kernels.recur(step, inputs.state, inputs.records, inputs.C, seq_idx=seq_idx)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_steps_and_the_dense_formula_agree(draw_ssd, assert_near, length, groups) -> None:
    inputs = draw_ssd(2, length, groups)
    expected = dense(*inputs.double())
    for chunk in (7, 16, 64):
        for actual in (kernels.ssd(*inputs, chunk_size=chunk), stepwise(inputs)):
            assert_near(actual[0], expected[0])
            assert_near(actual[1], expected[1])


@pytest.mark.parametrize("rows", ["border", "ragged", "returning"])
@pytest.mark.parametrize("length", [64, 100])
def test_documents_of_a_packed_row_never_meet(
    draw_ssd, assert_near, packed_rows, rows, length
) -> None:
    inputs, seq_idx = draw_ssd(2, length), packed_rows[rows](length)
    expected = dense(*inputs.double(), seq_idx)
    assert not torch.allclose(expected[0], dense(*inputs.double())[0])
    for chunk in (7, 16, 64):
        chunked = kernels.ssd(*inputs, seq_idx, chunk)
        for actual in (chunked, stepwise(inputs, seq_idx)):
            assert_near(actual[0], expected[0])
            assert_near(actual[1], expected[1])


@pytest.mark.parametrize("cut", [0, 1, 20, 36])
def test_final_state_continues_the_sequence(draw_ssd, assert_near, cut) -> None:
    inputs = draw_ssd(3, 37)
    y, final = kernels.ssd(*inputs, chunk_size=16)
    first, middle = kernels.ssd(*inputs.tokens(0, cut), chunk_size=16)
    second, last = kernels.ssd(*inputs.tokens(cut, 37)._replace(state=middle), chunk_size=16)
    assert_near(torch.cat([first, second], 1), y)
    assert_near(last, final)


def test_no_initial_state_is_a_state_of_zeros(draw_ssd) -> None:
    inputs = draw_ssd(2, 20)
    zeros = kernels.ssd(*inputs[:5], torch.zeros_like(inputs.state))
    for actual, expected in zip(kernels.ssd(*inputs[:5]), zeros, strict=True):
        assert torch.equal(actual, expected)


def test_a_token_that_forgets_everything_costs_no_precision(draw_ssd, assert_near) -> None:
    inputs = draw_ssd(2, 129)
    inputs.dt[:, ::20] = 20
    y, final = kernels.ssd(*inputs)
    expected = dense(*inputs.double())
    assert_near(y, expected[0], 1e-6)
    assert_near(final, expected[1], 1e-6)


def test_half_precision_inputs_keep_an_fp32_state(draw_ssd) -> None:
    inputs = draw_ssd(2, 40)
    x, dt, A, B, C, state = (t.bfloat16() for t in inputs)
    y, final = kernels.ssd(x, dt, A, B, C, state)
    rounded = [t.float() for t in (x, dt, A, B, C, state)]
    assert y.dtype == final.dtype == torch.float32
    assert torch.equal(final, kernels.ssd(*rounded)[1])
