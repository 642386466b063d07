"""A loss that left what it had reached is told apart from noise, and totals run over phases."""

import random

import pytest
import torch

from mambactl.train.ledger import (
    FACTOR,
    PATIENCE,
    SETTLING,
    LossWatch,
    Pending,
    PhaseReport,
    Progress,
)


def _steps_until_diverged(losses) -> int | None:
    watch = LossWatch()
    for step, loss in enumerate(losses, 1):
        watch.see(step, loss)
        if watch.diverged:
            return step
    return None


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_divergence(seed) -> None:
    draw = random.Random(seed)
    losses = [0.3 * (1 + 2 * 0.99**step) * draw.lognormvariate(0, 0.5) for step in range(3000)]
    assert _steps_until_diverged(losses) is None


def test_a_destroyed_alignment_is_found_soon() -> None:
    """As seen at a too high rate: from 0.85 to 3.6 nats within a few dozen steps."""
    draw = random.Random(0)
    good = [0.85 * draw.lognormvariate(0, 0.1) for _ in range(100)]
    bad = [min(3.6, 0.85 * 1.05**step) * draw.lognormvariate(0, 0.1) for step in range(400)]
    found = _steps_until_diverged([*good, *bad])
    assert 100 + PATIENCE < found < 100 + 2 * PATIENCE + SETTLING
    assert _steps_until_diverged([*good, *bad[:30], *good]) is None


def test_one_odd_batch_and_tiny_losses_are_forgiven() -> None:
    assert _steps_until_diverged([0.2] * 50 + [20.0] + [0.2] * 200) is None
    assert _steps_until_diverged([0.001] * 50 + [0.04] * 200) is None


def test_rising_ends_when_the_loss_comes_back() -> None:
    watch = LossWatch()
    for step in range(40):
        watch.see(step, 1.0)
    assert watch.best == pytest.approx(1.0) and not watch.rising
    for step in range(40, 80):
        watch.see(step, 2 * FACTOR)
    assert watch.rising and not watch.diverged
    for step in range(80, 180):
        watch.see(step, 1.0)
    assert not watch.rising


def test_what_was_before_the_watch_settled_does_not_count() -> None:
    assert _steps_until_diverged([0.01] + [1.0] * 300) is None


def test_totals_run_over_phases_and_leave_out_what_nobody_counted() -> None:
    progress = Progress(reports=[PhaseReport("align", 3, tokens=10, seconds=1.5)])
    assert progress.sums() == {"tokens": 10, "seconds": 1.5}
    progress.reports.append(PhaseReport("logits", 4, tokens=5, seconds=0.5, flops=2e9))
    assert progress.sums() == {"tokens": 15, "seconds": 2.0, "flops": 2e9}
    assert progress.total == 7


def test_a_step_is_read_as_it_was_made() -> None:
    loss, norm = torch.tensor(0.3), torch.tensor(2.5)
    pending = Pending.of(4, 1e-3, 7, None, loss, norm)
    assert pending.read() == (pytest.approx(0.3), 2.5)
