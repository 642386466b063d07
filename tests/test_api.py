"""The Python functions: one for every command, the same results, and examples that run."""

import ast
import doctest
import inspect
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import write_sentences

import mambactl
from mambactl import console
from mambactl.api import FUNCTIONS, OTHERS, calls
from mambactl.checkpoint import embedded
from mambactl.cli.app import FUNCTIONS as OF_THE_PROGRAM
from mambactl.cli.app import GROUPS
from mambactl.cli.main import run
from mambactl.commands import COMMANDS
from mambactl.errors import CheckError, ModelError, OutputError, UsageError

# the functions whose keywords are a command's options
WITH_OPTIONS = {
    **{name: FUNCTIONS[name] for name in COMMANDS},
    "generate": "generate_dataset",
}
RECIPE = """
name: small
stages:
  convert: {model: llama, device: cpu}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_student, tiny_llama_dir) -> Path:
    """A working folder with the models and files that examples name."""
    place = tmp_path_factory.mktemp("examples")
    (place / "llama").symlink_to(tiny_llama_dir)
    save_student(place / "student.st")
    write_sentences(place / "chat.jsonl", 1, 12)
    pairs = [
        {"prompt": f"the old {word}", "chosen": "the river", "rejected": "king night"}
        for word in ("house", "door", "tree", "bird")
    ]
    (place / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (place / "recipe.yaml").write_text(RECIPE)
    return place


@pytest.fixture
def here(folder: Path, tiny_llama_dir: Path, monkeypatch) -> Path:
    # of the package whose tokenizer synthetic models get
    monkeypatch.setattr(embedded, "fetch", lambda: tiny_llama_dir)
    monkeypatch.chdir(folder)
    return folder


def test_every_command_has_a_function() -> None:
    assert sorted(FUNCTIONS) == sorted([*COMMANDS, *GROUPS, *OF_THE_PROGRAM])
    assert sorted(mambactl.__all__) == sorted(["__version__", *FUNCTIONS.values(), *OTHERS])
    # a package of this name would replace the function
    packages = {path.stem for path in Path(mambactl.__file__).parent.iterdir()}
    assert not packages & set(mambactl.__all__)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_keywords_are_the_options_of_the_command(command: str) -> None:
    function = getattr(mambactl, WITH_OPTIONS[command])
    parameters = inspect.signature(function).parameters
    fields = COMMANDS[command].options.model_fields
    words = " ".join(function.__doc__.split())
    for name, field in fields.items():
        default = inspect.Parameter.empty if field.is_required() else field.default
        assert parameters[name].default == default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        told = "" if field.is_required() else f" (default: {default!r})"
        assert f"{name}: {' '.join(field.description.split())}{told}" in words
    own = parameters.keys() - fields.keys()
    assert own <= {"model", "out", "resume", "force", "compare"}
    assert ("model" in own) == (COMMANDS[command].model != "none")
    assert "Annotated" not in str(inspect.signature(function))


def examples() -> list[str]:
    return [name for name in mambactl.__all__ if ">>>" in (getattr(mambactl, name).__doc__ or "")]


def test_every_function_has_an_example() -> None:
    functions = {name for name in mambactl.__all__ if inspect.isroutine(getattr(mambactl, name))}
    assert functions == set(examples())


@pytest.mark.parametrize("name", examples())
def test_examples_run(name: str, here: Path, capfd) -> None:
    mambactl.set_verbosity(0)
    function = getattr(mambactl, name)
    test = doctest.DocTestParser().get_doctest(
        inspect.getdoc(function), {"mambactl": mambactl, "Path": Path}, name, None, 0
    )
    said: list[str] = []
    failed = doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed
    assert not failed, "".join(said)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["README.md", "mambactl/docs/python.md"])
def test_documents_run(name: str, here: Path, capfd) -> None:
    # what `convert` and `distill` write by default is there from the document before
    for folder in ("runs", "runs.results"):
        shutil.rmtree(here / folder, ignore_errors=True)
    text = (Path(__file__).parent.parent / name).read_text("utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    for written, small in (("smollm2-135m", "llama"), ("=200", "=2"), ("held-out", "chat")):
        assert written in code
        code = code.replace(written, small)
    exec(compile(code, name, "exec"), {})
    fidelity, text = capfd.readouterr().out.split("\n", 1)
    assert "agreement" in fidelity
    answers = text.rstrip("\n").split("\n")
    assert all(answers) and len(answers) == (2 if "stream(" in code else 1)


@pytest.mark.parametrize("flags", [(), ("--draft", "ngram", "-k", "3"), ("--draft", "llama")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generate_and_stream_write_what_the_command_writes(
    flags: tuple[str, ...], temperature: float, here: Path, capfd
) -> None:
    words = ["generate", "student.st", "-p", "the old house", "--max-new-tokens", "24"]
    words += ["--temperature", str(temperature), "--seed", "5", "--device", "cpu", *flags]
    assert run(words) == 0
    printed = capfd.readouterr().out
    student = mambactl.load("student.st", device="cpu")
    params = mambactl.SamplingParams(max_new_tokens=24, temperature=temperature, seed=5)
    draft = flags[1] if flags else None
    keywords = {"draft": draft} | ({"k": 3} if "-k" in flags else {})
    (found,) = mambactl.generate(student, "the old house", params, **keywords)
    assert found.text + "\n" == printed
    assert found.finish in ("eos", "length") and len(found.tokens) <= 24
    assert found.stats.tokens == len(found.tokens)
    assert (found.stats.drafted > 0) == bool(flags)
    pieces = list(mambactl.stream(student, "the old house", params, **keywords))
    assert "".join(pieces) + "\n" == printed
    assert len(pieces) > 1


def test_prompts_are_answered_in_their_order(here: Path) -> None:
    student = mambactl.load("student.st", device="cpu")
    params = mambactl.SamplingParams(max_new_tokens=6)
    prompts = ["the old house", "red", "a small bird saw the king"]
    together = mambactl.generate(student, prompts, params, batch_size=3)
    alone = [mambactl.generate(student, prompt, params)[0] for prompt in prompts]
    assert [each.text for each in together] == [each.text for each in alone]
    assert mambactl.generate(student, [], params) == []


def test_own_end_tokens_replace_the_models(here: Path) -> None:
    student = mambactl.load("student.st", device="cpu")
    (whole,) = mambactl.generate(student, "the old house", mambactl.SamplingParams(0.0, 0, 1.0, 9))
    end = whole.tokens[3]
    params = mambactl.SamplingParams(max_new_tokens=9, eos_token_ids=(end,))
    (found,) = mambactl.generate(student, "the old house", params)
    assert found.tokens == whole.tokens[: whole.tokens.index(end) + 1]
    assert found.finish == "eos"
    (ignored,) = mambactl.generate(student, "the old house", params, ignore_eos=True)
    assert (ignored.tokens, ignored.finish) == (whole.tokens, "length")


def test_two_streams_of_one_model_take_turns(here: Path) -> None:
    student = mambactl.load("student.st", device="cpu")
    params = mambactl.SamplingParams(max_new_tokens=8)
    prompts = ("the old house", "red door")
    streams = [mambactl.stream(student, prompt, params, draft="ngram") for prompt in prompts]
    texts = ["", ""]
    while any(pieces := [next(stream, "") for stream in streams]):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == [each.text for each in mambactl.generate(student, prompts, params)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_of_a_gpu(here: Path) -> None:
    """Graphs are captured and replayed in the thread of the stream, and kept for the next."""
    student = mambactl.load("student.st", device="cuda", dtype="float32")
    params = mambactl.SamplingParams(max_new_tokens=40)
    for draft in (None, "ngram"):
        (whole,) = mambactl.generate(student, "the old house", params, draft=draft)
        started = mambactl.stream(student, "red door", params, draft=draft)
        next(started)
        pieces = mambactl.stream(student, "the old house", params, draft=draft)
        assert "".join(pieces) == whole.text
        started.close()
        (again,) = mambactl.generate(student, "the old house", params, draft=draft)
        assert again.tokens == whole.tokens


def test_a_closed_stream_stops_decoding(here: Path, monkeypatch) -> None:
    student = mambactl.load("student.st", device="cpu")
    steps, forward = [], student.model.forward
    monkeypatch.setattr(
        student.model, "forward", lambda *args, **given: steps.append(1) or forward(*args, **given)
    )
    params = mambactl.SamplingParams(max_new_tokens=200)
    pieces = mambactl.stream(student, "the old house", params)
    assert not steps
    next(pieces)
    seen = len(steps)
    pieces.close()
    # the step under way is the last
    assert len(steps) <= seen + 1 < 10
    assert not [thread for thread in threading.enumerate() if thread.name == "on_demand"]


def test_arguments_of_a_stream_are_checked_at_once(here: Path) -> None:
    with pytest.raises(UsageError, match="prompt 0 is empty"):
        mambactl.stream("student.st", " ")
    with pytest.raises(UsageError, match="generate: k"):
        mambactl.generate("student.st", "red", k=99)
    with pytest.raises(ModelError):
        mambactl.generate("nowhere.st", "red")
    with pytest.raises(ModelError, match="is no model"):
        mambactl.load("-")


def test_arguments_of_other_types_are_refused(here: Path) -> None:
    for model in (3, None, ["student.st"]):
        with pytest.raises(UsageError, match="is no model"):
            mambactl.load(model)
    for model in ("", " ", b"student.st", "a\0b"):
        with pytest.raises(ModelError, match="is no model"):
            mambactl.load(model)
    for prompts in (None, 3):
        with pytest.raises(UsageError, match="prompts are"):
            mambactl.generate("student.st", prompts)
    with pytest.raises(UsageError, match="prompt 0 is empty"):
        mambactl.generate("student.st", [3])
    with pytest.raises(UsageError, match="params are"):
        mambactl.generate("student.st", "red", {"temperature": 0.5})
    with pytest.raises(UsageError, match="temperature nan"):
        mambactl.SamplingParams(temperature=float("nan"))


def test_a_draft_of_another_vocabulary_is_refused(here: Path, permuted: str) -> None:
    student = mambactl.load("student.st", device="cpu")
    for draft in (permuted, mambactl.load(permuted, device="cpu")):
        with pytest.raises(ModelError, match="another vocabulary"):
            mambactl.generate(student, "the old house", draft=draft)


def test_wrong_keywords_say_which(here: Path) -> None:
    with pytest.raises(UsageError, match="convert has no option ratoi") as caught:
        mambactl.convert("llama", "x.st", ratoi=0.5)
    assert caught.value.hint == "did you mean ratio?"
    with pytest.raises(UsageError, match="convert: ratio"):
        mambactl.convert("llama", "x.st", ratio=2)
    with pytest.raises(UsageError, match="exclude each other"):
        mambactl.convert("llama", "x.st", resume=True, force=True)
    with pytest.raises(UsageError, match="no dataset"):
        mambactl.generate_dataset("student.st")
    with pytest.raises(UsageError, match="no model"):
        mambactl.bench()
    with pytest.raises(UsageError, match="without a model"):
        mambactl.bench("student.st", synthetic=["tiny"])
    with pytest.raises(UsageError, match="konvert is no command"):
        mambactl.plan("konvert")
    assert not Path("x.st").exists()


def _written(path: str) -> tuple[int, int]:
    """The number of a file, and the time at which it was written."""
    found = Path(path).stat()
    return found.st_ino, found.st_mtime_ns


def test_an_output_that_is_there(here: Path, capfd) -> None:
    """As on the command line, and of what the command line made."""
    assert run(["convert", "llama", "-o", "made.st", "-q", "--device", "cpu"]) == 0
    printed = capfd.readouterr().out.strip()
    before = _written("made.st")
    with pytest.raises(OutputError, match="made.st exists"):
        mambactl.convert("llama", "made.st", device="cpu")
    made = mambactl.convert("llama", "made.st", resume=True, device="cpu")
    assert made.path == printed
    assert _written("made.st") == before
    with pytest.raises(OutputError, match="made differently: ratio"):
        mambactl.convert("llama", "made.st", resume=True, ratio=0.25)
    again = mambactl.convert("llama", Path("made.st"), force=True, ratio=0.25)
    assert len(again.metrics["replaced_layers"]) == 1
    assert mambactl.load("made.st", device="cpu").lineage["recipe"]["ratio"] == 0.25


def test_rows_that_are_there(here: Path) -> None:
    asked = {"dataset": [here / "chat.jsonl"], "max_samples": 2, "max_new_tokens": 3}
    first = mambactl.generate_dataset("student.st", "r.jsonl", keep_unfinished=True, **asked)
    again = mambactl.generate_dataset(
        "student.st", "r.jsonl", resume=True, keep_unfinished=True, **asked
    )
    assert again.path == first.path == str(here / "r.jsonl")
    assert again.metrics["tokens"] == first.metrics["tokens"]
    with pytest.raises(OutputError, match="made differently: seed"):
        mambactl.generate_dataset(
            "student.st", "r.jsonl", resume=True, keep_unfinished=True, seed=3, **asked
        )


def test_several_models_come_in_one_result(here: Path) -> None:
    found = mambactl.evaluate(
        "student.st", ["llama"], data=["chat.jsonl"], teacher="llama", limit=2, max_length=32
    )
    first, second = found.metrics["models"]
    assert (first["checkpoint"], second["checkpoint"]) == ("student.st", "llama")
    assert second["metrics"]["fidelity"]["chat"]["kl"] == pytest.approx(0, abs=1e-6)
    page = Path(found.metrics["report"]).read_text()
    # a command that would do the same, in place of the program that called
    assert "mambactl eval student.st llama --compare --set" in page
    assert "pytest" not in page


def test_a_bound_that_does_not_hold_is_an_error(here: Path) -> None:
    with pytest.raises(CheckError):
        mambactl.evaluate(
            "student.st", data=["chat.jsonl"], limit=2, max_length=32, fail_under=["agreement=1.1"]
        )


def test_several_processes_are_started_as_the_command_line_starts_them(
    here: Path, monkeypatch
) -> None:
    seen = []

    def launch(config, stage, models, flags):
        seen.append((config.nproc, stage, models, flags))
        return json.dumps({"checkpoint": "/x/out.st", "metrics": {"steps": 1}})

    monkeypatch.setattr(calls, "launch", launch)
    found = mambactl.distill("student.st", "out.st", force=True, data=["chat.jsonl"], nproc=2)
    assert (found.path, found.metrics) == ("/x/out.st", {"steps": 1})
    assert seen == [(2, "distill", ["student.st"], ["-o", "out.st", "--force", "--json"])]
    seen.clear()
    measured = mambactl.evaluate("student.st", ["llama"], data=["chat.jsonl"], nproc=3)
    assert measured.metrics == {"steps": 1}
    assert seen == [(3, "eval", ["student.st", "llama"], ["--compare", "--json"])]


def test_functions_are_quiet_until_told(here: Path) -> None:
    code = """
import mambactl
mambactl.convert("llama", "quiet.st", device="cpu")
mambactl.generate("quiet.st", "red", mambactl.SamplingParams(max_new_tokens=2))
mambactl.set_verbosity(1)
mambactl.convert("llama", "heard.st", device="cpu")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.count("replaced 4 of 8 KV heads") == 1


def test_the_callers_verbosity_stays(here: Path, capfd) -> None:
    mambactl.set_verbosity(2)
    mambactl.evaluate("student.st", data=["chat.jsonl"], limit=2, max_length=32)
    assert console.verbosity() == 2
    assert capfd.readouterr().out == ""


def test_defaults_are_named_for_type_checkers() -> None:
    """A default that `Field` gets without its name is one that type checkers do not find."""
    for path in (Path(mambactl.__file__).parent / "options").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Field":
                assert not node.args, f"{path}:{node.lineno}"
    assert (Path(mambactl.__file__).parent / "py.typed").is_file()
