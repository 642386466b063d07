"""A conversation says what `generate` says to the same messages, and reads every token once."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

import mambactl
from mambactl.errors import UsageError
from mambactl.generation.decoding import Setup
from mambactl.generation.slash_commands import SLASH_COMMANDS, obeyed

SAID = ("the old house", "red door", "a small bird saw the king")
SHORT = {"device": "cpu", "max_new_tokens": 7}


@pytest.fixture(scope="module")
def student(save_student, tmp_path_factory) -> str:
    folder = save_student(tmp_path_factory.mktemp("student") / "t")
    return words_alone(folder)


def words_alone(folder: Path) -> str:
    """The model with a tokenizer that reads every text that it writes as the same tokens."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    file.write_text(json.dumps(content), "utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def rewriting(tiny_llama_dir, tmp_path_factory) -> str:
    """A model whose template leaves all but the last answer out of what it renders."""
    folder = tmp_path_factory.mktemp("rewriting") / "llama"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role != 'assistant' or loop.revindex < 3 %}<|im_start|> "
        "{{ m.role }} {{ m.content }} <|im_end|> {% endif %}{% endfor %}<|im_start|> assistant "
    )
    return words_alone(folder)


def fresh(cli, model: str, messages: list, tmp_path, *flags: str) -> str:
    """The text of `generate` for the messages up to the last of the user."""
    file = tmp_path / "messages.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    words = ["--prompts", str(file), "--device", "cpu", "--max-new-tokens", "7", "--json", *flags]
    return json.loads(cli("generate", model, *words).out)["metrics"]["texts"][0]


@pytest.mark.parametrize(
    "flags",
    [{}, {"draft": "ngram", "k": 2}, {"temperature": 0.8, "seed": 3}, {"system": "the queen"}],
    ids=lambda flags: " ".join(flags) or "greedy",
)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_answers_are_those_of_generate(cli, student, tmp_path, flags, kernels, monkeypatch) -> None:
    """The reference reads no token twice, the engine of whole steps the last answer."""
    monkeypatch.setenv("MAMBACTL_KERNELS", kernels)
    words = [w for k, v in flags.items() if k != "system" for w in (f"--{k}", str(v))]
    with mambactl.chat(student, **SHORT, **flags) as chat:
        for text in SAID:
            pieces: list[str] = []
            answer = chat.say(text, pieces.append)
            assert "".join(pieces) == answer.text == chat.messages[-1]["content"]
            assert answer.text == fresh(cli, student, chat.messages[:-1], tmp_path, *words)
        tokenizer = chat.setup.tokenizer
    extended = 0
    for before, answer in pairwise(chat.answers):
        # special tokens are in no text
        same = tokenizer(before.text)["input_ids"] == list(before.tokens)
        assert (answer.parted is None) == (same or kernels == "auto")
        extended += same
        # words of one message and its frame, not what was said before
        read = answer.stats.prompt_tokens - answer.stats.prompt_shared
        most = 14 if kernels == "reference" else 14 + SHORT["max_new_tokens"]
        assert not same or read <= most < answer.stats.prompt_tokens
    assert extended


def test_a_template_that_rewrites_is_read_again_from_what_is_the_same(
    cli, rewriting, tmp_path
) -> None:
    with mambactl.chat(rewriting, **SHORT) as chat:
        for text in SAID:
            answer = chat.say(text)
            assert answer.text == fresh(cli, rewriting, chat.messages[:-1], tmp_path)
        assert [each.parted is None for each in chat.answers] == [True, True, False]
        said = chat.describe()
    assert f"after token {answer.parted}" in said and "read again: 1" in said
    assert 0 < answer.stats.prompt_shared < answer.parted


def test_what_is_stopped_stays_and_an_unanswered_message_does_not(student, monkeypatch) -> None:
    with mambactl.chat(student, **SHORT) as chat:
        answer = chat.say("the old house", stopped=lambda: True)
        assert answer.finish == "stop" and len(answer.tokens) == 1
        kept = [*chat.messages]
        assert len(kept) == (2 if answer.text else 0)
        chat.renderer.tokenizer.chat_template = "{{ raise_exception('no') }}"
        chat.close()
        with pytest.raises(UsageError, match="refuses"):
            chat.say("red door")
        with pytest.raises(UsageError, match="empty"):
            chat.say(" ")
        assert chat.messages == kept
    monkeypatch.setattr(Setup, "text", lambda self, tokens: "")
    with mambactl.chat(student, **SHORT) as chat:
        assert chat.say("the old house", stopped=lambda: True).text == "" and chat.messages == []
        chat.say("the old house")
        assert [each["content"] for each in chat.messages] == ["the old house", ""]


def test_slash_commands(student) -> None:
    with mambactl.chat(student, **SHORT, system="the king") as chat:
        assert obeyed(chat, "/stats") == "nothing was said yet"
        first = chat.say("the old house").text
        assert "answers (1)" in obeyed(chat, "/stats") and " bytes" in obeyed(chat, "/stats")
        assert obeyed(chat, "/system") == "system: the king"
        obeyed(chat, "/system a queen ")
        assert [each["role"] for each in chat.messages] == ["system", "user", "assistant"]
        assert chat.system == "a queen"
        obeyed(chat, "/system the king")
        obeyed(chat, "/reset")
        assert chat.messages == [{"role": "system", "content": "the king"}]
        assert chat.conversation.points == [] and chat.say("the old house").text == first
        assert all(f"/{name}" in obeyed(chat, "/help") for name in SLASH_COMMANDS)
        assert obeyed(chat, "/etc/hosts is a file") is obeyed(chat, " /stats") is None
        with pytest.raises(UsageError, match="no /stat") as error:
            obeyed(chat, "/stat")
        assert error.value.hint == "did you mean /stats?"
        with pytest.raises(UsageError, match="no /RESET") as error:
            obeyed(chat, "/RESET")
        assert error.value.hint == "did you mean /reset?"
        with pytest.raises(UsageError, match="no argument"):
            obeyed(chat, "/reset all")
