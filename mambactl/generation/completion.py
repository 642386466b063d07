"""Texts behind many prompts, through the decode engine, each up to the first of its stop texts."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch

from mambactl.decode.backend import AnyEngine
from mambactl.decode.engine import OnTokens
from mambactl.decode.sampler import SamplingParams
from mambactl.generation.dealer import ALONE, Dealer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# rows decoded together where "auto" asks for what a device is quick with
ROWS = {"cpu": 8, "cuda": 64}
# tokens of a row between two looks for a stop text, which cost a decoding each
CHECK_EVERY = 4


def rows_together(device: torch.device, batch_size: int | str) -> int:
    """Rows per batch for a number or "auto"."""
    return ROWS[device.type] if isinstance(batch_size, str) else batch_size


def complete(
    engine: AnyEngine,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    until: Sequence[str] = (),
    batch_size: int = 1,
    on_row: Callable[[int], None] = lambda rows: None,
    dealer: Dealer = ALONE,
) -> list[list[int]]:
    """New tokens of every prompt; a row ends a few tokens behind the first text of `until`.

    Prompts of like length are decoded together; `on_row` hears how many a batch finished.
    """
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def written(rows: list[int]) -> list[list[int]]:
        batch = [prompts[row] for row in rows]
        return engine.generate(batch, params, stop_at(tokenizer, until, len(rows)), rows).tokens

    found = dealer.results(batches, written, on_row, len)
    by_row = dict(zip(chain(*batches), chain(*found), strict=True))
    return [by_row[row] for row in range(len(prompts))]


def stop_at(
    tokenizer: "PreTrainedTokenizerBase", until: Sequence[str], rows: int
) -> OnTokens | None:
    """A listener for `generate` that ends a row once one of the texts is in it."""
    texts = [text for text in until if text]
    if not texts:
        return None
    seen: list[list[int]] = [[] for _ in range(rows)]
    looked = [0] * rows
    # no token is shorter than a byte
    tail = CHECK_EVERY + max(len(text.encode()) for text in texts)

    def listen(row: int, new: list[int]) -> bool:
        seen[row].extend(new)
        fresh = len(seen[row]) - looked[row]
        if fresh < CHECK_EVERY:
            return False
        looked[row] = len(seen[row])
        last = tokenizer.decode(seen[row][-max(tail, tail - CHECK_EVERY + fresh) :])
        return any(text in last for text in texts)

    return listen
