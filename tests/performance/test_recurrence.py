"""The kernel that stores a state per token agrees with the one that replays, on any walk.

In fp32 to 2e-5 of the largest output; states to the same bound.
"""

from itertools import islice

import pytest
import torch

pytest.importorskip("triton")

from mambactl.speed.shapes import SHAPES
from tests.performance import recurrence
from tests.performance.recurrence import Contest, one_layer, period, walk

# of softplus, whose other branch is taken then
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero"),
    pytest.mark.filterwarnings("ignore:invalid value"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def contest(batch: int, T: int, layers: int = 2, dtype: torch.dtype = torch.float32) -> Contest:
    held = Contest(one_layer("tiny-hybrid", DEVICE, dtype), batch, T, states=1)
    # one byte of states is one layer
    held.layers += [held._layer(held.mixer.conv.weight) for _ in range(layers - 1)]
    return held


def test_a_walk_stores_before_the_ring_is_full():
    for limit, expected in ((13, 1), (21, 3)):
        assert period(limit) == expected
        for standing in islice(walk(limit), 30):
            assert standing.base <= standing.store <= standing.start
            assert standing.start - standing.base + 3 + 5 <= limit
    first, second = islice(walk(21), 2)
    assert (first.start, first.slot) == (first.base, 0)
    # three drafts kept and the token after them
    assert (second.start - first.start, second.slot) == (4, 3)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("batch", "T", "accepted"), [(1, 3, 1), (2, 4, 3)])
def test_both_kernels_agree(batch, T, accepted):
    held = contest(batch, T)
    steps = list(islice(walk(held.limit, T, accepted), 4))
    error = held.compare([held.fused, held.snapshots], steps)
    assert error <= 2e-5
    for layer in held.layers:
        assert not layer.snapshots.isnan().any()


def test_a_replay_over_several_steps_agrees_too():
    held = contest(1, 2, layers=1)
    # stores at every third step, as a batch of many sequences does
    steps = list(islice(walk(2 * 2 + 3 + 4, 2, 1), 5))
    assert max(step.start - step.base for step in steps) > 4
    assert held.compare([held.fused, held.snapshots], steps) <= 2e-5


def test_a_difference_and_an_output_not_written_are_seen():
    held = contest(1, 2)
    standing = next(walk(held.limit, 2))
    assert held.compare([held.fused, held.snapshots], [standing]) <= 2e-5
    held.layers[1].snapshots[:, 0] += 0.5
    assert held.compare([held.fused, held.snapshots], [standing]) > 1e-3
    error = held.compare([held.fused], [standing])
    assert error != error
    # and the last step does not hide it
    steps = iter([lambda: None, held.snapshots])
    error = held.compare([held.fused, lambda: next(steps)()], [standing, standing])
    assert error != error


def test_bytes_are_those_of_states_and_windows():
    held = contest(2, 4)
    steps = list(islice(walk(held.limit, 4, 3), 2))
    # heads, state and width of the tiny hybrid, in fp32
    state, inner = 2 * 4 * 16 * 16 * 4, 4 * 16
    rows = 2 * held.mixer.sizes.conv_dim * 4
    around = 2 * 4 * inner * 4 * 2
    first, second = (held.bytes_moved(step) for step in steps)
    assert first == (state + around + rows * 4, 5 * state + around + rows * 4)
    assert second[0] == 2 * state + around + rows * (4 + 4)


def test_the_layer_is_that_of_the_shape():
    weights = one_layer("tiny-hybrid", DEVICE, torch.float32)
    sizes = SHAPES["tiny-hybrid"]().section("mamba2")
    assert weights.layers[0].mixer.sizes == sizes
    assert SHAPES[recurrence.SHAPE]().section("mamba2").d_state == 128


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_contest_at_full_size():
    row = recurrence.contest(8, DEVICE, torch.bfloat16)
    assert row["ratio"] > 1
    for way in ("fused", "snapshots"):
        rate = row[f"{way}_bytes"] / row[f"{way}_microseconds"] * 1e6
        assert row[f"{way}_bytes_per_second"] == pytest.approx(rate)
