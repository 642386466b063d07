"""Refusals of a server with their documented status, after each of which it goes on."""

import json
import signal
import socket
import threading
import time

import httpx
import openai
import pytest
from serving.conftest import KEY, MAX_BODY, MAX_LENGTH
from serving.served import ending, events, ready, started

HEADERS = {"Authorization": f"Bearer {KEY}"}
ASKED = {"model": "scripted", "prompt": "the old", "max_tokens": 3}


@pytest.fixture
def post(narrow):
    """post(body) -> the reply of the narrow server; afterwards it still answers."""

    def send(path: str = "completions", headers=HEADERS, **given) -> httpx.Response:
        return httpx.post(f"{narrow.url}/{path}", headers=headers, timeout=60, **given)

    yield send
    assert send(json=ASKED).status_code == 200


def error_of(response: httpx.Response) -> dict:
    assert response.headers["content-type"] == "application/json"
    return response.json()["error"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer other"}, {"Authorization": KEY}])
def test_without_the_key_there_is_no_answer(post, narrow, headers) -> None:
    refused = post(json=ASKED, headers=headers)
    assert refused.status_code == 401 and error_of(refused)["code"] == "invalid_api_key"
    # what watches a server has no key
    assert httpx.get(f"{narrow.root}/health").status_code == 200
    assert httpx.get(f"{narrow.root}/metrics").status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"model": "scripted"}', b"[" * 4000, b"null"],
)
def test_bad_json_is_a_bad_request(post, body) -> None:
    refused = post(content=body)
    assert refused.status_code == 400 and error_of(refused)["message"]


@pytest.mark.parametrize(
    "fields",
    [
        rb'"prompt": "\ud800"',
        b'"prompt": "\xed\xa0\x80"',
        rb'"prompt": ["the", "\uDfff old"]',
        rb'"prompt": "the", "\ud800": 1',
        rb'"prompt": "the", "stop": "\uDC00"',
    ],
)
def test_half_of_a_surrogate_pair_is_no_text(post, fields) -> None:
    refused = post(content=rb'{"model": "scripted", ' + fields + b"}")
    assert refused.status_code == 400 and "surrogate" in error_of(refused)["message"]
    whole = rb'{"model": "scripted", "max_tokens": 1, "prompt": "the \ud83d\ude00"}'
    assert post(content=whole).status_code == 200


def test_more_prompts_than_there_is_room_for_are_a_bad_request(post) -> None:
    refused = post(json=ASKED | {"prompt": [[5]] * 400})
    assert refused.status_code == 400 and "400 prompts" in error_of(refused)["message"]
    assert "Retry-After" not in refused.headers
    assert post(json=ASKED).status_code == 200


def test_a_body_that_is_too_large(post) -> None:
    for size in (MAX_BODY + 1, 10_000_000):
        refused = post(content=b" " * size)
        assert refused.status_code == 413 and "MB" in error_of(refused)["message"]
    # in pieces, whose sum nobody announced
    refused = post(content=iter([b" " * 4000] * 3))
    assert refused.status_code == 413


def test_a_prompt_beyond_the_context(post) -> None:
    exact = {"model": "scripted", "prompt": [5] * (MAX_LENGTH - 3), "max_tokens": 3}
    assert post(json=exact).status_code == 200
    for change in ({"max_tokens": 4}, {"prompt": [5] * MAX_LENGTH}):
        refused = post(json=exact | change)
        assert refused.status_code == 400
        assert error_of(refused)["code"] == "context_length_exceeded"
        assert error_of(refused)["param"] == "prompt"
    refused = post(json={"model": "scripted", "prompt": [97]})
    assert refused.status_code == 400 and "0 to 96" in error_of(refused)["message"]


def test_unknown_paths_and_methods(post, narrow) -> None:
    missing = post("embeddings", json={})
    assert missing.status_code == 404 and "embeddings" in error_of(missing)["message"]
    wrong = httpx.get(f"{narrow.url}/completions", headers=HEADERS)
    assert wrong.status_code == 405 and error_of(wrong)["message"]


def test_sockets_that_stall_hold_nobody_up(post, narrow) -> None:
    host, port = narrow.root.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    sockets = [socket.create_connection((host, int(port))) for _ in range(6)]
    sockets[0].sendall(b"")
    sockets[1].sendall(b"POST /v1/comp")
    for each in sockets[2:]:
        each.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    assert post(json=ASKED).status_code == 200
    sockets[2].settimeout(20)
    assert b" 408 " in sockets[2].recv(4096).split(b"\r\n")[0]
    for each in sockets:
        each.close()


def test_more_requests_than_may_wait(post, narrow) -> None:
    """Two rows are taken, one request waits, and of those that come meanwhile some are refused."""
    statuses = []

    def ask() -> None:
        asked = ASKED | {"max_tokens": 70, "n": 2}
        statuses.append(post(json=asked).status_code)

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}


def test_clients_leave_and_a_signal_lets_running_answers_end(scripted, tmp_path) -> None:
    options = ("--name", "scripted", "--max-length", "4096")
    process = started(scripted, tmp_path / "log", *options)
    with ending(process):
        served = ready(process, tmp_path / "log")
        client = openai.OpenAI(base_url=served.url, api_key="any", max_retries=0)
        done = client.completions.create(model="scripted", prompt="the", max_tokens=3)
        assert done.choices[0].text.split() == ["the"] * 3
        asked = {"model": "scripted", "prompt": "the", "max_tokens": 4000, "stream": True}
        with httpx.stream("POST", f"{served.url}/completions", json=asked) as response:
            next(events(response))
        assert served.eventually("mambactl_rows_running", 0)
        # so does one that waits for a whole answer
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/completions", json=asked | {"stream": False}, timeout=0.3)
        assert served.eventually("mambactl_rows_running", 0)
        assert served.metric("mambactl_tokens_total") < 4000
        asked |= {"max_tokens": 500}
        with httpx.stream("POST", f"{served.url}/completions", json=asked, timeout=60) as response:
            found = events(response)
            text = next(found)["choices"][0]["text"]
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):
                for _ in range(200):
                    httpx.get(f"{served.root}/health")
                    time.sleep(0.01)
            text += "".join(event["choices"][0]["text"] for event in found)
        assert text.count("the") == 500
        # an end that was asked for is no error
        assert process.wait(60) == 0
        assert "SIGTERM ended the server" in (tmp_path / "log").read_text()
        assert "Traceback" not in (tmp_path / "log").read_text()
        # the URL is all that stdout has
        assert process.stdout.read() == ""


def test_answers_end_with_an_error_when_the_grace_is_over(scripted, tmp_path) -> None:
    options = ("--name", "scripted", "--max-length", "8192", "--grace", "0.2")
    process = started(scripted, tmp_path / "log", *options)
    with ending(process):
        served = ready(process, tmp_path / "log")
        asked = {"model": "scripted", "prompt": "the", "max_tokens": 8000, "stream": True}
        with httpx.stream("POST", f"{served.url}/completions", json=asked, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            *texts, last = filter(None, lines)
        error = json.loads(last.removeprefix("data: "))["error"]
        assert len(texts) < 8000 and error["message"] == "the server is ending"
        assert process.wait(60) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
