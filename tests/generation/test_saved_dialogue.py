"""A saved conversation goes on where it stood, with the model that it was held with alone."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mambactl
from mambactl.checkpoint.save import save_model
from mambactl.checkpoint.side_files import read_side_files
from mambactl.errors import ModelError, OutputError, UsageError
from mambactl.generation import saved_dialogue
from mambactl.models.key_ring import WindowSettings

SHORT = {"device": "cpu", "max_new_tokens": 7}
MIXERS = ["mamba2_mixed", "mamba2_window", "attention", "mamba1"]


@pytest.fixture(scope="module")
def model(make_hybrid, tiny_llama_dir, tmp_path_factory) -> str:
    """Layers with keys of every token, rings, and states of both kinds."""
    made = make_hybrid(MIXERS, seed=3, mamba2_window=WindowSettings(window=9, sinks=3))
    out = tmp_path_factory.mktemp("model") / "t.st"
    return str(save_model(made, out, read_side_files(tiny_llama_dir), None))


@pytest.mark.parametrize("draft", [{}, {"draft": "ngram", "k": 3}], ids=["plain", "drafts"])
def test_it_goes_on_as_if_it_had_not_been_saved(model, tmp_path, draft) -> None:
    file = str(tmp_path / "kept.safetensors")
    with mambactl.chat(model, **SHORT, **draft, system="the king") as chat:
        with pytest.raises(UsageError, match="nothing was said"):
            saved_dialogue.save(chat, file)
        chat.say("the old house")
        chat.say("red door and a small bird")
        # read on from where drafts could be taken back
        last = chat.conversation.points[-1].tokens
        chat.conversation.of([[*last, 5, 6]])
        saved_dialogue.save(chat, file)
        with mambactl.chat(model, **SHORT) as other:
            saved_dialogue.load(other, file)
            (point,) = other.conversation.points
            more = [[*point.tokens, 7, 8]]
            again = other.engine.generate(more, other.setup.params)
            assert again.tokens == chat.setup.engine().generate(more, chat.setup.params).tokens
            assert again.stats.prompt_shared == len(last) + 1
        chat.conversation.points.pop()
        saved_dialogue.save(chat, file)
        expected, messages = chat.say("a night").text, chat.messages
    with mambactl.chat(model, **SHORT, **draft) as other:
        saved_dialogue.load(other, file)
        held = len(other.conversation.points[0].tokens)
        answer = other.say("a night")
        assert answer.text == expected and other.messages == messages
        assert answer.stats.prompt_shared == held > 20
        # a second conversation takes the place of the first
        saved_dialogue.save(other, file)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.safetensors"]


def test_what_is_refused(model, save_student, tmp_path) -> None:
    file = tmp_path / "kept.safetensors"
    with mambactl.chat(model, **SHORT) as chat:
        chat.say("the old house")
        saved_dialogue.save(chat, str(file))
        before = [*chat.messages], [*chat.conversation.points]
        with pytest.raises(OutputError, match="no saved conversation"):
            saved_dialogue.save(chat, model)
        tensors = load_file(file)
        with safe_open(file, "pt") as held:
            header = held.metadata()
        state = "1.0"
        damaged = {
            "another number": ({**tensors, state: tensors[state] + 1}, {}),
            "another message": (tensors, {"messages": json.dumps(before[0][:1])}),
            "no messages": (tensors, {"messages": "[["}),
            "wrong messages": (tensors, {"messages": '[{"role": 1, "content": "a"}]'}),
            "one too few": ({k: v for k, v in tensors.items() if k != state}, {}),
            "another type": ({**tensors, state: tensors[state].double()}, {}),
            "other tokens": ({**tensors, "ids": tensors["ids"][:-1].clone()}, {}),
            "no tokens": ({**tensors, "ids": tensors["ids"][:0].clone()}, {}),
            "another kind": (tensors, {"format": "x"}),
        }
        bad = tmp_path / "bad.safetensors"
        for what, (content, words) in damaged.items():
            save_file(content, bad, {**header, **words})
            with pytest.raises(ModelError, match="bad.safetensors cannot be used"):
                saved_dialogue.load(chat, str(bad))
                pytest.fail(what)
        for size in (0, 5, 200, file.stat().st_size - 1):
            bad.write_bytes(file.read_bytes()[:size])
            with pytest.raises(ModelError):
                saved_dialogue.load(chat, str(bad))
        with pytest.raises(ModelError, match="no file"):
            saved_dialogue.load(chat, str(tmp_path))
        assert (chat.messages, chat.conversation.points) == before
        saved_dialogue.load(chat, str(file))
        assert torch.equal(torch.tensor(chat.conversation.points[0].tokens), tensors["ids"])
    other = mambactl.chat(str(save_student(tmp_path / "t.st")), **SHORT)
    with other, pytest.raises(ModelError, match="another model"):
        saved_dialogue.load(other, str(file))
