"""Timed training steps: the batch, the checks that go with the time, and the whole command."""

import json

import pytest
import torch

from mambactl.errors import CheckError, UsageError
from mambactl.kernels import dispatch
from mambactl.kernels.reference import document_numbers
from mambactl.speed.training_speed import (
    Step,
    gradient_error,
    random_batch,
    require_gradients,
    training_speed,
)

CPU = torch.device("cpu")


def test_random_rows_are_packed_documents():
    batch = random_batch(97, 3, 200, seed=0)
    assert batch.input_ids.shape == (3, 200) and int(batch.input_ids.max()) < 97
    assert torch.equal(document_numbers(batch.seq_idx), batch.seq_idx.long())
    begins = batch.position_ids == 0
    assert torch.equal(begins[:, 1:], batch.seq_idx[:, 1:] != batch.seq_idx[:, :-1])
    assert torch.equal(batch.loss_mask, ~begins) and batch.valid.all()
    assert begins.sum() > 6
    assert not torch.equal(batch.input_ids, random_batch(97, 3, 200, seed=1).input_ids)


def a_step(losses, parameters=()):
    values = iter(losses)
    return Step(
        "align", lambda batch: 1, lambda batch, tokens: torch.tensor(next(values)), lambda: None,
        list(parameters),
    )  # fmt: skip


def test_speed_counts_every_token_and_keeps_the_losses():
    batch = random_batch(97, 2, 16, seed=0)
    point = training_speed(a_step([3.0, 2.0, 1.0]), batch, CPU, warmup=1, iters=2)
    assert (point["first_loss"], point["last_loss"]) == (3.0, 1.0)
    assert point["tokens_per_second"] * point["milliseconds"] == pytest.approx(32 * 1e3)
    assert point["peak_bytes"] > 0


def test_a_loss_that_rises_is_kept():
    point = training_speed(a_step([1.0, 2.0]), random_batch(97, 1, 8, seed=0), CPU, 1, 1)
    assert (point["first_loss"], point["last_loss"]) == (1.0, 2.0)


@pytest.mark.parametrize("losses", [[1.0, 1.0], [1.0, float("nan")]])
def test_a_loss_that_does_not_move_is_an_error(losses):
    with pytest.raises(CheckError, match="the loss of align went from 1"):
        training_speed(a_step(losses), random_batch(97, 1, 8, seed=0), CPU, 1, 1)


def test_gradients_are_compared_with_the_references(monkeypatch):
    weight, batch = torch.nn.Parameter(torch.ones(2)), random_batch(97, 1, 8, seed=0)

    def backward(batch, tokens):
        live = dispatch.triton_missing(CPU) is None
        weight.grad = torch.tensor([3.0, 4.0]) * (1.01 if live else 1)
        return weight.sum().detach()

    step = Step("align", lambda batch: 1, backward, lambda: None, [weight])
    assert gradient_error(step, batch, CPU) is None
    monkeypatch.setattr(dispatch, "_no_cuda", lambda device: None)
    monkeypatch.setattr(dispatch, "_no_triton", lambda: None)
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    assert gradient_error(step, batch, CPU) == pytest.approx(0.01, rel=1e-4)
    assert dispatch.triton_missing(CPU) is None and weight.grad is None


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_gradients_that_are_off_are_an_error(error):
    require_gradients("align", torch.float32, None)
    require_gradients("align", torch.bfloat16, 0.01)
    with pytest.raises(CheckError, match="gradients of align are"):
        require_gradients("align", torch.bfloat16, error)


def tiny(**fields):
    from mambactl.options import BenchConfig

    small = {"input_len": [20], "batch_size": [1], "warmup": 1, "iters": 1, "compile": False}
    return BenchConfig(**{"device": "cpu", "training": True, **small, **fields})


def test_both_stages_of_a_tiny_hybrid(capsys):
    from mambactl.commands import bench

    result = bench.run(tiny(synthetic=["tiny-hybrid"]), None)
    points = result.metrics["points"]
    assert [point["stage"] for point in points] == ["align", "logits"]
    for point in points:
        assert point["last_loss"] < point["first_loss"] and point["tokens_per_second"] > 0
        assert (point["kernels"], point["compiled"]) == ("reference", False)
        assert point["gradient_error"] is None
    assert "align" in result.text and "training tiny-hybrid on cpu" in capsys.readouterr().err
    json.dumps(result.metrics)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_kernels_pass_the_check_that_goes_with_the_time(monkeypatch, dtype):
    from mambactl.speed import training_bench

    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_no_cuda", lambda device: None)
    monkeypatch.setattr(dispatch, "_no_triton", lambda: None)
    pair = training_bench._synthetic(tiny(), "tiny-hybrid", CPU, dtype)
    batch = random_batch(512, 1, 20, seed=0)
    # the stream is not drowned by what random blocks add to it
    embedding = pair[0].get_input_embeddings().weight
    assert float(embedding.float().square().mean().sqrt()) == pytest.approx(1, rel=0.05)
    assert torch.equal(embedding.float(), pair[1].get_input_embeddings().weight.float())
    for checked in (None, training_bench._shallowest(pair[0])):
        error = training_bench._error(tiny(), "align", pair, batch, CPU, dtype, checked)
        assert 0 < error < 0.05


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"synthetic": ["tiny"]}, "tiny is no hybrid"),
        ({"synthetic": ["tiny-mamba2"]}, "tiny-mamba2 is no hybrid"),
        ({"synthetic": ["tiny-hybrid"], "baseline": "m"}, "its own teacher, not m"),
        ({"synthetic": ["tiny-hybrid"], "draft": "ngram"}, "--training goes without"),
        ({"synthetic": ["tiny-hybrid"], "dtype": "float16"}, "underflow"),
    ],
)
def test_what_cannot_be_timed_is_refused(fields, message):
    from mambactl.commands import bench

    with pytest.raises(UsageError, match=message):
        bench.run(tiny(**fields), None)
