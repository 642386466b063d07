"""`mambactl table`: files in, Markdown out or into a document between its two marks."""

import json

import pytest


@pytest.fixture
def measured(tmp_path) -> str:
    point = {"model": "tiny", "input_len": 8, "batch_size": 1, "decode_tokens_per_second": 7.0}
    metrics = {"device": "cpu", "points": [point], "config": {"draft": None}}
    (tmp_path / "b.json").write_text(json.dumps({"stage": "bench", "metrics": metrics}))
    return "b.json"


def test_the_table_is_printed(cli, measured) -> None:
    done = cli("table", measured, measured)
    assert done.code == 0
    assert done.out.count("| tiny |") == 2 and done.out.endswith("Measured on cpu.\n")


def test_only_what_is_between_the_marks_changes(cli, measured, tmp_path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# a\n<!-- bench -->\nold\n<!-- /bench -->\nb\n")
    for _ in range(2):
        assert cli("table", measured, "--into", "README.md").out == "README.md\n"
        text = readme.read_text()
        assert text.startswith("# a\n<!-- bench -->\n| model |")
        assert text.endswith("Measured on cpu.\n<!-- /bench -->\nb\n") and "old" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "b.json"]


@pytest.mark.parametrize("text", ["", "<!-- bench -->", "<!-- /bench --> <!-- bench -->"])
def test_a_document_without_both_marks_is_left_alone(cli, measured, tmp_path, text) -> None:
    (tmp_path / "README.md").write_text(text)
    done = cli("table", measured, "--into", "README.md")
    assert (done.code, done.out) == (2, "")
    assert "no place for the table" in done.err and "<!-- /bench -->" in done.err
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "x.json cannot be used (No such file"),
        (b"{", "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", "no measured point"),
        (b"\xff\xfe", "is not valid JSON"),
    ],
)
def test_files_that_are_no_results(cli, tmp_path, content, sentence) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    done = cli("table", "x.json")
    assert done.code == 2 and sentence in done.err


def test_what_bench_prints_is_what_table_reads(cli, tmp_path) -> None:
    shape = ("--synthetic", "tiny", "--input-len", "4", "--output-len", "4", "--device", "cpu")
    assert cli("bench", *shape).out == "tiny\n"
    done = cli("bench", *shape, "--json")
    assert done.code == 0 and json.loads(done.out)["checkpoint"] is None
    (tmp_path / "b.json").write_text(done.out)
    assert "| tiny |" in cli("table", "b.json").out
