"""`--weights fp8` and `int8` of commands that decode, and of `eval`; a CPU rounds to them."""

import json
from copy import deepcopy

import pytest
import torch

from mambactl.checkpoint.load import load_model
from mambactl.checkpoint.provenance import lineage
from mambactl.checkpoint.save import save_model
from mambactl.checkpoint.side_files import read_side_files
from mambactl.generation.decoding import load_both
from mambactl.models.byte_weights import ByteLinear, linears, round_to_bytes
from mambactl.options import ServeConfig
from mambactl.report.collect import collect

SHORT = ("--max-new-tokens", "12", "--device", "cpu")
PROMPT = ("-p", "the old house")


@pytest.fixture(scope="module")
def folder(save_student, tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("fp8") / "student")


@pytest.fixture(scope="module")
def rounded(folder, tmp_path_factory, tiny_llama_dir):
    """The same student with the weights that 8 bits hold, as a checkpoint of its own."""
    model = load_model(str(folder)).requires_grad_(False)
    round_to_bytes(model, "fp8")
    record = lineage("convert", None, tiny_llama_dir, str(tiny_llama_dir), {}, 0, {})
    out = tmp_path_factory.mktemp("fp8") / "rounded"
    return save_model(model, out, read_side_files(folder), record)


@pytest.fixture
def old_gpu(monkeypatch):
    """Commands find a GPU of compute capability 8.6."""
    place = torch.device("cuda:0"), torch.bfloat16
    for module in ("generation.decoding", "commands.bench", "api.text"):
        monkeypatch.setattr(f"mambactl.{module}.placement", lambda config: place)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / "words.jsonl"
    rows = ["the old house by the river is red " * 4, "he said two birds went to the tree " * 5]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
    return str(path)


def test_text_is_that_of_the_rounded_model(cli, folder, rounded) -> None:
    done = cli("generate", str(folder), *PROMPT, *SHORT, "--weights", "fp8")
    assert done.code == 0
    assert done.out == cli("generate", str(rounded), *PROMPT, *SHORT).out
    assert "rounded to fp8; a CPU keeps them in float32, so no memory is saved" in done.err
    assert "fp8" not in cli("generate", str(folder), *PROMPT, *SHORT).err


@pytest.mark.parametrize("draft", ["ngram", "itself"])
def test_speculation_is_checked_with_rounded_weights(cli, folder, draft) -> None:
    named = str(folder) if draft == "itself" else draft
    words = ("spec-decode", "--target", str(folder), "--draft", named, "-k", "3", "--check")
    done = cli(*words, *SHORT, "--weights", "fp8", "--json")
    metrics = json.loads(done.out)["metrics"]
    assert metrics["exact"] and metrics["identical"]
    assert done.err.count("weights rounded to fp8") == (2 if draft == "itself" else 1)
    if draft == "itself":
        # the draft is rounded too: it proposes what the target would
        assert metrics["acceptance"] == 1.0
    kept = {each.name for each in (folder / "results").glob("spec-decode*")}
    assert any(name.endswith("-k3-fp8.json") for name in kept)


def test_eval_measures_the_rounded_student_alone(cli, folder, rounded, text) -> None:
    words = ("--data", text, "--max-length", "32", "--device", "cpu", "--json")
    # the student is its own teacher, which stays as it is
    own = json.loads(
        cli("eval", str(folder), "--teacher", str(folder), *words, "--weights", "fp8").out
    )["metrics"]
    found = own["fidelity"]["words"]
    assert own["weights"] == "fp8" and found["kl"] > 1e-5
    other = json.loads(cli("eval", str(rounded), "--teacher", str(folder), *words).out)["metrics"]
    assert "weights" not in other
    finer = json.loads(
        cli("eval", str(folder), "--teacher", str(folder), *words, "--weights", "int8").out
    )["metrics"]
    assert 0 < finer["fidelity"]["words"]["kl"] < found["kl"]
    assert found["kl"] == pytest.approx(other["fidelity"]["words"]["kl"], rel=1e-6)
    plain = json.loads(cli("eval", str(folder), "--teacher", str(folder), *words).out)["metrics"]
    assert plain["fidelity"]["words"]["kl"] == pytest.approx(0, abs=1e-9)


