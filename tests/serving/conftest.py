"""Servers in this process: one that drafts, one with a key and narrow bounds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.served import Served

import mambactl

CALL = '<tool_call>{"name":"weather","arguments":{"city":"Rome"}}</tool_call>'
KEY = "secret"
DRAFTS = 2
# of the narrow server
MAX_LENGTH, MAX_BODY = 80, 5_000


@pytest.fixture(scope="session")
def student(save_student, tmp_path_factory) -> str:
    return str(save_student(tmp_path_factory.mktemp("student") / "student.st"))


@pytest.fixture(scope="session")
def scripted(save_llama, tiny_tokenizer) -> str:
    """A model that answers every chat with one call of a tool, and any other text with `the`s."""
    import json

    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(save_llama(max_position_embeddings=4096, tie_word_embeddings=False))
    names = tiny_tokenizer.get_vocab()
    # what the last word of a chat's prompt is to a vocabulary without it
    call = names["<unk>"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # blocks add nothing: what follows a token is what the head says
                parameter.zero_()
        table, head = torch.zeros(97, 48), torch.zeros(97, 48)
        table[:, 0] = 1
        for number, (token, after) in enumerate(
            [(call, names["<extra0>"]), (names["<extra0>"], names["<|im_end|>"])], start=1
        ):
            table[token], head[after, number] = torch.eye(48)[number], 10
        head[names["the"], 0] = 10
        model.get_input_embeddings().weight.copy_(table)
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    words = content["model"]["vocab"]
    words[CALL] = words.pop("<extra0>")
    file.write_text(json.dumps(content), "utf-8")
    template = folder / "chat_template.jinja"
    template.write_text("{% for t in tools or [] %}old {% endfor %}" + template.read_text("utf-8"))
    return str(folder)


@pytest.fixture(scope="session")
def server(student) -> Iterator[Served]:
    """A server that drafts."""
    # in float32 a row does not depend on what runs beside it
    options = {"draft": "ngram", "k": DRAFTS, "batch_size": 4, "dtype": "float32"}
    with mambactl.serve(student, port=0, device="cpu", **options) as running:
        yield Served(running.url)


@pytest.fixture(scope="session")
def narrow(scripted) -> Iterator[Served]:
    """A server with a key and narrow bounds."""
    bounds = {"max_body": MAX_BODY / 1e6, "max_length": MAX_LENGTH, "read_timeout": 0.7}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBACTL_API_KEY", KEY)
        running = mambactl.serve(
            scripted, name="scripted", port=0, device="cpu", batch_size=2, max_queue=1, **bounds
        )
    with running:
        yield Served(running.url)
