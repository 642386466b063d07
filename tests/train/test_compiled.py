"""Blocks compiled by region: the same numbers, and one compilation per kind of block.

`aot_eager` traces forward and backward as a compiler would and runs the same operations.
"""

import pytest
import torch
from conftest import tiny_config
from torch._dynamo.testing import CompileCounterWithBackend

from mambactl.data.pack import collate
from mambactl.kernels import dispatch, mamba_ssm_calls
from mambactl.models.key_ring import WindowSettings
from mambactl.models.mixers.mamba2 import mamba2_from_attention
from mambactl.models.transformers_names import recompute_activations
from mambactl.train.compiled import compile_blocks, compiled, compiles, release_blocks
from mambactl.train.optimization import AlignmentObjective, LogitsObjective

MIXERS = ["mamba2", "attention"]
WINDOWED = ["mamba2_window", "attention"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def triton_everywhere(monkeypatch):
    """Kernels run in the interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_no_cuda", lambda device: None)
    monkeypatch.setattr(dispatch, "_no_triton", lambda: None)
    monkeypatch.setattr(mamba_ssm_calls, "loaded", dict)


def models(make_hybrid, layers, amp, mixers=MIXERS, rotary=False):
    span = WindowSettings(window=5, sinks=2)
    states = mamba2_from_attention(tiny_config(["attention"]), proj_bias=True, rotary=rotary)
    student = make_hybrid(mixers * layers, seed=2, mamba2=states, mamba2_window=span).train()
    teacher = make_hybrid(["attention"] * 2 * layers, seed=1).requires_grad_(False)
    return student, teacher.to(amp or torch.float32)


def gradients(objective, student, batch):
    student.zero_grad()
    loss = objective.backward(batch, objective.count(batch))
    return [loss, *(p.grad.clone() for p in student.parameters() if p.grad is not None)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("mixers", "rotary"), [(MIXERS, False), (WINDOWED, False), (MIXERS, True)])
@pytest.mark.parametrize("stage", ["align", "logits"])
def test_one_compilation_per_kind_of_block(make_hybrid, rows, stage, mixers, rotary):
    student, teacher = models(make_hybrid, 3, None, mixers, rotary)
    kind = AlignmentObjective if stage == "align" else LogitsObjective
    objective = kind(student, teacher)
    batches = [collate(rows[start : start + 2]) for start in (0, 2, 4)]
    assert len({batch.input_ids.shape for batch in batches}) == 1
    expected = [gradients(objective, student, batch) for batch in batches]

    counter = CompileCounterWithBackend("aot_eager")
    for model in (student, teacher):
        compile_blocks(model, backend=counter)
    if stage == "align":
        objective._error = compiled(objective._error, backend=counter)
    for batch, wanted in zip(batches, expected, strict=True):
        found = gradients(objective, student, batch)
        # align: an observed block, a block that stays as it is, a mixer;
        # logits: attention of either model, the student's mamba
        assert counter.frame_count == 3
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_kernels_and_mixed_precision_pass_a_compiler_whole(make_hybrid, rows, triton_everywhere):
    student, teacher = models(make_hybrid, 1, torch.bfloat16)
    objective = LogitsObjective(student, teacher, amp=torch.bfloat16)
    batch = collate(rows[:1])
    assert batch.seq_idx is not None
    expected = gradients(objective, student, batch)
    for model in (student, teacher):
        compile_blocks(model, backend="aot_eager")
    for ours, theirs in zip(gradients(objective, student, batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))


def test_checkpoints_of_activations_stay_around_compiled_blocks(make_hybrid, rows):
    student, teacher = models(make_hybrid, 1, None)
    objective, batch = LogitsObjective(student, teacher), collate(rows[:1])
    expected = gradients(objective, student, batch)
    recompute_activations(student)
    compile_blocks(student, backend="aot_eager")
    for ours, theirs in zip(gradients(objective, student, batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_releasing_restores_the_blocks(make_hybrid):
    model = make_hybrid(MIXERS)
    before = set(vars(model.model.layers[0]))
    compile_blocks(model, backend="aot_eager")
    assert set(vars(model.model.layers[0])) - before == {"run", "observe"}
    release_blocks(model)
    assert set(vars(model.model.layers[0])) == before


def test_auto_compiles_where_kernels_can_be_built(monkeypatch):
    cpu = torch.device("cpu")
    assert [compiles(setting, cpu) for setting in (True, False, "auto")] == [True, False, False]
    monkeypatch.setattr("mambactl.train.compiled.triton_missing", lambda device: None)
    assert compiles("auto", cpu)
