"""`chat`: an answer for every line of stdin, and a conversation in a terminal."""

import json

import pytest

from mambactl.commands.chat import one_line

SHORT = ("--max-new-tokens", "6", "--device", "cpu")


@pytest.fixture(scope="module")
def student(save_student, tmp_path_factory) -> str:
    return str(save_student(tmp_path_factory.mktemp("student") / "t.st"))


def test_every_line_has_one_answer(cli, student) -> None:
    lines = "the old house\n\nred door\n/stats\n"
    done = cli("chat", student, *SHORT, stdin=lines)
    assert done.code == 0 and len(done.out.splitlines()) == 2
    assert "last answer" in done.err and "tokens/s" in done.err
    # MODEL may come first of all
    assert cli("chat", "-", *SHORT, stdin=f"{student}\n{lines}").out == done.out
    whole = json.loads(cli("chat", student, *SHORT, "--json", stdin=lines).out)
    assert whole["metrics"]["answers"] == done.out.splitlines()
    assert [m["role"] for m in whole["metrics"]["messages"]] == ["user", "assistant"] * 2
    assert whole["metrics"]["cache_bytes"] > 0 and "text" not in whole


def test_what_cannot_be_answered_ends_it(cli, student) -> None:
    assert cli("chat", student, *SHORT, stdin="\n").code == 2
    done = cli("chat", student, *SHORT, stdin="red door\n/rest\nred door\n")
    assert done.code == 2 and len(done.out.splitlines()) == 1
    assert "hint: did you mean /reset?" in done.err
    done = cli("chat", student, "--system", " ", stdin="hi\n")
    assert done.code == 2 and "the system message is empty" in done.err


def test_a_plan_names_the_models(cli, student) -> None:
    plan = json.loads(cli("chat", student, "--dry-run", "--json", "--draft", "ngram").out)
    assert plan["draft"] == "ngram" and plan["new_tokens_at_most"] == 1024


@pytest.mark.parametrize("text", ["a\nb", "a\\nb", "\\\r\n", "plain"])
def test_a_line_can_be_undone(text) -> None:
    line = one_line(text)
    assert "\n" not in line and line.encode().decode("unicode_escape") == text
