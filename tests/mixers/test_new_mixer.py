"""A mixer that only its own file knows goes through the whole program.

`average.py` beside this file is all there is of it; here its spec joins the table, and a model
whose two replaced layers have different widths is made, trained, measured, decoded and loaded.
"""

import json

import pytest
import torch
from conftest import write_sentences
from mixers.average import AverageSettings, AverageSpec

from mambactl.checkpoint.load import load_model
from mambactl.cli.main import run
from mambactl.data.format import Example
from mambactl.data.pack import collate, pack
from mambactl.decode.drafters import NgramDrafter
from mambactl.decode.engine import Engine
from mambactl.decode.sampler import SamplingParams
from mambactl.models.cache import HybridCache
from mambactl.models.mixers.registry import MIXERS
from mambactl.train.ledger import forward_flops

REPLACED = (0, 2)


@pytest.fixture(autouse=True)
def average(monkeypatch):
    monkeypatch.setitem(MIXERS, "average", AverageSpec())


@pytest.fixture
def call(capfd, tmp_path, monkeypatch):
    """call(*words) -> the one JSON object that a command line prints."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> dict:
        capfd.readouterr()
        code = run([*map(str, words), "--json"])
        out, err = capfd.readouterr()
        assert code == 0, err
        return json.loads(out)

    return command


@pytest.fixture
def text(tmp_path) -> str:
    return write_sentences(tmp_path / "text.jsonl", 0, 60)


@pytest.fixture
def student(call, tiny_llama_dir, text, tmp_path) -> str:
    """The tiny Llama with two layers replaced and fitted."""
    made = call(
        "convert", tiny_llama_dir, "--mixer", "average", "--keep-attention", "1,3", "--calibrate",
        text, "--calibrate-tokens", "1024", "--max-length", "64", "-o", "student.st", "--device",
        "cpu",
    )  # fmt: skip
    assert made["metrics"]["replaced_layers"] == list(REPLACED)
    assert made["metrics"]["calibration_error"] < 1
    return str(tmp_path / "student.st")


def kl_of(call, model: str, text: str, *options: str) -> float:
    """KL of a model to its teacher on the text that it was made with."""
    found = call("eval", model, "--data", text, "--max-length", "64", "--device", "cpu", *options)
    return found["metrics"]["fidelity"]["text"]["kl"]


def test_widths_differ_by_layer_and_come_back(student) -> None:
    config = load_model(student).config
    assert config.mixers == ["average", "attention"] * 2
    settings = [config.layer(index).settings for index in REPLACED]
    assert settings == [AverageSettings(16), AverageSettings(32)]
    weights = load_model(student).state_dict()
    shapes = [tuple(weights[f"model.layers.{i}.average.in_proj.weight"].shape) for i in REPLACED]
    assert shapes == [(16, 48), (32, 48)]


def test_the_fit_helps(student, call, tiny_llama_dir, text, tmp_path) -> None:
    plain = call(
        "convert", tiny_llama_dir, "--mixer", "average", "--keep-attention", "1,3", "-o",
        "plain.st", "--device", "cpu",
    )  # fmt: skip
    fitted, unfitted = (kl_of(call, path, text) for path in (student, plain["checkpoint"]))
    assert fitted < unfitted


def test_inspect_counts_parts_and_cache(student, call) -> None:
    found = call("inspect", student)
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["average layers"]["layers"] == "0,2"
    model = load_model(student)
    cache = HybridCache(model.config, 1)
    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    # states of 16 and 32 channels in fp32, and keys of two layers
    states = 4 * (16 + 32)
    assert found["cache"]["bytes_per_sequence"] == states
    assert cache.nbytes() == states + found["cache"]["bytes_per_token"]
    assert forward_flops(model.config, 8) > 0


def test_it_is_aligned_distilled_and_measured(student, call, text) -> None:
    trained = call(
        "distill", student, "--data", text, "--max-steps", "30", "--stages",
        "align,stepwise,logits", "--batch-size", "4", "--max-length", "64", "--align-lr", "1e-2",
        "--lr", "1e-2", "--stepwise-groups", "0.25,0.5", "-o", "trained.st", "--device", "cpu",
    )  # fmt: skip
    after = kl_of(call, trained["checkpoint"], text, "--per-layer", "--ablate", "recurrent")
    assert after < kl_of(call, student, text)
    old, new = (load_model(path).state_dict() for path in (student, trained["checkpoint"]))
    for index in REPLACED:
        name = f"model.layers.{index}.average.decay"
        assert not torch.equal(old[name], new[name])


def test_a_dry_run_names_its_parameters(student, call, text, capfd) -> None:
    assert run(["distill", student, "--data", text, "--dry-run", "--device", "cpu"]) == 0
    assert "averages" in capfd.readouterr().err


def test_packed_documents_do_not_see_each_other(student) -> None:
    model, draw = load_model(student), torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 97, (n,), generator=draw).numpy() for n in (9, 14, 7)]
    mask = [torch.ones(len(ids), dtype=torch.bool).numpy() for ids in documents]
    rows = pack([Example(*pair) for pair in zip(documents, mask, strict=True)], 32)
    batch = collate(rows)
    with torch.no_grad():
        packed = model(
            batch.input_ids, position_ids=batch.position_ids, seq_idx=batch.seq_idx,
            use_cache=False,
        ).logits  # fmt: skip
        alone = [model(torch.tensor(ids)[None], use_cache=False).logits[0] for ids in documents]
    for row in range(len(rows)):
        numbers = batch.seq_idx[row][batch.valid[row]]
        for number in numbers.unique():
            at = ((batch.seq_idx[row] == number) & batch.valid[row]).nonzero()[:, 0]
            ids = batch.input_ids[row, at]
            (own,) = [
                a for a, d in zip(alone, documents, strict=True) if ids.tolist() == d.tolist()
            ]
            torch.testing.assert_close(packed[row, at], own, rtol=0, atol=2e-5)


def test_speculative_decoding_rolls_it_back_exactly(student) -> None:
    model, draw = load_model(student), torch.Generator().manual_seed(1)
    prompts = [(torch.randint(3, 97, (7,), generator=draw).tolist() * 4)[:n] for n in (5, 12, 20)]
    params = SamplingParams(max_new_tokens=24)
    plain = Engine(model).generate(prompts, params)
    drafted = Engine(model, NgramDrafter(), 4).generate(prompts, params)
    assert drafted.tokens == plain.tokens
    # some drafts were rejected, so states were replayed
    assert 0 < drafted.stats.accepted < drafted.stats.drafted


def test_spec_decode_checks_it_from_the_shell(student, call) -> None:
    found = call(
        "spec-decode", "--draft", "ngram", "--target", student, "-k", "3", "--max-new-tokens",
        "12", "--check", "-p", "the old house", "--device", "cpu",
    )  # fmt: skip
    assert found["metrics"]["exact"]


def test_the_whole_model_is_saved_and_loaded(student, tmp_path) -> None:
    model, ids = load_model(student), torch.arange(3, 20)[None]
    model.save_pretrained(tmp_path / "folder")
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path / "folder")(ids).logits
        assert torch.equal(again, model(ids).logits)


def test_an_unknown_mixer_is_a_sentence(tiny_llama_dir, capfd) -> None:
    assert run(["convert", str(tiny_llama_dir), "--mixer", "averag", "-o", "x.st"]) == 2
    assert "did you mean average?" in capfd.readouterr().err
