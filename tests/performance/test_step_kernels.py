"""Charges of kernels add up to the step; scripted steps write what the script says."""

from argparse import Namespace

import pytest
import torch

from tests.performance.step_kernels import Scripted, Work, account, mean_emitted, run_steps


def test_overlapping_kernels_and_idle_time_add_up_to_the_step() -> None:
    work = [
        Work("embed", 10, 2),
        # starts before its predecessor has ended, and ends behind it
        Work("product", 11, 4),
        # within the product
        Work("norm", 12, 1),
        Work("embed", 20, 2),
        Work("product", 22, 8),
    ]
    found = account(work, 1, 1)
    assert found.step == 20
    assert (found.idle, found.gaps) == (5, 1)
    charged = {name: each.charged for name, each in found.kernels.items()}
    assert charged == {
        "draft: embed": 2,
        "draft: product": 3,
        "draft: norm": 0,
        "target: embed": 2,
        "target: product": 8,
    }
    assert found.idle + sum(charged.values()) == found.step
    halves = account(work, 1, 2)
    assert (halves.step, halves.kernels["target: product"].own) == (10, 4)
    assert {name.partition(":")[0] for name in account(work, 0, 2).kernels} == {"target"}


@pytest.mark.parametrize(("rows", "k"), [(3, 4), (2, 0)])
def test_steps_on_random_states_write_the_script(rows, k) -> None:
    given = Namespace(synthetic="tiny-hybrid", draft="tiny-draft", acceptance="0.8")
    models = Scripted(given, torch.device("cpu"), torch.float32)
    session = models.session(rows, k, context=200)
    before = session.batch.progress.clone()
    run_steps(session, k, 8)
    for row in range(rows):
        length = int(session.batch.progress[0, row])
        text = session.batch.history[row, : length + 1].tolist()
        assert length - int(before[0, row]) >= 8
        assert all(int(models.successor[a]) == b for a, b in zip(text, text[1:], strict=False))
    assert (mean_emitted(session) > 1) == (k > 0)
