"""Answers and refusals before torch is imported, and the line that says that it will be."""

import gc
import json
from pathlib import Path

import pytest
from checkpoint.test_gguf_reader import write_gguf
from transformers import LlamaForCausalLM

from mambactl.checkpoint.save import save_model
from mambactl.cli import preflight

# every command line in one process: its exit code, and the last heavy modules that it loaded
RUN = """
import json, sys
from mambactl.cli.main import run
for words in json.loads(sys.argv[1]):
    print("$", *words, file=sys.stderr, flush=True)
    code = run(words)
    heavy = [name for name in ("torch", "transformers", "datasets", "trl") if name in sys.modules]
    print("=", code, *heavy, file=sys.stderr, flush=True)
"""
# stands for torch: what stderr holds when it is first asked for
BEFORE = """
import os, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            os._exit(77)
sys.meta_path.insert(0, Guard())
from mambactl.cli.main import main
sys.argv = ["mambactl", *sys.argv[1:]]
main()
"""
WRONG = "there is no file, folder or alias named 'nosuch'"
MISSING = "missing.jsonl does not exist"


@pytest.fixture
def outcomes(python):
    """outcomes(command line, ...) -> of each its exit code, what it loaded, and its stderr."""

    def call(*lines: list[str]) -> list[tuple[int, list[str], str]]:
        done = python("-c", RUN, json.dumps(lines))
        assert done.code == 0, done.err
        found = []
        for part in done.err.split("$ ")[1:]:
            said, _, state = part.rpartition("\n= ")
            code, *heavy = state.split()
            found.append((int(code), heavy, said.partition("\n")[2]))
        assert len(found) == len(lines)
        return found

    return call


def test_wrong_names_files_and_options(outcomes, tiny_llama_dir, tmp_path) -> None:
    """A row for each: the command line, its exit code, and what it says."""
    llama, folder = str(tiny_llama_dir), tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "data.txt").write_text("the king")
    cases = {
        3: [
            (["convert", "nosuch"], WRONG),
            (["distill", "nosuch", "--data", "data.txt"], WRONG),
            (["sft", "nosuch", "--data", "data.txt"], WRONG),
            (["dpo", "nosuch", "--data", "data.txt"], WRONG),
            (["teacher-cache", "nosuch", "--data", "data.txt"], WRONG),
            (["eval", "nosuch", "--data", "data.txt"], WRONG),
            (["eval", llama, "nosuch", "--compare", "--data", "data.txt"], WRONG),
            (["bench", "nosuch"], WRONG),
            (["generate", "nosuch", "-p", "hi"], WRONG),
            (["export", "nosuch"], WRONG),
            (["spec-decode", "--draft", "ngram", "--target", "nosuch"], WRONG),
            (["push", "nosuch", "org/name"], WRONG),
            (["inspect", "nosuch"], WRONG),
            (["convert", "smollm2-135n"], "did you mean smollm2-135m?"),
            (["convert", str(folder)], "is not a checkpoint"),
            (["convert", "./nothing.st"], "nothing.st does not exist"),
            (["spec-decode", "--draft", "nosuch", "--target", llama], f"--draft: {WRONG}"),
            (["convert", llama, "--mixers-from", "nosuch"], f"--mixers-from: {WRONG}"),
            (["eval", llama, "--against", "nosuch", "--data", "data.txt"], f"--against: {WRONG}"),
            (["bench", llama, "--baseline", "nosuch"], f"--baseline: {WRONG}"),
            (
                ["sft", llama, "--teacher", "nosuch", "--data", "data.txt"],
                f"the teacher cannot be found: {WRONG}",
            ),
        ],
        2: [
            (["convert", llama, "--calibrate", "missing.jsonl"], MISSING),
            (["distill", llama, "--data", "missing.jsonl"], MISSING),
            (["distill", llama, "--data", "missing.jsonl=0.5", "--data", "data.txt=1"], MISSING),
            (["sft", llama, "--data", "data.txt", "--eval-data", "missing.jsonl"], MISSING),
            (["dpo", llama, "--data", "missing.jsonl"], MISSING),
            (["eval", llama, "--data", "missing.jsonl"], MISSING),
            (["eval", llama, "--preferences", "missing.jsonl"], MISSING),
            (["generate", llama, "--dataset", "missing.jsonl"], MISSING),
            (["generate", llama, "--prompts", "missing.jsonl"], "missing.jsonl is no file"),
            (["sft", llama, "--data", str(folder)], "is a folder"),
            (["convert", llama, "--form", "portable", "--window", "8"], "does not go with"),
            (["convert", llama, "--keep-heads", "0.1", "--keep-attention", "1"], "give one of"),
            (["distill", llama, "--capture", "--grad-checkpointing"], "drop --capture"),
            (["sft", llama, "--ce-weight", "0"], "both 0"),
            (["sft", llama, "--lora-alpha", "8"], "there are none"),
            (["dpo", llama, "--label-smoothing", "0.1"], "does nothing for"),
            (["eval", llama], "nothing to measure"),
            (["eval", llama, "--control", "window"], "measure nothing"),
            (["bench", llama, "--min-speedup", "2"], "something to be faster than"),
            (["generate", llama], "no prompt"),
            (["generate", llama, "-p", "hi", "--shard", "1/2"], "goes with --dataset"),
            (["generate", llama, "--dataset", "data.txt", "--shard", "3/2"], "is no part"),
            (["generate", llama, "-p", "hi", "--ngram"], "beside a draft that is a checkpoint"),
            (["chat", llama, "--draft", "ngram", "--ngram"], "--draft ngram alone"),
            (["spec-decode", "--target", llama, "-p", "hi"], "no draft"),
            (["sft", llama, "--resume", "--force"], "exclude each other"),
            (["sft", llama, "--set", "nonsense=1"], "has no option nonsense"),
            (["distill", llama, "--max-steps", "0"], "max-steps"),
        ],
    }
    rows = [(words, code, said) for code, lines in cases.items() for words, said in lines]
    for (words, code, said), found in zip(rows, outcomes(*(row[0] for row in rows)), strict=True):
        assert found[:2] == (code, []), (words, found)
        assert said in found[2], (words, found)
        assert "Traceback" not in found[2]


