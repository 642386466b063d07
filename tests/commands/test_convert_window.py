"""`convert --window`: the student starts as the teacher under that window and learns the rest."""

import json
from pathlib import Path

import pytest
import torch
from conftest import WORDS, tiny_config

from mambactl.checkpoint.card import model_card
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_model, open_checkpoint
from mambactl.commands.convert import plan, run
from mambactl.data.pack import Batch
from mambactl.errors import UsageError
from mambactl.evaluation.controls import windowed_attention
from mambactl.models.key_ring import WindowSettings
from mambactl.options import ConvertConfig
from mambactl.train.optimization import AlignmentObjective, mixer_parameters
from mambactl.train.phases import PhasePlan, shapes_of

WINDOW, SINKS, LENGTH = 5, 2, 64


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["plain", "biases"],
)
def llama(request, save_llama) -> str:
    """A folder with a Llama of four layers and two KV heads in bf16."""
    return save_llama(torch.bfloat16, attention_bias=request.param)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def windowed(**fields) -> ConvertConfig:
    return ConvertConfig(**{"by": "layer", "window": WINDOW, "sinks": SINKS} | fields)


@torch.no_grad()
def logits(path: str | Path, ids: torch.Tensor, control: bool = False) -> torch.Tensor:
    """Logits of a checkpoint in fp32, or of a source under a window in layers 0 and 2."""
    model = load_model(str(path), dtype=torch.float32)
    packed = {"seq_idx": (torch.arange(LENGTH) >= 23).long().expand(len(ids), -1)}
    if not control:
        return model(ids, use_cache=False, **packed).logits
    with windowed_attention(model, [0, 2], WINDOW, SINKS):
        return model(ids, use_cache=False, **packed).logits


