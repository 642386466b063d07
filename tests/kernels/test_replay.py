"""Multi-token verification with replay: any accepted count equals never having gone further."""

import pytest
import torch

from mambactl.kernels import reference as kernels

pytestmark = pytest.mark.one_in(3)

PREFIX, LONGEST = 37, 8


@pytest.fixture(params=["mamba2", "mamba1"])
def form(request, draw_ssd, draw_scan):
    """(inputs of a batch of 3, step with A bound, whole-sequence kernel)."""
    if request.param == "mamba2":
        inputs = draw_ssd(3, PREFIX + 3 * LONGEST)
        return inputs, kernels.bind(kernels.ssd_step, inputs.A), kernels.ssd
    inputs = draw_scan(3, PREFIX + 3 * LONGEST)
    return inputs, kernels.bind(kernels.selective_step, inputs.A), kernels.selective_scan


def pieces(inputs, drafts: int):
    """Prefix, K drafted tokens, and K + 1 tokens that come after some of them."""
    ends = (0, PREFIX, PREFIX + drafts, PREFIX + 2 * drafts + 1)
    return [inputs.tokens(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("drafts", range(1, LONGEST + 1))
def test_every_accepted_count_equals_one_pass_over_the_kept_tokens(
    form, assert_near, drafts
) -> None:
    inputs, step, whole = form
    prefix, history, new = pieces(inputs, drafts)
    _, checkpoint = whole(*prefix)
    for shift in range(drafts + 1):
        kept = (torch.arange(3) * 2 + shift) % (drafts + 1)  # every row another count
        y, state, live = kernels.multi_step(
            step, checkpoint, history.records, kept, new.records, new.C
        )
        for row, count in enumerate(kept.tolist()):
            parts = [prefix, history.tokens(0, count), new]
            x, dt, B, C = (
                torch.cat([getattr(part, name)[row : row + 1] for part in parts], 1)
                for name in ("x", "dt", "B", "C")
            )
            start = inputs.state[row : row + 1]
            outputs, final = whole(x, dt, inputs.A, B, C, start)
            length = PREFIX + count
            _, middle = whole(x[:, :length], dt[:, :length], inputs.A, B[:, :length],
                              C[:, :length], start)  # fmt: skip
            assert_near(y[row], outputs[0, length:])
            assert_near(state[row], middle[0])
            assert_near(live[row], final[0])


def test_replay_is_bitwise_the_state_that_plain_steps_reach(form) -> None:
    inputs, step, _ = form
    _, history, new = pieces(inputs, LONGEST)
    plain = [inputs.state]
    for t in range(LONGEST):
        x, dt, B = (record[:, t] for record in history.records)
        plain.append(step(plain[-1], x, dt, B, history.C[:, t])[1])
    for count in range(LONGEST + 1):
        kept = torch.full((3,), count)
        y, state, live = kernels.multi_step(
            step, inputs.state, history.records, kept, new.records, new.C
        )
        assert torch.equal(state, plain[count])
        expected = kernels.recur(step, plain[count], new.records, new.C)
        assert torch.equal(y, expected[0])
        assert torch.equal(live, expected[1])


def test_rows_keep_different_counts_bit_for_bit(form) -> None:
    inputs, step, _ = form
    _, history, new = pieces(inputs, LONGEST)
    kept, n_new = torch.tensor([0, 3, 8]), torch.tensor([9, 0, 4])
    y, state, live = kernels.multi_step(
        step, inputs.state, history.records, kept, new.records, new.C, n_new
    )
    for row in range(3):
        _, middle = kernels.recur(step, inputs.state, history.tokens(0, kept[row]).records, None)
        part = new.tokens(0, n_new[row])
        outputs, final = kernels.recur(step, middle, part.records, part.C)
        assert torch.equal(state[row], middle[row])
        assert torch.equal(live[row], final[row])
        assert torch.equal(y[row, : n_new[row]], outputs[row])


def test_a_pass_without_outputs_leaves_the_same_state(form) -> None:
    inputs, step, _ = form
    nothing, state = kernels.recur(step, inputs.state, inputs.records, None)
    assert nothing is None
    assert torch.equal(state, kernels.recur(step, inputs.state, inputs.records, inputs.C)[1])
