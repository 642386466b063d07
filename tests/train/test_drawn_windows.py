"""Windows of a size per step: drawn alike after a stop, in training only, and replayed by size."""

import json

import pytest
import torch
from train.abrupt_stop import abrupt_stop
from train.test_captured import Recorder

from mambactl.checkpoint.load import load_model
from mambactl.commands import convert, distill
from mambactl.errors import UsageError
from mambactl.kernels.local_attention import LocalSpan
from mambactl.models.mixers.windowed import WindowAttention
from mambactl.options import ConvertConfig, DistillConfig
from mambactl.options.fields import validated
from mambactl.train import loop
from mambactl.train.drawn_windows import DrawnWindows, with_window

SIZES = [3, 20]


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_llama_dir) -> str:
    out = tmp_path_factory.mktemp("w") / "student"
    form = {"by": "head", "keep_heads": "1.0,2.0,2.1", "window": 9, "sinks": 1}
    convert.run(ConvertConfig(device="cpu", **form), str(tiny_llama_dir), out)
    return str(out)


def options(data, **fields) -> DistillConfig:
    usual = {
        "device": "cpu", "data": [str(data)], "max_steps": 16, "align_steps": 8, "batch_size": 2,
        "max_length": 48, "save_every": 3, "warmup": 0, "random_window": SIZES,
    }  # fmt: skip
    return DistillConfig(**usual | fields)


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """The size of every window that a layer looked through in training, and measured 0."""
    found = []
    features = WindowAttention.features

    def watched(self, hidden, context, cache=None):
        # the keys of all layers are made once, for this very size
        assert self.span in context.local
        found.append(self.span.window if self.training else 0)
        return features(self, hidden, context, cache)

    monkeypatch.setattr(WindowAttention, "features", watched)
    return found


def test_a_model_looks_through_the_size_that_is_drawn(student) -> None:
    model, ids = load_model(student), torch.arange(3, 51)[None]
    windows = DrawnWindows(model, SIZES, 0)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for size in SIZES:
            with windows.of(size):
                found = model(ids, use_cache=False).logits
                assert {part.span for part in windows.windows} == {LocalSpan(size, 1, 2)}
            config = with_window(model.config, size)
            other = type(model)(config).eval()
            other.load_state_dict(model.state_dict())
            assert torch.equal(found, other(ids, use_cache=False).logits)
            assert not torch.equal(found, before)
        assert torch.equal(model(ids, use_cache=False).logits, before)
    draws = [windows.draw("logits", step) for step in range(60)]
    assert {*draws} == {*SIZES} and 15 < draws.count(3) < 45
    assert draws != [windows.draw("align", step) for step in range(60)]
    assert draws != [DrawnWindows(model, SIZES, 1).draw("logits", step) for step in range(60)]


def test_every_step_draws_and_a_resumed_run_draws_the_same(
    student, random_texts, tmp_path, seen
) -> None:
    config = options(random_texts, eval_recall=[64], eval_recall_rows=2, eval_every=4)
    distill.run(config, student, tmp_path / "whole")
    assert set(seen) == {0, *SIZES}
    with abrupt_stop(lambda _, entry: (entry["phase"], entry["step"]) == ("logits", 5)):
        distill.run(config, student, tmp_path / "again")
    distill.run(config, student, tmp_path / "again", resume=True)
    ours, theirs = (load_model(str(tmp_path / name)) for name in ("again", "whole"))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    # what is saved has the window that was converted
    assert theirs.config.mamba2_window == load_model(student).config.mamba2_window
    lines = [json.loads(x) for x in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["flops"] > 0


def test_each_size_is_recorded_by_itself(student, random_texts, tmp_path, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(loop, "recorder_for", lambda _: made.append(Recorder()) or made[-1])
    config = options(random_texts, max_steps=24, align_steps=0, packing=False)
    distill.run(config.model_copy(update={"capture": True}), student, tmp_path / "replayed")
    (recorder,) = made
    assert recorder.log["records"] == recorder.log["resets"] == len(SIZES)
    assert recorder.log["replays"] > 8
    distill.run(config, student, tmp_path / "eager")
    ours, theirs = (load_model(str(tmp_path / name)) for name in ("replayed", "eager"))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_what_has_no_window_is_told(save_student, random_texts, tmp_path) -> None:
    plain = save_student(tmp_path / "plain")
    with pytest.raises(UsageError, match="this model has none") as caught:
        distill.run(options(random_texts), str(plain), tmp_path / "out")
    assert "--window" in caught.value.hint
    for wrong in ([0], [-3], list(range(1, 11))):
        with pytest.raises(UsageError, match="random-window"):
            validated("distill", DistillConfig, {"random_window": wrong})
