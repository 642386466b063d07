"""Subjects that are measured in no time."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def scripted() -> Callable:
    """scripted(name, acceptance=0.7, draft="tiny-draft") -> a Subject and a draft for it."""

    def make(name: str, acceptance: float = 0.7, draft: str = "tiny-draft"):
        import torch

        from mambactl.measure.subject import Subject
        from mambactl.measure.synthetic import build, disagreeing, successors

        successor = successors(512)
        other = disagreeing(successor, 1 - acceptance)
        model = build(name, "cpu", torch.float32, 0, successor)
        helper = build(draft, "cpu", torch.float32, 1, other)
        return Subject(model, name, 1e9, successor), helper

    return make


@pytest.fixture(scope="module")
def llama(tiny_llama_dir):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_llama_dir).eval()


@pytest.fixture(scope="module")
def same_as_llama(llama, make_hybrid):
    model = make_hybrid(["attention"] * 4, tie_word_embeddings=True)
    model.load_state_dict(llama.state_dict())
    return model
