"""Strict loading: whatever is wrong with a checkpoint is said in a sentence that names it."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import (
    load_lineage,
    load_model,
    load_tokenizer,
    open_checkpoint,
    open_strict,
)
from mambactl.checkpoint.save import save_model
from mambactl.errors import ExitCode, MambactlError, ModelError

NORM = "model.layers.1.input_layernorm.weight"
Damage = Callable[[dict[str, torch.Tensor]], object]


def rewrite(folder: Path, change: Damage) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **fields: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **fields}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(NORM), rf"1 missing \({NORM}\)"),
        (lambda s: s.update(spare=torch.ones(2)), r"1 unexpected \(spare\)"),
        (lambda s: s.update({NORM: torch.ones(47)}), rf"{NORM} is \[47\], not \[48\]"),
        (lambda s: s.update({NORM: torch.ones(48).char()}), rf"{NORM} is stored as torch.int8"),
        (
            lambda s: s.update({"lm_head.weight": torch.ones(97, 48)}),
            "lm_head.weight differs from the embedding",
        ),
    ],
)
def test_wrong_tensors_are_named(llama: Path, change: Damage, said: str) -> None:
    rewrite(llama, change)
    for loader in (load_model, open_strict):
        with pytest.raises(ModelError, match=said) as caught:
            loader(str(llama))
        assert caught.value.code == ExitCode.MODEL
        assert caught.value.hint


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_that_is_not_finite_is_named(llama: Path, bad: float, kind: torch.dtype) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[NORM] = state[NORM].to(kind)
        state[NORM][7] = bad

    rewrite(llama, change)
    with pytest.raises(ModelError, match=rf"{NORM} holds NaN or infinite numbers"):
        load_model(str(llama))


def test_large_numbers_are_finite(llama: Path) -> None:
    """Their sum is not, neither in float16 nor in float32."""
    for kind, most in ((torch.float16, 6e4), (torch.float32, 3e38)):
        rewrite(llama, lambda s: s.update({NORM: torch.full((48,), most, dtype=kind)}))  # noqa: B023
        assert load_model(str(llama)).get_parameter(NORM).max() > 0.9 * most
    with pytest.raises(ModelError, match=f"{NORM} holds numbers too large for float16"):
        load_model(str(llama), dtype=torch.float16)


def test_a_single_file_names_it_too(tmp_path: Path, make_hybrid: Callable) -> None:
    model = make_hybrid(["mamba2", "attention"])
    name = "model.layers.0.mamba.A_log"
    with torch.no_grad():
        model.state_dict()[name][0] = float("nan")
    save_model(model, tmp_path / "m.st", {}, None)
    with pytest.raises(ModelError, match=name):
        load_model(str(tmp_path / "m.st"))


def test_every_kind_of_problem_is_said_at_once(llama: Path) -> None:
    edit_config(llama, num_hidden_layers=6)
    rewrite(llama, lambda s: s.update(spare=torch.ones(2)))
    with pytest.raises(ModelError, match="18 missing .*and 13 more.*; 1 unexpected"):
        load_model(str(llama))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def contradictory_config(folder: Path) -> None:
    edit_config(folder, num_attention_heads="many")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pointer_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_absent_tensor(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"gone": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "model.safetensors is truncated"),
        (garbage, "model.safetensors is truncated or not a safetensors file"),
        (empty, "model.safetensors is truncated"),
        (no_config, "has no config.json"),
        (broken_config, "config.json is not valid JSON"),
        (list_config, "config.json is not a JSON object"),
        (contradictory_config, "num_attention_heads"),
        (no_weights, "has no weights"),
        (pointer_elsewhere, "model-00001-of-00002.safetensors is missing"),
        (index_of_absent_tensor, "lacks 1 tensors that the index names, first gone"),
    ],
)
def test_damaged_folder_is_a_sentence(llama: Path, damage: Callable, said: str) -> None:
    damage(llama)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(str(llama))
    assert caught.value.hint


def test_truncated_single_file_is_a_sentence(mixed_model, tmp_path: Path) -> None:
    path = save_model(mixed_model, tmp_path / "m.st", {}, None)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        load_model(str(path))


def test_single_file_without_metadata_needs_a_config_beside_it(llama: Path, tmp_path: Path) -> None:
    reference = load_model(str(llama)).state_dict()
    beside = load_model(str(llama / "model.safetensors")).state_dict()
    assert all(torch.equal(beside[name], reference[name]) for name in reference)
    alone = shutil.copy(llama / "model.safetensors", tmp_path / "alone.st")
    with pytest.raises(ModelError, match="carries no config"):
        load_model(str(alone))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickled_weights_are_read(llama: Path, sharded: bool, zipped: bool) -> None:
    reference = load_model(str(llama)).state_dict()
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names = list(state)
    parts = {"pytorch_model.bin": names}
    if sharded:
        parts = {f"pytorch_model-{i + 1:05d}-of-00002.bin": names[i::2] for i in range(2)}
        where = {name: file for file, part in parts.items() for name in part}
        (llama / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for file, part in parts.items():
        content = {name: state[name] for name in part}
        torch.save(content, llama / file, _use_new_zipfile_serialization=zipped)
    loaded = load_model(str(llama)).state_dict()
    assert all(torch.equal(loaded[name], reference[name]) for name in reference)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_pickled_code_never_runs(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    torch.save({"w": torch.ones(1), "x": Payload(marker)}, llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match="could run code"):
        load_model(str(llama))
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(ModelError):
        load_model(str(llama))
    assert not marker.exists()


def test_weights_beside_those_of_an_earlier_save(llama: Path, capsys) -> None:
    """model.safetensors wins over a stale index, as in transformers, with a warning."""
    expected = load_model(str(llama)).state_dict()
    old = {NORM: torch.zeros(3)}
    save_file(old, llama / "model-00001-of-00001.safetensors")
    index = {"weight_map": {NORM: "model-00001-of-00001.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load_model(str(llama)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    error = capsys.readouterr().err.replace("\n", " ")
    assert error.count("is ignored") == 1


def test_safetensors_beside_whole_weights_in_pickles(llama: Path) -> None:
    """An adapter's, say."""
    expected = load_model(str(llama)).state_dict()
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(state, llama / "pytorch_model.bin")
    save_file({"lora": torch.zeros(2)}, llama / "adapter_model.safetensors")
    found = load_model(str(llama)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["LLaMAForCausalLM", "LlamaForCausalLM"])
