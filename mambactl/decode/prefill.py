"""Reading prompts of different lengths into a cache, in pieces."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mambactl import console
from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridForCausalLM, HybridModel

# tokens of all rows that are read at once: they bound the memory of activations
CHUNK_TOKENS = 8192
# width of the models that this is for; a GPU reads more of narrower ones, for the same memory:
# launching a piece's kernels takes longer than running them
CHUNK_WIDTH = 4096
# a piece is no shorter, however many rows there are
LEAST_CHUNK = 16
# takes a piece of tokens [B, T], the streams behind them [B, T, D], and how many are new [B]
Along = Callable[[Tensor, Tensor, Tensor | None], None]


def prefill(
    model: HybridForCausalLM,
    prompts: Sequence[Sequence[int]],
    recording: bool,
    prefix: HybridCache | None = None,
    along: Along | None = None,
) -> tuple[HybridCache, Tensor]:
    """Run every prompt (possibly empty) through the model, and what goes `along` piece by piece.

    Returns the cache, which may be rolled back to any later point than the prompts' ends when
    `recording`, and the hidden states [B, D] of the last tokens, those of an empty stream for
    empty prompts. Of a `prefix` of one row, with which all prompts begin, nothing is read again;
    each goes on for a token or more.
    """
    rows = len(prompts)
    if prefix is None:
        cache = HybridCache(model.config, rows, model.device)
    else:
        cache = prefix.select(torch.zeros(rows, dtype=torch.long, device=prefix.lengths.device))
        prompts = [prompt[prefix.seen :] for prompt in prompts]
    last = read_in_pieces(model.model, cache, prompts, along)
    # what was read without recording is permanent
    cache.recording = recording
    return cache, model.model.norm(last)


def read_in_pieces(
    model: HybridModel,
    cache: HybridCache,
    prompts: Sequence[Sequence[int]],
    along: Along | None = None,
) -> Tensor:
    """Read prompts, possibly empty, behind what all rows of a cache hold alike.

    Returns the stream [B, D] behind the last tokens, 0 for empty prompts.
    """
    size = piece_size(len(prompts), model.config.hidden_size, cache.lengths.device)
    *_, last = piece_by_piece(model, cache, prompts, size, along)
    return last


def tokens_at_once(width: int, device: torch.device) -> int:
    """Tokens of all prompts to read at once, with a model of `width`."""
    if device.type != "cuda":
        return CHUNK_TOKENS
    return max(CHUNK_TOKENS, CHUNK_TOKENS * CHUNK_WIDTH // width)


def piece_size(rows: int, width: int, device: torch.device) -> int:
    """Tokens of each of `rows` prompts to read at once, with a model of `width`."""
    most = tokens_at_once(width, device)
    return min(max(most // rows, LEAST_CHUNK), CHUNK_TOKENS)


def piece_by_piece(
    model: HybridModel,
    cache: HybridCache,
    prompts: Sequence[Sequence[int]],
    size: int,
    along: Along | None = None,
) -> Iterator[Tensor]:
    """Read prompts as `read_in_pieces` does, `size` tokens of each between two items.

    An item is the stream [B, D] behind the last tokens so far. Until the last item the cache is
    in the reader's hands.
    """
    device = cache.lengths.device
    # one column even for empty prompts, so that the cache leaves its initial state
    tokens = pad(prompts, device, least=1)  # [B, T]
    counts = [len(prompt) for prompt in prompts]
    lengths = torch.tensor(counts, device=device)  # [B]
    last: Tensor | None = None
    width = tokens.shape[1]
    cache.level = True
    for start in range(0, width, size):
        piece = tokens[:, start : start + size]
        # rows without padding need no masks
        ragged = min(counts) < start + piece.shape[1]
        n_new = (lengths - start).clamp(0, piece.shape[1]) if ragged else None
        with console.doing(f"reading the prompt from token {start:,} of {width:,}"):
            stream = model.read(piece, cache, n_new)
            last = newest(stream, n_new, last)
            if along is not None:
                along(piece, stream, n_new)
        if start + size >= width:
            # decoding takes rows to different lengths
            cache.level = False
        yield last


def newest(hidden: Tensor, n_new: Tensor | None, last: Tensor | None = None) -> Tensor:
    """The last of the first n_new [B] rows of hidden [B, T, D]; `last` [B, D] or 0 without any."""
    if n_new is None:
        return hidden[:, -1].contiguous()
    index = (n_new - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
    found = hidden.gather(1, index)[:, 0]
    last = torch.zeros_like(found) if last is None else last
    return torch.where(n_new[:, None] > 0, found, last)


def pad(rows: Sequence[Sequence[int]], device: torch.device | str, least: int = 0) -> Tensor:
    """Pad token lists with zeros on the right, [B, longest or `least`]."""
    padded = np.zeros((len(rows), max([least, *map(len, rows)])), np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded).to(device)
