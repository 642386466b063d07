"""`generate --prefix-cache` from the command line, for data sets and from Python."""

import json
import re
from pathlib import Path

import pytest

import mambactl
from mambactl.decode.prefix_files import PrefixFolder
from mambactl.errors import OutputError, UsageError

WORDS = " ".join(["the old house saw a red door and a new river"] * 8)
NEW = ("--max-new-tokens", "6", "--device", "cpu")


def given(text: str) -> tuple[int, int]:
    """Tokens from files, and of all prompts, as a log says them."""
    found = re.search(r"([\d,]+) of ([\d,]+) prompt tokens from (\S+)", text)
    assert found[3].rstrip(",") == "kept"
    return tuple(int(number.replace(",", "")) for number in found.groups()[:2])


def test_the_text_stays_and_the_log_counts(cli, tiny_llama_dir, tmp_path) -> None:
    model = str(tiny_llama_dir)
    plain = cli("generate", model, "-p", WORDS, *NEW)
    assert "prompt tokens from" not in plain.err
    kept = ("--prefix-cache", "kept", "--json")
    results = [cli("generate", model, "-p", WORDS, *NEW, *kept) for _ in range(2)]
    assert [json.loads(each.out)["metrics"]["texts"] for each in results] == [
        [plain.out.removesuffix("\n")]
    ] * 2
    (none, whole), (most, again) = (given(each.err) for each in results)
    assert (none, most, again) == (0, whole - 1, whole)
    assert json.loads(results[1].out)["metrics"]["prompt_from_files"] == most
    (file,) = (tmp_path / "kept").iterdir()
    # it holds what was asked
    assert file.stat().st_mode & 0o077 == 0


def test_answers_to_a_data_set(cli, tiny_llama_dir, tmp_path) -> None:
    rows = [{"prompt": f"{WORDS} {end}"} for end in ("king", "queen", "bird", "tree")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("generate", str(tiny_llama_dir), "--dataset", "p.jsonl", "--keep-unfinished", *NEW)
    answers = []
    for out, batch in (("plain", "2"), ("one", "2"), ("two", "1")):
        kept = () if out == "plain" else ("--prefix-cache", "kept")
        done = cli(*words, "--batch-size", batch, *kept, "-o", f"{out}.jsonl")
        assert done.code == 0, done.err
        rows = [json.loads(line) for line in (tmp_path / f"{out}.jsonl").open()]
        answers.append([row["messages"] for row in rows])
    assert answers[0] == answers[1] == answers[2]
    found, whole = given(done.err)
    assert 0.8 * whole < found < whole
    record = json.loads((tmp_path / "two.jsonl.mambactl.json").read_text())
    assert record["metrics"]["prompt_from_files"] == found
    # where beginnings come from is no part of what is made
    again = cli(*words, "--batch-size", "1", "-o", "two.jsonl", "--resume")
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--prefix-cache", "file/kept"), 5, "cannot write file/kept: Not a directory"),
        (("--prefix-cache", "file"), 5, "cannot write file: File exists"),
        (("--prefix-cache", "/proc/kept"), 5, "cannot write /proc/kept: "),
        (("--prefix-cache", ""), 2, "prefix-cache: string should have at least 1 character"),
        (("--prefix-cache-gb", "2", "--dry-run"), 2, "--prefix-cache-gb goes with --prefix-cache"),
        (("--prefix-cache-gb", "2"), 2, "--prefix-cache-gb goes with --prefix-cache"),
        (
            ("--prefix-cache", "x", "--prefix-cache-gb", "nan"),
            2,
            "prefix-cache-gb: input should",
        ),
        (("--prefix-cache", "x", "--prefix-cache-gb", "0"), 2, "prefix-cache-gb: input should"),
    ],
)
def test_what_is_refused(cli, tiny_llama_dir, tmp_path, options, code, sentence) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": WORDS}))
    for more in (("-p", WORDS), ("--dataset", "p.jsonl", "-o", "out.jsonl")):
        done = cli("generate", str(tiny_llama_dir), *more, *NEW, *options)
        assert (done.code, done.out) == (code, "")
        assert sentence in done.err and "hint: " in done.err and "Traceback" not in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "p.jsonl"]


def test_from_python(tiny_llama_dir, tmp_path) -> None:
    model = mambactl.load(tiny_llama_dir, device="cpu")
    params = mambactl.SamplingParams(max_new_tokens=6)
    texts = [mambactl.generate(model, WORDS, params)[0].text]
    for each in (model, tiny_llama_dir):
        (found,) = mambactl.generate(each, WORDS, params, prefix_cache=tmp_path / "kept")
        texts.append(found.text)
    assert found.stats.prompt_from_files == found.stats.prompt_tokens - 1
    texts.append("".join(mambactl.stream(model, WORDS, params, prefix_cache=tmp_path / "kept")))
    assert len(set(texts)) == 1
    Path(tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        mambactl.generate(model, WORDS, params, prefix_cache=tmp_path / "file")
    with pytest.raises(UsageError, match="should match pattern"):
        mambactl.generate(model, WORDS, params, prefix_cache="a\0b")
    with pytest.raises(UsageError, match="goes with"):
        mambactl.stream(model, WORDS, params, prefix_cache_gb=3)


def test_a_folder_that_is_read_only_is_read(cli, tiny_llama_dir, tmp_path, monkeypatch) -> None:
    line = ("generate", str(tiny_llama_dir), *NEW, "--prefix-cache", "kept", "-p")
    texts = [cli(*line, WORDS).out]
    kept = sorted((tmp_path / "kept").iterdir())
    monkeypatch.setattr(PrefixFolder, "writable", False)
    for words in (WORDS, f"{WORDS} and {WORDS}"):
        done = cli(*line, words)
        assert done.code == 0 and "kept is read only" in done.err
        assert " prompt tokens from kept" in done.err
        texts.append(done.out)
    assert texts[0] == texts[1] and sorted((tmp_path / "kept").iterdir()) == kept