@pytest.mark.parametrize("out", ["t", "t.st"])
def test_the_student_is_the_control(llama, ids, out, tmp_path) -> None:
    run(windowed(), llama, tmp_path / out)
    found, wanted = logits(tmp_path / out, ids), logits(llama, ids, control=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float((found - logits(llama, ids)).abs().max()) > 0.1
    with open_checkpoint(llama) as source, open_checkpoint(str(tmp_path / out)) as made:
        for name in source.names():
            other = name.replace("self_attn.", "mamba.window.")
            same = name if name in made.names() else other
            assert torch.equal(source.get(name), made.get(same)), name


def test_the_recurrence_learns(llama, ids, tmp_path) -> None:
    """At first only out_proj stands in the way; after one step of it the whole recurrence learns.

    The window is given: what it leaves of the attention's output is what the recurrence aligns to.
    """
    run(windowed(), llama, tmp_path / "t.st")
    student = load_model(str(tmp_path / "t.st"), dtype=torch.float32)
    teacher = load_model(llama, dtype=torch.float32).requires_grad_(False)
    layers = student.config.replaced_layers
    mixers = mixer_parameters(student)
    assert mixers and not any("window" in name for name in mixers)
    objective = AlignmentObjective(student, teacher)
    batch = _batch(ids)
    optimizer = torch.optim.SGD(mixers.values(), lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(float(objective.backward(batch, objective.count(batch))) / len(layers))
        optimizer.step()
        still = {name for name, p in mixers.items() if not p.grad.abs().max() > 0}
        if len(losses) == 1:
            assert any("in_proj" in name for name in still)
            assert not any("out_proj" in name for name in still)
    assert not still
    assert losses[-1] < losses[0]


def _batch(ids: torch.Tensor) -> Batch:
    everything = torch.ones_like(ids, dtype=torch.bool)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, None, places, everything, everything)


def sentences(seed: int, count: int) -> list[str]:
    """Words in which one decides which few can follow."""
    draw, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        word, words = 0, []
        for step in torch.randint(4, (60,), generator=draw).tolist():
            word = (3 * word + step) % len(WORDS)
            words.append(WORDS[word])
        found.append(" ".join(words))
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "fit.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in sentences(0, 80)))
    return str(path)


def test_the_fit_brings_what_lies_beyond_the_window(llama, text, tiny_tokenizer, tmp_path) -> None:
    """Nearer to the attention than the window alone, on text the fit did not see."""
    unseen = tiny_tokenizer(sentences(1, 8), return_tensors="pt")["input_ids"]
    one = {"keep_attention": [0, 1, 3]}
    run(windowed(**one), llama, tmp_path / "start.st")
    fit = windowed(calibrate=[text], max_length=LENGTH, **one)
    result = run(fit, llama, tmp_path / "fit.st")
    assert result.metrics["calibration_error"] < 1
    assert result.metrics["window"] == {"window": WINDOW, "sinks": SINKS}
    teacher = load_model(llama, dtype=torch.float32).requires_grad_(False)
    batch, errors = _batch(unseen[:, :LENGTH]), {}
    for name in ("fit", "start"):
        student = load_model(str(tmp_path / f"{name}.st"), dtype=torch.float32)
        errors[name] = float(AlignmentObjective(student, teacher).backward(batch, 1))
    assert 0 < errors["fit"] < 0.95 * errors["start"], errors
    with open_checkpoint(llama) as source, open_checkpoint(str(tmp_path / "fit.st")) as made:
        name = "model.layers.2.{}.q_proj.weight"
        assert torch.equal(
            source.get(name.format("self_attn")), made.get(name.format("mamba.window"))
        )


def test_mixers_can_be_taken_with_their_window(llama, ids, tmp_path) -> None:
    aligned, taken = str(tmp_path / "all.st"), tmp_path / "half.st"
    run(windowed(ratio=1), llama, tmp_path / "all.st")
    run(windowed(mixers_from=aligned), llama, taken)
    torch.testing.assert_close(
        logits(taken, ids), logits(llama, ids, control=True), rtol=1e-5, atol=1e-5
    )
    # its form need not be given
    run(ConvertConfig(by="layer", mixers_from=aligned), llama, tmp_path / "again.st")
    assert torch.equal(logits(tmp_path / "again.st", ids), logits(taken, ids))
    with pytest.raises(UsageError) as raised:
        run(windowed(window=6, mixers_from=aligned), llama, tmp_path / "no.st")
    assert f"--window {WINDOW} --sinks {SINKS}" in raised.value.hint
    run(ConvertConfig(form="portable", ratio=1), llama, tmp_path / "plain.st")
    with pytest.raises(UsageError, match="no mamba2_window mixer"):
        run(windowed(mixers_from=str(tmp_path / "plain.st")), llama, tmp_path / "no.st")
    assert not (tmp_path / "no.st").exists()


def test_layers_of_a_hybrid_share_one_window(llama, tmp_path) -> None:
    run(windowed(keep_attention=[1, 2, 3]), llama, tmp_path / "one.st")
    with pytest.raises(UsageError, match=f"windows of {WINDOW} tokens and {SINKS} sinks"):
        run(windowed(window=6), str(tmp_path / "one.st"), tmp_path / "no.st")
    result = run(windowed(ratio=1), str(tmp_path / "one.st"), tmp_path / "all.st")
    assert result.metrics["replaced_layers"] == [1, 2, 3]


@pytest.mark.parametrize("rest", [0.0, 1e-4])
def test_a_window_trains_as_the_rest_does(rest) -> None:
    """It is the teacher's: the rate of new mixers would undo it, and aligning leaves it alone."""
    config = tiny_config(["mamba2_window", "mamba2_window"])
    model = shapes_of(config)
    for plan_ in (
        PhasePlan("align", "align", 1, (0, 1), 2e-3, 0.0),
        PhasePlan("logits", "logits", 1, (0, 1), 3e-4, rest),
        PhasePlan("stepwise-1", "stepwise", 1, (0,), 3e-4, rest, (1,)),
    ):
        rates = {n: rate for members, rate in plan_.parameters(model) for n in members}
        for index in (0, 1):
            mixer = f"model.layers.{index}.mamba"
            trains = index in plan_.layers
            assert rates.get(f"{mixer}.in_proj.weight") == (plan_.mixer_rate if trains else None)
            wanted = plan_.rest_rate if trains and plan_.rest_rate else None
            assert rates.get(f"{mixer}.window.q_proj.weight") == wanted
        parts = plan_.describe(model, 1)["trained" if rates and wanted else "frozen"]
        assert any(part["part"] == "windows of mamba mixers" for part in parts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "mamba1"}, "--window does not go with --mixer mamba1"),
        ({"init": "reference"}, "--init reference"),
    ],
)
def test_what_a_window_does_not_go_with(llama, fields, message, tmp_path) -> None:
    with pytest.raises(UsageError, match="--sinks belong to a window"):
        run(ConvertConfig(by="layer", sinks=2), llama, tmp_path / "t.st")
    with pytest.raises(UsageError, match=message):
        run(windowed(**fields), llama, tmp_path / "t.st")
    assert not any(tmp_path.iterdir())


def test_sizes_are_known_before_and_after(llama, tmp_path) -> None:
    """A ring of W + S keys and values in each of two layers; nothing more per token."""
    planned = json.loads(json.dumps(plan(windowed(), llama)))
    run(windowed(), llama, tmp_path / "t.st")
    found = describe(str(tmp_path / "t.st"))
    assert found["cache"] == planned["cache"]
    assert found["cache"]["window_bytes"] == 2 * 2 * 2 * (WINDOW + SINKS) * 16 * 2
    assert found["cache"]["bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert planned["window"] == {"window": WINDOW, "sinks": SINKS}
    model = load_model(str(tmp_path / "t.st"))
    assert model.config.section("mamba2_window") == WindowSettings(WINDOW, SINKS)
    card = model_card(found["lineage"], model.config)
    assert f"the last {WINDOW} tokens and the first {SINKS}" in card
