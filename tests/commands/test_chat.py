"""`chat`: an answer for every line of stdin, and a conversation in a terminal."""

import json
import signal

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input

import mambactl
from mambactl.commands import chat as command
from mambactl.commands.chat import one_line
from mambactl.generation.chat_terminal import stoppable

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


def test_a_wrong_command_does_not_end_it(cli, student) -> None:
    """The lines behind it are answered as without it, and the exit code tells of it."""
    plain = cli("chat", student, *SHORT, stdin="red door\nred door\n")
    lines = "/rest\nred door\n/stats now\nred door\n"
    done = cli("chat", student, *SHORT, stdin=lines)
    assert (done.code, done.out) == (2, plain.out) and len(done.out.splitlines()) == 2
    assert "error: line 1 of stdin: there is no /rest (did you mean /reset?)" in done.err
    assert "error: line 3 of stdin: /stats takes no argument" in done.err
    assert done.err.count("forget what was said") == 1
    assert "error: wrong command in lines 1, 3 of stdin" in done.err
    whole = cli("chat", student, *SHORT, "--json", stdin=lines)
    assert (whole.code, whole.out) == (2, "")
    assert json.loads(whole.err.splitlines()[-1])["answers"] == done.out.splitlines()


def test_what_cannot_be_answered_ends_it(cli, student) -> None:
    assert cli("chat", student, *SHORT, stdin="\n").code == 2
    done = cli("chat", student, *SHORT, stdin="red door\n/load nosuch.st\nred door\n")
    assert done.code == 3 and "line 2 of stdin: nosuch.st is no file" in done.err
    assert len(done.out.splitlines()) == 1
    done = cli("chat", student, *SHORT, stdin="/save\nred door\n")
    assert (done.code, done.out) == (2, "") and "line 1 of stdin: nothing was said" in done.err
    # as Python reads bytes that are no text
    done = cli("chat", student, *SHORT, stdin="caf\udce9\n")
    assert done.code == 2 and "a message on stdin is not UTF-8 text" in done.err
    done = cli("chat", student, "--system", " ", stdin="hi\n")
    assert done.code == 2 and "the system message is empty" in done.err


def test_a_plan_names_the_models(cli, student) -> None:
    plan = json.loads(cli("chat", student, "--dry-run", "--json", "--draft", "ngram").out)
    assert plan["draft"] == "ngram" and plan["new_tokens_at_most"] == 1024


def test_a_conversation_in_a_terminal(cli, student, monkeypatch) -> None:
    """Two messages, one of them in two lines, a wrong command, and keys that end a line and all."""
    monkeypatch.setattr(command, "attended", lambda: True)
    with create_pipe_input() as keys, create_app_session(input=keys):
        keys.send_text("the old house\r/nope\r /red\x1b\rdoor\r/stats\rtyped\x03/help\r\x04")
        done = cli("chat", student, *SHORT)
    assert done.code == 0
    first, second = done.out.splitlines()
    monkeypatch.setattr(command, "attended", lambda: False)
    assert cli("chat", student, *SHORT, stdin="the old house\n").out == first + "\n"
    # what was typed is answered where it is seen, and only then on stdout
    assert f"{first}\n" in done.err and f"{second}\n" in done.err
    assert "error: there is no /nope" in done.err and "answers (2)" in done.err
    assert "these lines" in done.err


def test_an_answer_is_stopped_and_the_program_is_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stoppable() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stopped_answer_says_so(student, capfd) -> None:
    with mambactl.chat(student, device="cpu", max_new_tokens=50) as chat:
        say = chat.say

        def interrupted(text, on_text, stopped):
            def heard(piece: str) -> None:
                on_text(piece)
                signal.raise_signal(signal.SIGINT)

            return say(text, heard, stopped)

        chat.say = interrupted
        with pytest.raises(KeyboardInterrupt):
            # of several pieces the second is one key too many
            command._shown(chat, "the old house")
        chat.say = lambda text, on_text, stopped: say(text, on_text, lambda: True)
        assert command._shown(chat, "the old house").finish == "stop"
    assert capfd.readouterr().err.endswith(" [stopped]\n")


@pytest.mark.parametrize("text", ["a\nb", "a\\nb", "\\\r\n", "plain"])
def test_a_line_can_be_undone(text) -> None:
    line = one_line(text)
    assert "\n" not in line and line.encode().decode("unicode_escape") == text
