"""A server from its first socket to its last answer."""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Self

import torch
import uvicorn
from starlette.applications import Starlette

from mambactl import console
from mambactl.checkpoint.load import load_tokenizer
from mambactl.data.chat_template import ChatRenderer
from mambactl.decode.backend import open_batch
from mambactl.decode.gpu.prompt_graphs import WholePrompts
from mambactl.decode.kept_prompts import KeptPrompts
from mambactl.decode.prefill import tokens_at_once
from mambactl.decode.prefix_files import GB
from mambactl.decode.prompt_reading import PromptReading, Whole
from mambactl.errors import ResourceError
from mambactl.generation import decoding
from mambactl.models.draft_head import DraftHead, DraftModel
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import ServeConfig
from mambactl.ranks import placement
from mambactl.serving.routes import make_app
from mambactl.serving.scheduler import Decoding, Scheduler
from mambactl.serving.service import Service

KEY = "MAMBACTL_API_KEY"
ROWS = {"cpu": 8, "cuda": 32}
# keys and values of all rows have their memory from the start
MOST_LENGTH = {"cpu": 2048, "cuda": 8192}
# reading a piece of a prompt makes running answers wait that long, at most, about
STALL_SECONDS = 0.05
LEAST_PIECE = 64
# of a piece half as long, by which a piece may take longer where it makes answers wait for longer
SLOWER = 1.5
# lengths of prompts read together before the first request: kernels are compiled for some of their
# properties
WARM_LENGTHS = ((1,), (2,), (15,), (16,), (16, 7), (15, 8, 3))
# seconds after which a thread that wants to run may: decoding waits for no reply that is made
SWITCH_SECONDS = 0.0005
# seconds in which the decoding thread ends its last step
LAST_STEP = 5.0


class _EndedBySignal(uvicorn.Server):
    """uvicorn's server, which a signal ends as intended; a second SIGINT ends it at once."""

    ended_by: str | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop listening and let running answers end."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        self.ended_by = signal.Signals(sig).name


class Server:
    """A model, its socket and its threads; `run` returns when all answers are given.

    After `start` it serves beside the caller until `close`, or the end of a `with` block.
    """

    def __init__(self, config: ServeConfig, source: str, announce: Callable[[str], None]):
        """Bind the socket and read what is small; raises ResourceError, ModelError, UsageError."""
        self.config, self.source, self.announce = config, source, announce
        self.socket = _listening(config)
        # base URL of the API for clients
        self.url = _url(self.socket)
        tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        decoding.require_draft(config, source)
        name = config.name or Path(source).name.removesuffix(".st") or source
        self.service = Service(
            config, name, ChatRenderer(tokenizer), key=os.environ.get(KEY) or None
        )
        self.failure: BaseException | None = None
        self._ready = threading.Event()
        self._background: threading.Thread | None = None
        self._server = _EndedBySignal(
            uvicorn.Config(
                make_app(self.service, self._lifespan),
                log_level="warning",
                access_log=False,
                server_header=False,
                # handed on to asyncio, which takes parts of a second
                timeout_graceful_shutdown=config.grace,  # pyright: ignore[reportArgumentType]
            )
        )

    @property
    def ended_by(self) -> str | None:
        """Name of the signal that ended the server."""
        return self._server.ended_by

    def run(self) -> None:
        """Serve until a signal, or until decoding fails, whose error is raised then."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            self._server.run(sockets=[self.socket])
        finally:
            sys.setswitchinterval(before)
            self.service.renderer.close()
            self.socket.close()
        if self.failure is not None:
            raise self.failure

    def start(self) -> Self:
        """Serve in a thread; returns once requests are answered, raises what prevents that."""
        self._background = threading.Thread(target=self._run_quietly, name="serve", daemon=True)
        self._background.start()
        self._ready.wait()
        if self.failure is not None:
            self.close()
            raise self.failure
        return self

    def close(self) -> None:
        """End a server that `start` started, as a signal does."""
        self._server.should_exit = True
        if self._background is not None:
            self._background.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_quietly(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self.failure = error
            self._ready.set()

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        work = threading.Thread(target=self._decode, args=(loop,), name="decode", daemon=True)
        work.start()
        yield
        scheduler, self.service.scheduler = self.service.scheduler, None
        if scheduler is not None:
            scheduler.stop()
            await asyncio.to_thread(work.join, LAST_STEP)

    def _decode(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load, warm up, and decode what is asked for."""
        try:
            with console.doing(f"loading {self.source}"):
                made = self._load()
            scheduler = Scheduler(made, self.service.metrics, loop, self.config.max_queue)
            self.service.scheduler = scheduler
            self.announce(self.url)
            self._ready.set()
            # nothing goes on that somebody at the terminal waits for
            with console.attended():
                scheduler.run()
        except BaseException as error:
            self.failure = error
            self.service.scheduler = None
            self._server.should_exit = True
            self._ready.set()

    def _load(self) -> Decoding:
        config, service = self.config, self.service
        device, _ = placement(config)
        if device.type == "cuda":
            # of this thread, which may have none yet
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.set_device(index)
        target, tokenizer, draft = decoding.load_both(
            config, self.source, service.renderer.tokenizer
        )
        rows = config.batch_size
        rows = ROWS[target.device.type] if isinstance(rows, str) else rows
        most = MOST_LENGTH[target.device.type]
        length = config.max_length or min(target.config.max_position_embeddings, most)
        decoding.warn_beyond_positions(target.config, length)
        eos = () if config.ignore_eos else decoding.end_tokens(target, tokenizer)
        k = config.k if draft is not None else 0
        started = time.perf_counter()
        batch = open_batch(target, draft, k, rows, length, eos, config.dtype == "auto")
        model = None if isinstance(draft, str) else draft
        whole = whole_readers(target, model, rows, length)
        at_once = tokens_at_once(target.config.hidden_size, target.device)
        piece = fitting_piece(target, model, length, min(at_once, rows * length))
        console.log(
            f"{rows} rows of {length} tokens, prompts in pieces of {piece}, warm in "
            f"{time.perf_counter() - started:.1f} s"
        )
        service.max_length, service.rows = length, rows
        service.vocabulary = target.config.vocab_size
        kept = KeptPrompts(int(config.keep_gb * GB))
        return Decoding(target, model, batch, kept, piece, at_once, whole)


