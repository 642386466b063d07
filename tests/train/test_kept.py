"""Queries and keys of kept attention through `distill`, `sft` and `dpo`: unchanged to the bit."""

import json
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from train.abrupt_stop import abrupt_stop

from mambactl.checkpoint.load import open_checkpoint
from mambactl.checkpoint.vocabulary import model_config
from mambactl.commands import convert, distill, dpo, sft
from mambactl.models.mixers.registry import looks_up
from mambactl.options import ConvertConfig, DistillConfig, DpoConfig, SftConfig
from mambactl.train.lora import projections
from mambactl.train.phases import shapes_of

SIZES = {"device": "cpu", "max_steps": 3, "batch_size": 2, "max_length": 32, "warmup": 0}


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_llama) -> str:
    """A layer of kept heads, one of attention, one that only sees a window; biases, and norms."""
    teacher = save_llama(attention_bias=True)
    form = {"by": "head", "keep_heads": "0.1,1.0,1.1,2.0", "window": 5, "sinks": 2}
    out = tmp_path_factory.mktemp("kept") / "student"
    convert.run(ConvertConfig(device="cpu", **form), teacher, out)
    return str(out)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Text, chats and preferences."""
    draw, folder = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("data")

    def words(count: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=draw))

    def row() -> dict[str, dict]:
        asked = {"role": "user", "content": words(6)}
        good, bad = ({"role": "assistant", "content": words(4)} for _ in range(2))
        return {
            "text": {"text": words(30)},
            "chats": {"messages": [asked, good]},
            "pairs": {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        }

    rows = [row() for _ in range(20)]
    for name in rows[0]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r[name]) + "\n" for r in rows))
    return {name: str(folder / f"{name}.jsonl") for name in rows[0]}


def changed(before: str | Path, after: str | Path) -> set[str]:
    """Names of the tensors that are not the same to the bit."""
    with open_checkpoint(str(before)) as ours, open_checkpoint(str(after)) as theirs:
        return {name for name in ours.names() if not torch.equal(ours.get(name), theirs.get(name))}


def lookups(path: str) -> set[str]:
    with open_checkpoint(path) as reader:
        return {name for name in reader.names() if looks_up(name)}


def test_names_of_what_is_kept(student) -> None:
    kinds = [f"{part}_proj.{kind}" for part in "qk" for kind in ("weight", "bias")]
    kept = [("0.mamba.attention", "2.mamba.attention", "1.self_attn")]
    wanted = {f"model.layers.{place}.{kind}" for place in kept[0] for kind in kinds}
    assert lookups(student) == wanted
    assert looks_up("base.model.model.layers.1.self_attn.k_norm.weight")
    for other in ("0.mamba.window.q_proj", "0.mamba.attention.v_proj", "1.self_attn.o_proj"):
        assert not looks_up(f"model.layers.{other}.weight")


def test_distilling_leaves_them_alone(student, files, tmp_path) -> None:
    config = DistillConfig(
        **SIZES | {"max_steps": 6}, data=[files["text"]], stages=["align", "stepwise", "logits"],
        stepwise_groups=[1.0], stepwise_rest_lr=1e-2, rest_lr=1e-2, save_every=1,
    )  # fmt: skip
    planned = distill.plan(config, student)["phases"]
    parts = {"queries and keys of attention", "queries and keys of kept heads of mamba mixers"}
    for phase in planned:
        assert parts <= {part["part"] for part in phase["frozen"]}
        assert not parts & {part["part"] for part in phase["trained"]}
    whole = tmp_path / "whole"
    distill.run(config, student, whole)
    # all that may, has changed: weight decay alone would do it
    with open_checkpoint(student) as reader:
        assert changed(student, whole) == set(reader.names()) - lookups(student)

    with abrupt_stop(lambda _, entry: (entry["phase"], entry["step"]) == ("logits", 1)):
        distill.run(config, student, tmp_path / "again")
    distill.run(config, student, tmp_path / "again", resume=True)
    assert changed(whole, tmp_path / "again") == set()


@pytest.mark.parametrize(
    ("options", "freeze"),
    [({}, False), ({}, True), ({"lora": 2}, False), ({"lora": 2, "dtype": "bfloat16"}, True)],
)
def test_tuning_leaves_them_alone_if_asked(student, files, tmp_path, options, freeze) -> None:
    if options:
        pytest.importorskip("peft", reason='pip install "mambactl[lora]"')
    config = SftConfig(**SIZES, data=[files["chats"]], lr=1e-2, freeze_kept=freeze, **options)
    sft.run(config, student, tmp_path / "out")
    after, kept = changed(student, tmp_path / "out"), lookups(student)
    assert bool(after & kept) == (not freeze)
    assert "model.layers.0.mamba.attention.v_proj.weight" in after
    if options:
        assert after <= {f"{part}.weight" for part in projections(shapes_of(model_config(student)))}
    planned = sft.plan(config, student)
    assert ("frozen" in planned) == freeze
    if "trained_parameters" in planned:
        whole = sft.plan(config.model_copy(update={"freeze_kept": False}), student)
        assert (planned["trained_parameters"] < whole["trained_parameters"]) == freeze


@pytest.mark.parametrize("freeze", [False, True])
def test_preferences_leave_them_alone_if_asked(student, files, tmp_path, freeze) -> None:
    config = DpoConfig(**SIZES, data=[files["pairs"]], lr=1e-2, freeze_kept=freeze)
    dpo.run(config, student, tmp_path / "out")
    assert bool(changed(student, tmp_path / "out") & lookups(student)) == (not freeze)