def test_older_spellings_of_an_architecture(llama: Path, name: str) -> None:
    raw = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(raw | {"architectures": [name]}))
    assert set(load_model(str(llama)).config.mixers) == {"attention"}
    assert set(describe(str(llama))["mixers"]) == {"attention"}


def test_a_tokenizer_of_sentencepiece_alone(llama: Path, monkeypatch) -> None:
    """Says what is missing, and that it is not the checkpoint."""
    (llama / "tokenizer.json").unlink(missing_ok=True)
    (llama / "tokenizer.model").write_bytes(b"any")
    monkeypatch.setattr("mambactl.checkpoint.load.find_spec", lambda _: None)
    with pytest.raises(MambactlError, match="needs sentencepiece and protobuf") as refused:
        load_tokenizer(str(llama))
    assert refused.value.code == ExitCode.RESOURCE
    assert refused.value.hint == "pip install sentencepiece protobuf"


def test_index_cannot_reach_outside_of_its_folder(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {NORM: "../secret.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="is no name of a file beside it"):
        load_model(str(llama))


def test_loaded_tied_weights_are_one_tensor(tiny_llama_dir: Path) -> None:
    model = load_model(str(tiny_llama_dir))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert all(not p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_applies_to_all_but_state_space_parameters(
    make_hybrid, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = save_model(make_hybrid(["mamba2", "mamba1"]), tmp_path / "m.st", {}, None)
    model = load_model(str(path), dtype=dtype)
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in model.named_parameters()}
    assert {kinds[name] for name in ("A_log", "D", "dt_bias")} == {torch.float32}
    assert kinds["weight"] == model.config.dtype == dtype


def test_tokenizer_survives_folder_and_single_file(
    tiny_llama_dir: Path, tiny_tokenizer, tmp_path: Path
) -> None:
    with open_checkpoint(str(tiny_llama_dir)) as reader:
        files = reader.files
    single = save_model(load_model(str(tiny_llama_dir)), tmp_path / "one.st", files, None)
    messages = [{"role": "user", "content": "the old river house"}]
    for spec in (str(tiny_llama_dir), str(single)):
        tokenizer = load_tokenizer(spec)
        assert tokenizer("the night").input_ids == tiny_tokenizer("the night").input_ids
        assert tokenizer.apply_chat_template(
            messages, tokenize=False
        ) == tiny_tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.eos_token == "<|im_end|>"
        assert tokenizer.name_or_path == spec
    assert load_lineage(str(tiny_llama_dir)) is None


def test_missing_tokenizer_is_a_sentence(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(str(llama))
