"""Serving a model beside what `bench` reaches: streams at once, one stream, and the first token.

    python -m tests.performance.serving t.st --json > serving.json
    python -m tests.performance.serving t.st --draft d.st --streams 8

`bench` decodes plainly in this process; then `mambactl serve` starts, as a process of its own, and
is asked for random prompts of which all answers have the same length:

- `streams` at once, all beginning together: their new tokens per second, from the first request to
  the last token and between the first and the last tokens, beside `bench` with as many rows;
- one stream: milliseconds a token, less those of a step of `bench` with one row;
- the first token of one request, alone and while the others decode.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambactl.errors import ResourceError
from mambactl.stage_result import StageResult
from tests.performance import command

ROOT = Path(__file__).parents[2]
FIELDS = ("draft", "k", "input_len", "output_len", "iters")
PARSER = command.parser("serving", __doc__, FIELDS)
PARSER.add_argument("model", metavar="MODEL")
PARSER.add_argument("--streams", type=int, default=32, help="requests at once")
PARSER.set_defaults(input_len=1024, output_len=256)
# seconds that others decode before one more request, and answers' lengths that they go on for
SETTLING, MEANWHILE = 0.1, 4
NAME = "served"


@dataclass(frozen=True)
class Load:
    """Requests to send: prompts of so many tokens, answers of so many."""

    streams: int
    input_len: int
    output_len: int
    vocabulary: int

    def request(self, tokens: int) -> bytes:
        """A request for `tokens` behind a random prompt, which begins like no other."""
        prompt = [random.randrange(self.vocabulary) for _ in range(self.input_len)]
        body = json.dumps(
            {
                "model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True},
            }
        ).encode()  # fmt: skip
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        return f"{head}Connection: close\r\n\r\n".encode() + body


@dataclass(frozen=True)
class Stream:
    """When the pieces of an answer came, in seconds of one clock, and its tokens."""

    asked: float
    pieces: list[float]
    tokens: int

    @property
    def first(self) -> float:
        """Seconds to the first piece."""
        return self.pieces[0] - self.asked


async def stream(port: int, request: bytes, begun: asyncio.Event | None = None) -> Stream:
    """Ask for one answer, and say when it has `begun`.

    Plain sockets: a client library would take the time of the server.
    """
    asked = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    pieces, written = [], 0
    async for line in reader:
        if not line.startswith(b"data: {"):
            if line.startswith(b"HTTP/") and b" 200 " not in line:
                raise ResourceError(f"the server answered {line.decode().strip()}")
            continue
        event = json.loads(line[len(b"data: ") :])
        if event.get("usage"):
            written = event["usage"]["completion_tokens"]
        elif event.get("choices") and event["choices"][0]["finish_reason"] is None:
            pieces.append(time.perf_counter())
            if begun is not None:
                begun.set()
        else:
            last = time.perf_counter()
    writer.close()
    return Stream(asked, [*pieces, last], written)


async def together(port: int, load: Load) -> dict[str, float]:
    """All streams at once."""
    requests = [load.request(load.output_len) for _ in range(load.streams)]
    begun = time.perf_counter()
    found = await asyncio.gather(*(stream(port, each) for each in requests))
    ended = max(each.pieces[-1] for each in found)
    tokens = sum(each.tokens for each in found)
    # while every stream decodes
    first = max(each.pieces[0] for each in found)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / (ended - begun),
        "decode_tokens_per_second": (tokens - load.streams) / (ended - first),
        "first_token_ms": 1000 * statistics.median(each.first for each in found),
        "last_first_token_ms": 1000 * max(each.first for each in found),
    }


async def alone(port: int, load: Load) -> dict[str, float]:
    """One stream with nothing beside it."""
    found = await stream(port, load.request(load.output_len))
    decoding = found.pieces[-1] - found.pieces[0]
    return {
        "first_token_ms": 1000 * found.first,
        "ms_per_token": 1000 * decoding / (found.tokens - 1),
    }


async def beside(port: int, load: Load) -> float:
    """Milliseconds to the first token of a request while all other streams decode."""
    begun = [asyncio.Event() for _ in range(load.streams - 1)]
    tokens = MEANWHILE * load.output_len
    others = [asyncio.create_task(stream(port, load.request(tokens), each)) for each in begun]
    await asyncio.gather(*(each.wait() for each in begun))
    await asyncio.sleep(SETTLING)
    found = await stream(port, load.request(1 + load.output_len // 8))
    running = sum(not task.done() for task in others)
    if running < len(others):
        raise ResourceError(f"{len(others) - running} of the other streams had ended already")
    await asyncio.gather(*others)
    return 1000 * found.first


@contextmanager
def server(given: Namespace, load: Load) -> Iterator[int]:
    """The port of a server of its own."""
    length = load.input_len + MEANWHILE * load.output_len
    options = {
        "batch-size": load.streams, "max-length": length, "port": 0, "name": NAME,
        # what is measured is reading, not remembering
        "keep-gb": 0, "device": given.device, "dtype": given.dtype, "draft": given.draft,
        "k": given.k if given.draft else None,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    process = subprocess.Popen(
        [sys.executable, "-m", "mambactl", "serve", given.model, "--ignore-eos", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=os.getcwd(),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
    )
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise ResourceError("the server did not start", "it said why")
        yield int(url.rpartition(":")[2].removesuffix("/v1"))
    finally:
        process.terminate()
        process.wait()


def served(given: Namespace, load: Load, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, after one that warms up."""

    async def measure(port: int) -> dict[str, Any]:
        found: list[dict[str, Any]] = []
        for _ in range(1 + rounds):
            one, all_ = await alone(port, load), await together(port, load)
            later = await beside(port, load)
            found.append({"one": one, "streams": all_, "first_token_beside_ms": later})
        return _medians(found[1:])

    with server(given, load) as port:
        return asyncio.run(measure(port))


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    first = rounds[0]
    return {
        name: _medians([each[name] for each in rounds])
        if isinstance(first[name], dict)
        else statistics.median(each[name] for each in rounds)
        for name in first
    }


