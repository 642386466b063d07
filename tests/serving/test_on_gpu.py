"""The server on a GPU: the text of `generate` there, for requests that come together."""

import threading

import httpx
import pytest
import torch

import mambactl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ("the old house", "she said", "the river and the sea", "a")


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_answers_are_those_of_generate(student, draft) -> None:
    """Greedy, in float32; `cuda` is a device without a number."""
    drafting = {} if draft is None else {"draft": draft, "k": 2}
    found: dict[str, str] = {}
    place = {"device": "cuda", "dtype": "float32"}
    with mambactl.serve(student, port=0, batch_size=4, max_length=128, **place, **drafting) as one:

        def ask(prompt: str) -> None:
            body = {"model": "student", "prompt": prompt, "max_tokens": 12, "temperature": 0}
            reply = httpx.post(f"{one.url}/completions", json=body, timeout=60)
            found[prompt] = reply.raise_for_status().json()["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    model = mambactl.load(student, **place)
    params = mambactl.SamplingParams(max_new_tokens=12)
    expected = {
        prompt: mambactl.generate(model, prompt, params, chat=False)[0].text for prompt in PROMPTS
    }
    assert found == expected
