"""Clients of the OpenAI API against a running server: the `openai` package, and curl."""

import json
import shutil
import subprocess

import httpx
import openai
import pytest
from serving.conftest import DRAFTS, KEY
from serving.served import events

import mambactl

MESSAGES = [{"role": "user", "content": "the old house"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def tools(narrow):
    return openai.OpenAI(base_url=narrow.url, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def model(student):
    return mambactl.load(student, device="cpu", dtype="float32")


def said(model, tokens: int, prompt: str = "the old house", chat: bool = True, **how) -> str:
    """Return the text of `generate` for the same prompt."""
    draft = {"draft": "ngram", "k": DRAFTS} if how.get("temperature") else {}
    params = mambactl.SamplingParams(max_new_tokens=tokens, **how)
    return mambactl.generate(model, prompt, params, chat=chat, **draft)[0].text


def test_a_chat_is_answered_as_generate_does(client, model) -> None:
    asked = {"model": "student", "messages": MESSAGES}
    done = client.chat.completions.create(**asked, max_tokens=12, temperature=0)
    assert done.choices[0].message.content == said(model, 12)
    assert done.choices[0].finish_reason in ("stop", "length")
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    drawn = client.chat.completions.create(
        **asked, max_completion_tokens=12, temperature=0.9, top_p=0.8, seed=2**32 - 7
    )
    expected = said(model, 12, temperature=0.9, top_p=0.8, seed=2**32 - 7)
    assert drawn.choices[0].message.content == expected


def test_a_stream_is_the_same_in_pieces_and_ends_with_usage(client, model) -> None:
    pieces = list(
        client.chat.completions.create(
            model="student", messages=MESSAGES, max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *parts, last = pieces
    assert "".join(part.choices[0].delta.content or "" for part in parts) == said(model, 12)
    assert parts[0].choices[0].delta.role == "assistant" and len(parts) > 2
    assert parts[-1].choices[0].finish_reason is not None
    assert last.choices == [] and last.usage.completion_tokens == 12


def test_several_prompts_and_choices_of_a_completion(client, model) -> None:
    done = client.completions.create(
        model="student", prompt=["the old", "red door"], max_tokens=6, n=2, temperature=0.8, seed=3
    )
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in done.choices}) == 4
    assert done.choices[0].text == said(model, 6, "the old", False, temperature=0.8, seed=3)
    ids = model.tokenizer("the old")["input_ids"]
    greedy = {"model": "student", "max_tokens": 6, "temperature": 0}
    texts = [
        client.completions.create(prompt=p, **greedy).choices[0].text for p in ("the old", ids)
    ]
    assert texts == [said(model, 6, "the old", False)] * 2


def test_how_likely_tokens_were(client) -> None:
    asked = {"model": "student", "max_tokens": 5, "temperature": 0}
    done = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=3, **asked
    ).choices[0]
    content = done.logprobs.content
    assert len(content) == 5 and all(len(each.top_logprobs) == 3 for each in content)
    for each in content:
        # greedy: the token is the most likely one
        assert each.top_logprobs[0].token == each.token and each.logprob <= 0
        assert each.top_logprobs[0].logprob >= each.top_logprobs[1].logprob
    streamed = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, stream=True, **asked
    )
    tokens = [
        entry.token
        for part in streamed
        for entry in (part.choices[0].logprobs.content if part.choices[0].logprobs else [])
    ]
    assert tokens == [each.token for each in content]
    text = client.completions.create(prompt="the old", logprobs=2, **asked).choices[0]
    assert len(text.logprobs.tokens) == len(text.logprobs.token_logprobs) == 5
    assert all(2 <= len(each) <= 3 for each in text.logprobs.top_logprobs)


def test_a_stop_text_ends_an_answer_in_front_of_it(client, model) -> None:
    whole = said(model, 30, "the old", False)
    stop = whole.split()[4]
    expected = whole[: whole.index(stop)]
    asked = {"model": "student", "prompt": "the old", "max_tokens": 30, "temperature": 0}
    done = client.completions.create(stop=stop, **asked)
    assert (done.choices[0].text, done.choices[0].finish_reason) == (expected, "stop")
    assert done.usage.completion_tokens <= 6
    parts = client.completions.create(stop=["never there", stop], stream=True, **asked)
    assert "".join(part.choices[0].text for part in parts) == expected


def test_a_tool_is_called(tools) -> None:
    asked = {"model": "scripted", "messages": MESSAGES, "max_tokens": 9, "temperature": 0}
    done = tools.chat.completions.create(tools=[WEATHER], **asked)
    choice = done.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    call = choice.message.tool_calls[0].function
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
    # the template shows the tools, but not where none may be called
    plain = tools.chat.completions.create(tools=[WEATHER], tool_choice="none", **asked)
    assert done.usage.prompt_tokens == plain.usage.prompt_tokens + 1
    assert plain.choices[0].finish_reason == "stop" and "Rome" in plain.choices[0].message.content
    named = {"type": "function", "function": {"name": "weather"}}
    *parts, last = tools.chat.completions.create(
        tools=[WEATHER], tool_choice=named, stream=True, **asked
    )
    assert last.choices[0].finish_reason == "tool_calls"
    assert last.choices[0].delta.tool_calls[0].function.name == "weather"
    assert not any(part.choices[0].delta.content for part in parts)
    # the answer of the tool, as clients send it back
    turns = [
        *MESSAGES, choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "sunny"},
    ]  # fmt: skip
    tools.chat.completions.create(**{**asked, "messages": turns})


