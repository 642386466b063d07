"""Checkpoints read without the classes of their family are described as by these classes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from checkpoint.faults import set_fields

from mambactl.checkpoint import adapted, contents
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import FORMATS, adapt
from mambactl.checkpoint.opening import open_checkpoint
from mambactl.checkpoint.plain_config import PLAIN, SECTIONS, UNUSUAL, PlainFields, plain_layout
from mambactl.checkpoint.save import save_model
from mambactl.errors import ModelError
from mambactl.models.mixers.registry import MIXERS
from mambactl.models.mixers.settings import WindowSettings
from mambactl.models.mixers.sizes import SIZES
from mambactl.models.session_size import SessionSize

CONFIG = "config.json"
MIXED = ("mamba2", "attention", "mamba1", "mamba2_window", "mamba2_mixed")
# of families whose angles and sizes differ, as their files have them
FAMILIES = {
    "llama": {},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "rope_parameters": ...,
    },
    "linear": {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 500000.0}},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "head_dim": ...},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "unnamed": {"architectures": ...},
    "int theta": {"rope_parameters": ..., "rope_theta": 10000},
    "head sizes": {"head_dim": ...},
}
# what only the classes can judge
OTHERS = {
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}},
    "own default": {"num_key_value_heads": ...},
    "partial": {"partial_rotary_factor": 1.0},
    "qwen3 default": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": ...,
    },
}
VALUES = (
    *(None, 0, 1, 2, 3, -1, 2**40, 0.5, 1.0, 1e300, float("nan"), True, False),
    *("x", "silu", "bfloat16", [], ["attention"], [1], [None], {}, {"rope_type": "default"}),
)


@pytest.fixture(scope="module")
def hybrid_dir(make_hybrid: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_hybrid(
        list(MIXED),
        mamba2_window=WindowSettings(8, 2),
        num_attention_heads=6,
        num_key_value_heads=3,
        kept_heads={4: (0, 2)},
    )
    return save_model(model, tmp_path_factory.mktemp("h") / "hybrid", {}, None)


@pytest.fixture
def hybrid(hybrid_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hybrid_dir, tmp_path / "hybrid"))


def by_classes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        patch.setattr(contents, "plain_layout", lambda reader: None)
        return describe(str(folder), session=SessionSize.holding(3, 300, 4))


def without_classes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def refuse(reader: object) -> None:
        raise AssertionError("asked the classes of the family")

    with monkeypatch.context() as patch:
        patch.setattr("mambactl.checkpoint.load.adapt", refuse)
        return describe(str(folder), session=SessionSize.holding(3, 300, 4))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_described_without_its_classes(name: str, llama: Path, monkeypatch) -> None:
    set_fields(llama, CONFIG, FAMILIES[name])
    assert without_classes(llama, monkeypatch) == by_classes(llama, monkeypatch)


def test_so_are_all_mixers_of_ours(hybrid: Path, monkeypatch) -> None:
    found = without_classes(hybrid, monkeypatch)
    assert found == by_classes(hybrid, monkeypatch)
    assert found["mixers"] == list(MIXED)
    assert found["cache"]["window_bytes"] and found["session"]["bytes"]["rings"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_classes_know_is_left_to_them(name: str, llama: Path, monkeypatch) -> None:
    set_fields(llama, CONFIG, OTHERS[name])
    with open_checkpoint(str(llama)) as reader:
        assert plain_layout(reader) is None


@pytest.mark.parametrize("own", [False, True])
def test_no_value_is_described_that_the_classes_refuse(
    own: bool, llama: Path, hybrid: Path
) -> None:
    """Every key with many values: what is said is then what the classes say."""
    folder = hybrid if own else llama
    raw = json.loads((folder / CONFIG).read_text())
    keys = {*PlainFields.model_fields, *SECTIONS, "rope_scaling", "rope_parameters", "model_type"}
    described = 0
    with open_checkpoint(str(folder)) as reader:
        for key in sorted(keys):
            for value in VALUES:
                reader.config = raw | {key: value}
                found = plain_layout(reader)
                if found is None:
                    continue
                described += 1
                try:
                    config = adapt(reader).config
                except ModelError as error:
                    pytest.fail(f"{key}: {value!r} is described, but {error}")
                assert config.mixers == found.mixers
                names = ("num_attention_heads", "num_key_value_heads", "head_dim")
                assert [getattr(config, n) for n in names] == [getattr(found, n) for n in names]
                mine, theirs = found.layers, config.layers
                assert [asdict(a.settings) for a in mine if a.settings] == [
                    asdict(b.settings) for b in theirs if b.settings
                ]
    assert described > 50


def test_every_field_of_a_family_is_known() -> None:
    """A field that a newer transformers adds must be checked here before it is believed."""
    from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

    from mambactl.models.config import HybridConfig

    shared = {field.name for field in fields(PretrainedConfig)} - adapted._SHARED_FIELDS
    elsewhere = {"rope_parameters", "rope_scaling"}
    for family in (HybridConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config):
        known = {field.name for field in fields(family)} - shared | adapted._OLDER_KEYS
        assert known <= PlainFields.model_fields.keys() | SECTIONS | UNUSUAL | elsewhere, family


def test_the_tables_agree() -> None:
    assert list(SIZES) == [name for name in MIXERS if name in SIZES]
    assert all(isinstance(MIXERS[name], type(sizes)) for name, sizes in SIZES.items())
    assert {kind: FORMATS[kind].architecture for kind in PLAIN} == PLAIN
