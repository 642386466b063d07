"""Configs and lineages with a value that cannot be used: a sentence that names the file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.faults import refused, rows, set_fields

from mambactl.checkpoint.adapted import build_config
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import adapt, load_lineage, load_model, open_strict
from mambactl.checkpoint.provenance import lineage
from mambactl.checkpoint.save import save_model
from mambactl.errors import ModelError

CONFIG = "config.json"


@pytest.fixture(scope="module")
def hybrid_dir(make_hybrid: Callable, tmp_path_factory) -> Path:
    mixers = ["mamba2", "attention", "mamba1", "mamba2_window"]
    record = lineage("convert", None, "llama", None, {"ratio": 0.5}, 0, {"replaced_layers": [0]})
    return save_model(make_hybrid(mixers), tmp_path_factory.mktemp("h") / "hybrid", {}, record)


@pytest.fixture
def hybrid(hybrid_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hybrid_dir, tmp_path / "hybrid"))


LLAMA_FIELDS = {
    "architectures": [3, [3], {"a": 1}, "x"],
    "model_type": [3, [], {}],
    "auto_map": [3, {"a": 3}],
    "vocab_size": [0, -1, 2**40, 1.5, True, "many", [1], {}],
    "hidden_size": [0, 2**30, "x"],
    "num_hidden_layers": [0, 1025, 1_000_000, 2**70, None],
    "num_attention_heads": [0, 3, "many"],
    "num_key_value_heads": [0, 3],
    "head_dim": [0, 15, -16],
    "hidden_act": [3, "nope"],
    "rms_norm_eps": [-1, float("nan"), "x"],
    "rope_parameters": [3, "linear", {"rope_type": "foo"}, {"rope_type": 3}, {"rope_type": []}],
    "rope_scaling": ["x", {"type": "linear"}, {"type": "linear", "factor": 0}],
    "rope_parameters.rope_theta": [0, "x", {}, 1e300],
    "eos_token_id": ["x", [[1]], 2**70, {}],
    "pad_token_id": [97, "x", [1]],
    "tie_word_embeddings": [3, "x"],
    "dtype": [3, "nn", "foo", []],
    "quantization_config": [3],
}
HYBRID_FIELDS = {
    "mixers": [3, [], ["mamba2"], [3, 3, 3, 3], [[]], "mamba2", {"a": 1}],
    "mamba2": [3, "x", [], [1, 2, 3, 4], [{}] * 4, {}],
    "mamba2.n_heads": [0, -1, 3, "x", 1.5, True, 2**40, ...],
    "mamba2.x_heads": [0, 3],
    "mamba2.norm_groups": [0, 5],
    "mamba2.d_conv": [0],
    "mamba2.d_state": [0, []],
    "mamba2.chunk_size": [0],
    "mamba2.norm_eps": ["x", -1.0],
    "mamba2.unknown": [1],
    "mamba1.x_dim": [None, 5],
    "mamba1.d_state": [0, 7],
    "mamba2_window.window": [0, -1, 2**60, "x"],
    "mamba2_window.sinks": [-1, 2**60],
    "has_mlp": ["x"],
    "qk_norm": [3],
    "attention_bias": [3, ["z"]],
}


@pytest.mark.parametrize(("key", "value"), rows(LLAMA_FIELDS))
def test_fields_of_a_llama(llama: Path, key: str, value: Any) -> None:
    if key == "rope_scaling":
        set_fields(llama, CONFIG, {"rope_parameters": ...})
    set_fields(llama, CONFIG, {key: value})
    # None is the family's default, which these weights do not fit
    refused(open_strict, llama, CONFIG if value is not None else "")
    if value is not None:
        refused(describe, llama, "")


@pytest.mark.parametrize(("key", "value"), rows(HYBRID_FIELDS))
def test_fields_of_a_hybrid(hybrid: Path, key: str, value: Any) -> None:
    set_fields(hybrid, CONFIG, {key: value})
    refused(describe, hybrid, CONFIG)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_every_kind_of_angle_is_described(llama: Path, kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    before = describe(str(llama))["cache"]
    set_fields(llama, CONFIG, {"rope_parameters": rope})
    assert describe(str(llama))["cache"] == before


def test_what_the_library_would_obey_is_not_read(llama: Path) -> None:
    """Choice of code by name, tables of a billion labels, methods replaced by values."""
    orders = {
        "_attn_implementation": "someone/kernels",
        "attn_implementation": "flash_attention_3",
        "num_labels": 10**9,
        "per_layer_config": {"0": {}},
        "to_dict": 3,
        "validate": "x",
    }
    before = load_model(str(llama)).config.to_dict()
    set_fields(llama, CONFIG, orders)
    assert load_model(str(llama)).config.to_dict() == before


def test_a_bug_of_ours_is_no_damage(llama: Path, monkeypatch) -> None:
    def broken(*_: Any) -> None:
        raise AttributeError("ours")

    monkeypatch.setattr("mambactl.checkpoint.adapters.llama.same_names", broken)
    with pytest.raises(AttributeError, match="ours"):
        open_strict(str(llama))
    monkeypatch.setattr("mambactl.checkpoint.load.check", broken)
    with pytest.raises(AttributeError, match="ours"):
        open_strict(str(llama))


STATE_SPACES = {
    "d_model": ["x", 0, None, 2**40, ...],
    "n_layer": ["x", 0, 10**6, ...],
    "ssm_cfg": [3, [], {"layer": 3}, {"expand": 0}, {"headdim": 0}, {"dt_rank": "x"}],
    "attn_layer_idx": [3, [0]],
    "rms_norm": [False, "x"],
}


class Headers:
    """Stands for a reader of weights in the state-spaces layout."""

    path = Path("m")

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def names(self) -> list[str]:
        return ["backbone.embedding.weight"]

    def shape(self, name: str) -> tuple[int, ...]:
        return (97, 48)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32


@pytest.mark.parametrize(("key", "value"), rows(STATE_SPACES))
def test_fields_of_state_spaces(key: str, value: Any) -> None:
    config = {"d_model": 48, "n_layer": 2, "ssm_cfg": {"layer": "Mamba2", "headdim": 16}}
    assert adapt(Headers(config)).config.num_hidden_layers == 2
    config[key] = value
    if value is ...:
        del config[key]
    with pytest.raises(ModelError, match=r"m: config.json: |m uses"):
        adapt(Headers(config))


LINEAGE = {
    "schema": [2, 0, None, "1", True, ...],
    "stage": [3, None, ...],
    "source": [3, []],
    "teacher": [3, {}],
    "parent": [3, None, "x", []],
    "parent.sha256": [3],
    "recipe": [3, [], None],
    "metrics": [3, [], None],
    "metrics.selection": [3, None, {"ranking": "x"}, {"ranking": [[]]}],
    "ancestors": [3, None, {}, [3], [{}], [{"stage": "sft", "metrics": 3}]],
    "versions": [3, {"torch": 2}],
}


@pytest.mark.parametrize(("key", "value"), rows(LINEAGE))
def test_fields_of_a_lineage(hybrid: Path, key: str, value: Any) -> None:
    set_fields(hybrid, "mambactl.json", {key: value})
    for load in (load_lineage, describe, load_model):
        refused(load, hybrid, "mambactl.json")


def test_a_newer_lineage_says_what_to_do(hybrid: Path) -> None:
    set_fields(hybrid, "mambactl.json", {"schema": 2})
    with pytest.raises(ModelError, match="schema 2, written by a newer mambactl") as caught:
        load_lineage(str(hybrid))
    assert caught.value.hint == "pip install -U mambactl"


def test_configs_are_built_from_checked_values_only() -> None:
    from transformers import LlamaConfig

    with pytest.raises(ModelError, match="hidden_size"):
        build_config(Headers({}), LlamaConfig, {"hidden_size": 2**40})
