"""Rows of different lengths in one call: padding never reaches a state or a real token."""

import pytest
import torch

from mambactl.kernels import reference as kernels

pytestmark = pytest.mark.one_in(3)

LENGTH = 37
N_NEW = torch.tensor([LENGTH, 0, 20])


@pytest.fixture(params=["mamba2", "mamba1"])
def poisoned(request, draw_ssd, draw_scan):
    """(inputs whose padding is NaN, one-step kernel, whole-sequence kernel)."""
    draw, step, whole = {
        "mamba2": (draw_ssd, kernels.ssd_step, kernels.ssd),
        "mamba1": (draw_scan, kernels.selective_step, kernels.selective_scan),
    }[request.param]
    inputs = draw(3, LENGTH)
    for t in (*inputs.records, inputs.C):
        for row, count in enumerate(N_NEW.tolist()):
            t[row, count:] = float("nan")
    return inputs, kernels.bind(step, inputs.A), whole


def expected(inputs, whole, row: int):
    """The real tokens of one row on their own."""
    part = inputs.tokens(0, int(N_NEW[row]))
    x, dt, B, C, state = (t[row : row + 1] for t in (*part.records, part.C, part.state))
    return whole(x, dt, inputs.A, B, C, state)


def test_chunks_stop_at_the_end_of_each_row(poisoned, assert_near) -> None:
    inputs, _, whole = poisoned
    x, dt, B = kernels.mask_records(inputs.records, N_NEW)
    y, state = whole(x, dt, inputs.A, B, inputs.C, inputs.state)
    for row, count in enumerate(N_NEW.tolist()):
        outputs, final = expected(inputs, whole, row)
        assert_near(state[row], final[0])
        if count:
            assert_near(y[row, :count], outputs[0])
    assert torch.equal(state[1], inputs.state[1])


def test_steps_stop_at_the_end_of_each_row(poisoned, assert_near) -> None:
    inputs, step, whole = poisoned
    y, state = kernels.recur(step, inputs.state, inputs.records, inputs.C, N_NEW)
    for row, count in enumerate(N_NEW.tolist()):
        outputs, final = expected(inputs, whole, row)
        assert_near(state[row], final[0])
        if count:
            assert_near(y[row, :count], outputs[0])
    assert torch.equal(state[1], inputs.state[1])


def test_replay_reads_no_record_beyond_the_kept_ones(poisoned) -> None:
    inputs, step, _ = poisoned
    new = inputs.tokens(0, 1)._replace(state=inputs.state)
    clean = [t.nan_to_num(0.5) for t in (*new.records, new.C)]
    y, kept, live = kernels.multi_step(
        step, inputs.state, inputs.records, N_NEW, tuple(clean[:3]), clean[3]
    )
    assert all(t.isfinite().all() for t in (y, kept, live))


def test_rows_of_full_length_pass_unchanged(draw_ssd) -> None:
    records = draw_ssd(2, 5).records
    for actual, same in zip(kernels.mask_records(records, None), records, strict=True):
        assert torch.equal(actual, same)
    masked = kernels.mask_records(records, torch.tensor([5, 3]))
    for actual, same in zip(masked, records, strict=True):
        assert torch.equal(actual[0], same[0])
        assert torch.equal(actual[1, :3], same[1, :3])
        assert (actual[1, 3:] == 0).all()