def measure(given: Namespace) -> StageResult:
    """Measure `bench` at both numbers of rows, then the server."""
    from mambactl.commands import bench
    from mambactl.ranks import placement
    from mambactl.speed.conditions import conditions
    from mambactl.speed.memory import release

    streams = given.streams
    given.batch_size = f"1,{streams}"
    config = command.configured(given)
    device, dtype = placement(config)
    metrics = conditions(config, device, dtype)
    # what drafts gain is no part of the comparison
    plain = command.configured(Namespace(**{**vars(given), "draft": None, "k": None}))
    points = bench.measure(plain, given.model).metrics["points"]
    release(device)
    one, many = (next(p for p in points if p["batch_size"] == rows) for rows in (1, streams))
    load = Load(streams, config.input_len[0], config.output_len, _vocabulary(given.model))
    found = served(given, load, config.iters)
    # of all rows: reading the prompts, then a step for every further token
    seconds = many["first_token_ms"] / 1000
    seconds += streams * (load.output_len - 1) / many["decode_tokens_per_second"]
    whole = streams * load.output_len / seconds
    step = 1000 / one["decode_tokens_per_second"]
    metrics |= {"points": points, "serving": found}
    metrics["serving"] |= {
        "bench_tokens_per_second": whole,
        "bench_step_ms": step,
        "of_bench": found["streams"]["tokens_per_second"] / whole,
        "of_bench_decoding": found["streams"]["decode_tokens_per_second"]
        / many["decode_tokens_per_second"],
        "added_ms_per_token": found["one"]["ms_per_token"] - step,
        "first_token_beside_over_alone": found["first_token_beside_ms"]
        / found["one"]["first_token_ms"],
    }
    text = (
        f"{streams} streams at {metrics['serving']['of_bench']:.2f}x of bench, one with "
        f"{metrics['serving']['added_ms_per_token']:+.2f} ms a token, the first token of one more "
        f"after {metrics['serving']['first_token_beside_over_alone']:.2f}x of alone"
    )
    return StageResult(given.model, metrics, text)


def _vocabulary(model: str) -> int:
    from mambactl.checkpoint.load import load_tokenizer

    return len(load_tokenizer(model))


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
