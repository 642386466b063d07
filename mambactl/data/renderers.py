"""Chats rendered by several processes at once: templates are the slow part of tokenising them."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from datetime import date
from typing import TYPE_CHECKING, TypeVar

from mambactl.data.chat_template import ChatRenderer
from mambactl.data.turns import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row", bound=Record)
Made = TypeVar("Made")

# chats that are worth a process of their own, and the most processes
CHATS_EACH, MOST = 64, 8


class ChatRenderers:
    """Renderers of one template, as many as `rows` are worth and there are cores."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        rows: Sequence[Record],
        day: date | None = None,
    ):
        self.tokenizer = tokenizer
        # a few more do not matter: only up to the bound are counted
        wanted = MOST * CHATS_EACH
        chats = sum("messages" in row for row in rows[: 2 * wanted])
        count = max(1, min(MOST, os.cpu_count() or 1, chats // CHATS_EACH))
        self._renderers = [ChatRenderer(tokenizer, day) for _ in range(count)]
        self._open = ExitStack()

    def __enter__(self) -> "ChatRenderers":
        for renderer in self._renderers:
            self._open.enter_context(renderer)
        if len(self._renderers) > 1:
            self._pool = self._open.enter_context(ThreadPoolExecutor(len(self._renderers)))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def map(self, make: Callable[[Row, ChatRenderer], Made], rows: Sequence[Row]) -> list[Made]:
        """Call `make` with every row and a renderer; results in the order of the rows.

        The first error in that order is raised, after all renderers are done.
        """
        count = min(len(self._renderers), len(rows))
        if count < 2:
            return [make(row, self._renderers[0]) for row in rows]
        # forks from several threads at once would copy each other's pipes
        for renderer in self._renderers[:count]:
            renderer.start()
        size = -(-len(rows) // count)

        def work(number: int) -> list[Made]:
            renderer = self._renderers[number]
            return [make(row, renderer) for row in rows[number * size : (number + 1) * size]]

        parts = [self._pool.submit(work, number) for number in range(count)]
        # none may still be at work when its renderer is used again
        wait(parts)
        return [made for part in parts for made in part.result()]