def test_results_of_rounded_weights_stand_apart(cli, folder, text) -> None:
    words = ("--data", text, "--max-length", "32", "--device", "cpu")
    for more in ((), ("--weights", "fp8")):
        assert cli("eval", str(folder), *words, *more).code == 0
    names = {each.name for each in (folder / "results").glob("eval-words*.json")}
    assert names - {"eval-words-int8.json"} == {"eval-words.json", "eval-words-fp8.json"}
    card = (folder / "README.md").read_text("utf-8")
    assert "eval-words.json" in card and "eval-words-fp8.json" not in card
    models = {entry.model for entry in collect([folder]).entries if "fidelity" in entry.metrics}
    assert {model.endswith("student@fp8") for model in models} == {True, False}


@pytest.mark.slow
def test_bench_counts_the_bytes_that_are_read(cli, folder) -> None:
    words = ("bench", str(folder), "--device", "cpu", "--input-len", "8", "--output-len", "4")
    done = cli(*words, "--weights", "fp8", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["metrics"]["points"][0]["decode_tokens_per_second"] > 0
    assert (folder / "results" / "bench-cpu-fp8.json").exists()
    shape = ("bench", "--synthetic", "tiny-hybrid", "--draft", "tiny-draft", "-k", "2")
    # every token of a scripted model is checked
    done = cli(*shape, "--device", "cpu", "--output-len", "8", "--weights", "fp8")
    assert done.code == 0 and done.err.count("weights rounded to fp8") == 2
    done = cli("bench", str(folder), "--training", "--weights", "fp8", "--device", "cpu")
    assert done.code == 2 and "--weights is for decoding" in done.err


def test_older_gpus_are_refused_before_a_model_is_loaded(cli, folder, old_gpu, monkeypatch) -> None:
    for module in ("generation.decoding", "speed.candidates"):
        monkeypatch.setattr(
            f"mambactl.{module}.load_model", lambda *_, **__: pytest.fail("a model was loaded")
        )
    own = ("--weights", "fp8")
    calls = [
        ("generate", str(folder), *PROMPT),
        ("generate", str(folder), *PROMPT, "--dry-run"),
        ("spec-decode", "--target", str(folder), "--draft", "ngram"),
        ("bench", str(folder)),
        ("bench", "--synthetic", "tiny-hybrid"),
    ]
    for call in calls:
        done = cli(*call, *own)
        assert done.code == 6 and done.out == "", call
        assert "fp8 weights need a GPU of compute capability 8.9, cuda:0 has 8.6" in done.err
        assert "Traceback" not in done.err


def test_serving_rounds_both_models(folder) -> None:
    config = ServeConfig(device="cpu", draft=str(folder), weights="fp8")
    target, _, draft = load_both(config, str(folder), None)
    plain = load_model(str(folder)).requires_grad_(False)
    expected = deepcopy(plain)
    round_to_bytes(expected, "fp8")
    for model in (target, draft):
        assert not any(isinstance(each, ByteLinear) for each in model.modules())
        pairs = zip(linears(model), linears(expected), linears(plain), strict=True)
        changed = [
            torch.equal(ours[2].weight, theirs[2].weight)
            and not torch.equal(ours[2].weight, before[2].weight)
            for ours, theirs, before in pairs
        ]
        assert all(changed) and changed


def test_from_python(folder, rounded) -> None:
    import mambactl

    params = mambactl.SamplingParams(max_new_tokens=8)
    student = mambactl.load(str(folder), device="cpu", weights="fp8")
    found = mambactl.generate(student, "the old house", params)
    assert found[0].text == mambactl.generate(str(rounded), "the old house", params)[0].text
    drafted = mambactl.generate(student, "the old house", params, draft=str(folder), k=2)
    assert drafted[0].text == found[0].text and drafted[0].stats.acceptance == 1.0