def test_what_is_there_is_shown_without_torch(
    outcomes, make_hybrid, tiny_llama_dir, tmp_path
) -> None:
    mixers = ["mamba2", "attention", "mamba1", "mamba2_window"]
    save_model(make_hybrid(mixers), tmp_path / "t.st", {}, None)
    write_gguf(tmp_path / "m.gguf", LlamaForCausalLM.from_pretrained(tiny_llama_dir))
    lines = [
        ["inspect", str(tiny_llama_dir)],
        ["inspect", "t.st", "--tensors", "--lineage", "--batch-size", "8", "-k", "4"],
        ["inspect", "t.st", "--json"],
        ["inspect", "m.gguf"],
        ["doctor"],
        ["doctor", "--json"],
    ]
    assert [found[:2] for found in outcomes(*lines)] == [(0, [])] * len(lines)


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--quiet"]])
def test_a_line_comes_before_the_imports(python, tiny_llama_dir: Path, more: list[str]) -> None:
    done = python("-c", BEFORE, "convert", str(tiny_llama_dir), *more)
    assert done.code == 77
    assert done.err == ("" if "--quiet" in more else "loading torch and transformers\n")


def test_only_the_first_imports_pass_without_a_search_for_garbage(monkeypatch) -> None:
    monkeypatch.setattr(preflight, "HEAVY", "not_loaded_yet")
    try:
        with pytest.raises(ImportError), preflight.loading():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count() > 0
        frozen = gc.get_freeze_count()
        monkeypatch.setattr(preflight, "HEAVY", "torch")
        with preflight.loading():
            # what an earlier stage left can be collected
            assert gc.isenabled()
        assert gc.get_freeze_count() <= frozen
    finally:
        gc.unfreeze()


def test_decoding_loads_no_package_of_training_or_measuring(python) -> None:
    code = (
        "import sys, mambactl.commands.generate, mambactl.commands.chat\n"
        "import mambactl.commands.spec_decode\n"
        "others = {'datasets', 'pandas', 'pyarrow', 'trl', 'peft', 'lm_eval', 'matplotlib'}\n"
        "print(*sorted({*others, 'starlette', 'uvicorn'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert (done.code, done.out.split()) == (0, []), done.err