def whole_readers(
    target: HybridForCausalLM, draft: DraftModel, rows: int, longest: int
) -> Whole | None:
    """Readers of prompts as CUDA graphs, those of single prompts ready; None without a GPU.

    A draft head reads along with its target, and has none.
    """
    if target.device.type != "cuda" or isinstance(draft, DraftHead):
        return None
    models = [target] if draft is None else [target, draft]
    readers = [WholePrompts(model.model, rows) for model in models]
    for reader in readers:
        reader.prepare(longest)
    return readers[0], (readers[1] if len(readers) > 1 else None)


def fitting_piece(target: HybridForCausalLM, draft: DraftModel, longest: int, at_once: int) -> int:
    """Tokens of prompts of up to `longest` that are read in about `STALL_SECONDS`.

    They are `at_once` together at most. Where launching a piece takes longer than running it, a
    longer one costs nothing, and is taken however long that is. Reads some, which warms up.
    """
    for lengths in WARM_LENGTHS:
        _read(target, draft, *(min(length, longest) for length in lengths))
    piece = LEAST_PIECE
    before = _seconds_of(target, draft, piece, longest)
    while piece < at_once:
        seconds = _seconds_of(target, draft, 2 * piece, longest)
        if seconds > max(STALL_SECONDS, SLOWER * before):
            break
        piece, before = 2 * piece, seconds
    return min(piece, at_once)


def _seconds_of(target: HybridForCausalLM, draft: DraftModel, piece: int, longest: int) -> float:
    """Seconds of reading `piece` tokens in prompts of up to `longest`."""
    lengths = [min(piece, longest)] * max(piece // longest, 1)
    # what is compiled for it takes no part
    return min(_read(target, draft, *lengths) for _ in range(2))


def _read(target: HybridForCausalLM, draft: DraftModel, *lengths: int) -> float:
    """Seconds of reading prompts of these lengths, all of them together and at once."""
    started = time.perf_counter()
    prompts = [[0] * length for length in lengths]
    reading = PromptReading(target, draft, prompts, None, len(lengths) * max(lengths))
    while not reading.read():
        pass
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return time.perf_counter() - started


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _listening(config: ServeConfig) -> socket.socket:
    """A socket bound to the address; raises ResourceError."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((config.host, config.port))
        return made
    except OSError as error:
        raise ResourceError(
            f"cannot listen at {config.host}:{config.port} ({error.strerror or error})",
            "another --host or --port; --port 0 takes any that is free",
        ) from error
