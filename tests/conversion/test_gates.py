"""Gates between full attention and a window, from which the KV heads that text needs are known."""

import pytest
import torch

from mambactl.conversion import gates
from mambactl.conversion.choice import UNITS
from mambactl.conversion.gates import GateTraining, gate_worth
from mambactl.conversion.ranking import Instruments
from mambactl.conversion.select import _batches
from mambactl.data.format import encode_rows
from mambactl.data.pack import pack
from mambactl.data.sources import load_rows
from mambactl.evaluation.controls import windowed_attention
from mambactl.models.key_ring import WindowSettings

WINDOW = WindowSettings(6, 2)


class NoProgress:
    def advance(self, amount: float = 1, status: str = "") -> None: ...


@pytest.fixture
def teacher(make_hybrid):
    """Two layers of two KV heads each; only attention has gates."""
    return make_hybrid(["attention", "mamba2", "attention"], seed=3).requires_grad_(False)


@pytest.fixture
def batches(tiny_tokenizer, random_texts):
    """Packed documents, so that masks know where each one begins."""
    rows = pack(encode_rows(load_rows([str(random_texts)]), tiny_tokenizer, seed=0), 48)
    return _batches(rows[:4], 2)


@torch.no_grad()
def test_open_gates_are_the_teacher_and_closed_ones_its_windows(teacher, batches) -> None:
    instruments = Instruments(teacher, batches)
    training = GateTraining(instruments, WINDOW, seed=0)
    rows = instruments.rows[0]
    assert torch.allclose(training._states(rows), rows.guide, atol=1e-5)
    training.gates[2, 1] = training.gates[0, 0] = 0
    near = training._states(rows)
    with windowed_attention(teacher, {0: (0,), 2: (1,)}, WINDOW.window, WINDOW.sinks):
        wanted = instruments.finish(rows, _run(teacher, rows))
    assert torch.allclose(near, wanted, atol=1e-5)
    assert not torch.allclose(near, rows.guide, atol=1e-3)
    # the hooks are gone
    assert torch.allclose(instruments.finish(rows, _run(teacher, rows)), rows.guide, atol=1e-6)


def _run(teacher, rows):
    hidden = rows.hidden
    for block in teacher.model.layers:
        hidden = block(hidden, rows.context, None)
    return hidden


def test_a_gate_in_front_of_nothing_closes_first(teacher, batches, monkeypatch) -> None:
    units = UNITS["head"].of(teacher.config)
    assert [unit.name for unit in units] == ["0.0", "0.1", "2.0", "2.1"]
    # what a head without values puts out is the same near and far; the others count much
    attention = teacher.model.layers[2].self_attn
    with torch.no_grad():
        attention.v_proj.weight[: teacher.config.head_dim] = 0
        attention.o_proj.weight.mul_(8)
        teacher.model.layers[0].self_attn.o_proj.weight.mul_(8)
    instruments = Instruments(teacher, batches)
    monkeypatch.setattr(gates, "TEXT_WEIGHT", 100.0)
    monkeypatch.setattr(gates, "PENALTIES", (1.0, 4.0))
    worth = gate_worth(instruments, units, WINDOW, 0, NoProgress(), 40)
    assert min(worth, key=worth.__getitem__).name == "2.0"
    assert all(0 <= value <= 1 for value in worth.values())
    again = gate_worth(instruments, units, WINDOW, 0, NoProgress(), 40)
    assert again == worth
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