def test_models(client, server) -> None:
    assert [each.id for each in client.models.list().data] == ["student"]
    assert client.models.retrieve("student").id == "student"
    with pytest.raises(openai.NotFoundError, match="no model other"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert httpx.get(f"{server.root}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "field, named",
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 5}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"extra_body": {"stream": "yes"}}, "stream"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"seed": True}, "seed"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": "0"}, "temperature"),
        ({"n": "2"}, "n"),
    ],
)
def test_a_field_that_is_wrong_or_unknown_is_named(client, field, named) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "student", "messages": MESSAGES, **field})
    assert caught.value.param == named and caught.value.type == "invalid_request_error"
    assert named in caught.value.message or named == "n"


def test_fields_that_change_nothing_are_taken(client) -> None:
    done = client.chat.completions.create(
        model="student", messages=[{"role": "user", "content": [{"type": "text", "text": "the"}]}],
        max_tokens=1, frequency_penalty=0, presence_penalty=0, logit_bias={}, user="me",
        response_format={"type": "text"}, parallel_tool_calls=True, n=1, stop=None,
        extra_body={"top_k": 0, "anything": None},
    )  # fmt: skip
    assert done.usage.completion_tokens == 1


def test_a_conversation_reads_only_what_is_new(client, server) -> None:
    turns = [{"role": "user", "content": "the old house " * 20}]
    asked = {"model": "student", "max_tokens": 4, "temperature": 0}
    first = client.chat.completions.create(messages=turns, **asked)
    before = server.metric("mambactl_prompt_tokens_kept_total")
    turns += [first.choices[0].message.model_dump(include={"role", "content"})]
    client.chat.completions.create(messages=[*turns, *MESSAGES], **asked)
    kept = server.metric("mambactl_prompt_tokens_kept_total") - before
    assert kept == first.usage.prompt_tokens


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server, narrow) -> None:
    def curl(*words: str) -> str:
        done = subprocess.run(["curl", "-sN", *words], capture_output=True, text=True, timeout=60)
        return done.stdout

    body = json.dumps({"model": "student", "messages": MESSAGES, "max_tokens": 3, "stream": True})
    lines = [
        line for line in curl(f"{server.url}/chat/completions", "-d", body).split("\n") if line
    ]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    assert json.loads(lines[0][6:])["object"] == "chat.completion.chunk"
    refused = json.loads(curl(f"{narrow.url}/models"))
    assert refused["error"]["code"] == "invalid_api_key"
    allowed = json.loads(curl(f"{narrow.url}/models", "-H", f"Authorization: Bearer {KEY}"))
    assert allowed["data"][0]["id"] == "scripted"


def test_every_event_is_json(server) -> None:
    asked = {"model": "student", "prompt": ["the", "old"], "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{server.url}/completions", json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = list(events(response))
    assert {choice["index"] for event in found for choice in event["choices"]} == {0, 1}
