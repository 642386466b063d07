"""Many requests at once: each gets the text that `generate` gives for the same seed."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving.conftest import DRAFTS
from serving.served import Served

import mambactl
from mambactl.decode.backend import make_engine
from mambactl.decode.sampler import SamplingParams
from mambactl.generation.decoding import end_tokens


def requests_of(count: int, most: int) -> list[dict]:
    """Requests with prompts of 2 to 120 tokens, some of which begin alike."""
    draw = random.Random(count)
    shared = [draw.randrange(4, 90) for _ in range(70)]
    found = []
    for number in range(count):
        own = [draw.randrange(4, 90) for _ in range(draw.randint(2, 50))]
        found.append(
            {
                "model": "student",
                "prompt": shared + own if number % 3 == 0 else own,
                "max_tokens": draw.randint(1, most),
                "temperature": draw.choice([0, 0, 0.8, 1.1]),
                "top_p": draw.choice([1, 0.9]),
                "seed": draw.randint(0, 2**60),
                "stream": number % 2 == 0,
            }
        )
    return found


def answered(url: str, request: dict) -> str:
    response = httpx.post(f"{url}/completions", json=request, timeout=600)
    assert response.status_code == 200, response.text
    if not request["stream"]:
        return response.json()["choices"][0]["text"]
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def check(served: Served, student: str, requests: list[dict], at_once: int) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        texts = list(pool.map(lambda request: answered(served.url, request), requests))
    model = mambactl.load(student, device="cpu", dtype="float32")
    engine = make_engine(model.model, "ngram", DRAFTS)
    for request, text in zip(requests, texts, strict=True):
        params = SamplingParams(
            temperature=request["temperature"], top_p=request["top_p"], seed=request["seed"],
            max_new_tokens=request["max_tokens"],
            eos_token_ids=end_tokens(model.model, model.tokenizer),
        )  # fmt: skip
        tokens = engine.generate([request["prompt"]], params).tokens[0]
        assert text == model.tokenizer.decode(tokens, skip_special_tokens=True)
    assert served.eventually("mambactl_rows_running", 0)


def test_texts_do_not_depend_on_what_runs_beside(server, student) -> None:
    check(server, student, requests_of(16, 10), at_once=12)


@pytest.mark.slow
def test_200_requests_32_at_a_time(server, student) -> None:
    check(server, student, requests_of(200, 60), at_once=32)
