"""`generate` for a person: the prompt as a word, text as it comes, options by other names."""

import pytest

from mambactl.cli.parameters import parameters_of
from mambactl.cli.spellings import SPELLINGS
from mambactl.commands import COMMANDS

SHORT = ("--max-new-tokens", "6", "--device", "cpu")


@pytest.fixture(scope="module")
def student(save_student, tmp_path_factory) -> str:
    return str(save_student(tmp_path_factory.mktemp("student") / "t.st"))


def test_the_prompt_may_stand_behind_the_model(cli, student) -> None:
    named = cli("generate", student, "-p", "the old house", *SHORT)
    assert cli("generate", student, "the old house", *SHORT).out == named.out
    assert cli("generate", student, "-", *SHORT, stdin="the old house").out == named.out
    assert cli("generate", "-", "the old house", *SHORT, stdin=student + "\n").out == named.out
    both = cli("generate", student, "the door", "-p", "the old house")
    assert both.code == 2 and "PROMPT and --prompt are the same thing" in both.err


@pytest.mark.parametrize("draft", [(), ("--draft", "ngram", "-k", "2")])
def test_a_terminal_sees_tokens_as_they_come(cli, on_terminal, student, tmp_path, draft) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the old house\nred door\n")
    words = ("generate", student, "--prompts", str(prompts), *SHORT, *draft)
    whole = cli(*words).out
    code, pieces = on_terminal(*words)
    assert code == 0 and "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 4
    # where texts alternate, and where one object is asked for, they come at the end
    for others in (("--batch-size", "2"), ("--json",)):
        code, pieces = on_terminal(*words, *others)
        assert code == 0 and len(pieces) == 1
        assert pieces[0] == cli(*words, *others).out or "--json" in others


def test_other_spellings_lead_to_options_that_there_are() -> None:
    """Every row is for a command that has no such option but one of those that it stands for."""
    flags = {
        name: {f"--{each.replace('_', '-')}" for each in parameters_of(command)}
        for name, command in COMMANDS.items()
    }
    for typed, known in SPELLINGS.items():
        for right in known:
            assert any(right in own and typed not in own for own in flags.values()), (typed, right)


def test_an_unknown_option_is_answered_with_the_right_one(cli) -> None:
    done = cli("generate", "t.st", "hi", "--max-tokens", "5")
    assert done.code == 2 and "hint: did you mean --max-new-tokens?" in done.err
    done = cli("convert", "t.st", "--output=x.st")
    assert done.code == 2 and "hint: did you mean --out?" in done.err
    # the right one is not an option of this command
    assert "did you mean" not in cli("inspect", "t.st", "--max-tokens", "5").err
