"""Log-likelihoods of continuations, for as few tokens read as the requests allow.

Requests whose tokens are the same are read once, shared beginnings once (`prefixes`), batches hold
rows of like length up to a number of tokens, and the head sees only the positions that are scored.

What rows are read together changes the order of sums. Fitted or trained students and their teachers
move by at most 1e-4 in fp32 for it; a student that was neither amplifies what is rounded (1.3e-3
was seen on SmolLM2), and only fp64 scores it alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mambactl.evaluation.prefixes import Group, group_by_prefix
from mambactl.generation.dealer import ALONE, Dealer
from mambactl.kernels.reference import state_dtype
from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridForCausalLM

BatchSize = int | Literal["auto"]

# tokens per forward pass, padding included
TOKENS = {"cpu": 1024, "cuda": 32768}
# a row behind a cache holds a state per recurrent layer
MOST_ROWS = 256
# of keys and values that rows behind a cache hold together, per token of a batch
HELD = 8
# positions whose logits exist at once
HEAD_POSITIONS = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True)
class Request:
    """Token ids of a context, not empty, and of what is scored behind it."""

    context: Sequence[int]
    continuation: Sequence[int]


class _Scored:
    """Every scored token of all requests, by the input that it is read in and its position there.

    Requests whose tokens differ only in the last one, which is never read, have one input.
    """

    def __init__(self, requests: Sequence[Request], max_length: int):
        known: dict[bytes, int] = {}
        self.inputs: list[np.ndarray] = []
        rows, positions, tokens, owners, asked = [], [], [], [], []
        for owner, request in enumerate(requests):
            whole = np.asarray([*request.context, *request.continuation], np.int64)
            read = whole[-(max_length + 1) : -1]
            count = len(request.continuation)
            if count > len(read):
                raise ValueError(f"{count} scored tokens do not fit in {max_length}")
            row = known.setdefault(read.tobytes(), len(self.inputs))
            if row == len(self.inputs):
                self.inputs.append(read)
            asked.append(row)
            rows.append(np.full(count, row))
            positions.append(np.arange(len(read) - count, len(read)))
            tokens.append(whole[len(whole) - count :])
            owners.append(np.full(count, owner))
        row, position = np.concatenate(rows), np.concatenate(positions)
        order = np.lexsort((position, row))
        self.position, self.row = position[order], row[order]
        self.token, self.owner = np.concatenate(tokens)[order], np.concatenate(owners)[order]
        self.first = np.searchsorted(self.row, np.arange(len(self.inputs) + 1))
        self.requests = np.bincount(asked, minlength=len(self.inputs))

    def requests_of(self, groups: Sequence[Group]) -> int:
        """Number of requests whose tokens are read in some groups."""
        return sum(int(self.requests[group.rows].sum()) for group in groups)

    def within(self, row: int, start: int, end: int) -> np.ndarray:
        """Scored tokens of an input whose position is in [start, end)."""
        first, last = self.first[row], self.first[row + 1]
        low, high = np.searchsorted(self.position[first:last], (start, end))
        return np.arange(first + low, first + high)


@torch.no_grad()
def log_likelihoods(
    model: HybridForCausalLM,
    requests: Sequence[Request],
    max_length: int,
    batch_size: BatchSize = "auto",
    on_scored: Callable[[int], None] = lambda count: None,
    dealer: Dealer = ALONE,
) -> list[tuple[float, bool]]:
    """Per request log p(continuation | context) in nats, and whether it is the greedy one.

    `batch_size` is rows per forward pass; "auto" fills passes by tokens and halves what does not
    fit a GPU. Contexts that are too long lose their beginning. `on_scored` hears how many
    requests each batch has scored.
    """
    sums, greedy = _score(model, requests, max_length, batch_size, on_scored, dealer)
    lengths = [len(request.continuation) for request in requests]
    return [
        (float(total), int(count) == length)
        for total, count, length in zip(sums, greedy, lengths, strict=True)
    ]


@torch.no_grad()
def greedy_tokens(
    model: HybridForCausalLM,
    requests: Sequence[Request],
    max_length: int,
    batch_size: BatchSize = "auto",
    dealer: Dealer = ALONE,
) -> list[int]:
    """Per request how many tokens of the continuation the model would have chosen itself."""
    counts = _score(model, requests, max_length, batch_size, lambda count: None, dealer)[1]
    return [int(count) for count in counts]


def _score(
    model: HybridForCausalLM,
    requests: Sequence[Request],
    max_length: int,
    batch_size: BatchSize,
    on_scored: Callable[[int], None],
    dealer: Dealer,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of log-likelihoods and numbers of greedy tokens, per request."""
    if not requests:
        return np.zeros(0), np.zeros(0)
    scored = _Scored(requests, max_length)
    run = _Run(model, scored, batch_size)
    batches = list(run.batches(group_by_prefix(scored.inputs)))
    found = dealer.results(batches, run.found_in, on_scored, scored.requests_of)
    owners, chances, greedy = (torch.cat(parts) for parts in zip(*found, strict=True))
    weights = (chances.double().cpu().numpy(), greedy.cpu().numpy())
    sums, counts = (np.bincount(owners.numpy(), each, len(requests)) for each in weights)
    return sums, counts


class _Run:
    """Passes over a model and their results."""

    def __init__(self, model: HybridForCausalLM, scored: _Scored, batch_size: BatchSize):
        self.model, self.scored = model, scored
        kind = model.device.type
        self.tokens = TOKENS[kind] if batch_size == "auto" else None
        self.rows = MOST_ROWS if batch_size == "auto" else batch_size
        self.positions = HEAD_POSITIONS[kind]
        self.found: list[tuple[np.ndarray, Tensor, Tensor]] = []

    def found_in(self, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
        """Owners, log-likelihoods and greediness of the scored tokens of a batch [n]."""
        nothing = torch.zeros(0, device=self.model.device)
        self.found = [(np.zeros(0, np.int64), nothing, nothing.bool())]
        # smaller ones, once something did not fit
        for part in self.batches(groups):
            self.score(part)
        owners, chances, greedy = zip(*self.found, strict=True)
        # on the device: the host waits for all batches at once
        return torch.from_numpy(np.concatenate(owners)), torch.cat(chances), torch.cat(greedy)

    def batches(self, groups: list[Group]) -> Iterator[list[Group]]:
        """Groups to be read together: rows alone by their length, shared beginnings by theirs."""
        alone = [group for group in groups if len(group.rows) == 1]
        several = [group for group in groups if len(group.rows) > 1]
        for kind in (several, alone):
            # the longest first, so that what does not fit is known at once
            kind.sort(key=lambda group: -group.shared)
            start = 0
            while start < len(kind):
                count = self._fitting(kind[start].shared)
                yield kind[start : start + count]
                start += count

    def score(self, groups: list[Group]) -> None:
        """Read groups that all share a beginning, or all do not; in halves if they do not fit."""
        kept, fits = len(self.found), True
        try:
            self._score(groups)
        except torch.OutOfMemoryError:
            if len(groups) == 1 and (self.rows == 1 or len(groups[0].rows) == 1):
                raise
            fits = False
        # after the except clause, whose traceback holds on to the memory
        if not fits:
            del self.found[kept:]
            self._score_in_halves(groups)

    def _score_in_halves(self, groups: list[Group]) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.tokens is not None:
            self.tokens = max(self.tokens // 2, 1)
        self.rows = max(self.rows // 2, 1)
        middle = len(groups) // 2
        for half in (groups[:middle], groups[middle:]):
            if half:
                self.score(half)

    def _fitting(self, length: int, held: int = 0) -> int:
        """Rows of `length` new tokens behind `held` cached ones that one pass takes."""
        if self.tokens is None:
            return self.rows
        count = self.tokens // max(length, 1)
        if held:
            count = min(count, HELD * self.tokens // (held + length))
        return max(min(count, self.rows), 1)

    def _score(self, groups: list[Group]) -> None:
        inputs = self.scored.inputs
        together = len(groups[0].rows) > 1
        starts = [inputs[group.rows[0]][: group.shared] for group in groups]
        cache = None
        if together:
            cache = HybridCache(self.model.config, len(groups), self.model.device)
        hidden = self._read(starts, cache)
        wanted = [
            np.concatenate([self.scored.within(row, 0, group.shared) for row in group.rows])
            for group in groups
        ]
        self._keep(hidden, wanted, 0)
        if cache is None:
            return
        rest = [
            (slot, row, group.shared)
            for slot, group in enumerate(groups)
            for row in group.rows
            if len(inputs[row]) > group.shared
        ]
        rest.sort(key=lambda entry: entry[2] - len(inputs[entry[1]]))
        start = 0
        while start < len(rest):
            longest = len(inputs[rest[start][1]]) - rest[start][2]
            part = rest[start : start + self._fitting(longest, hidden.shape[1])]
            self._score_behind(cache, part)
            start += len(part)

    def _score_behind(self, cache: HybridCache, part: list[tuple[int, int, int]]) -> None:
        """Score rows (cache slot, input, tokens in the cache) behind their shared beginning."""
        inputs = self.scored.inputs
        slots = torch.tensor([slot for slot, _, _ in part], device=self.model.device)
        ends = [inputs[row][shared:] for _, row, shared in part]
        hidden = self._read(ends, cache.select(slots))
        wanted = [self.scored.within(row, shared, len(inputs[row])) for _, row, shared in part]
        self._keep(hidden, wanted, np.array([shared for _, _, shared in part]))

    def _read(self, rows: Sequence[np.ndarray], cache: HybridCache | None) -> Tensor:
        """Hidden states [B, T, D] of rows, padded on the right."""
        lengths = np.array([len(row) for row in rows])
        padded = np.zeros((len(rows), lengths.max()), np.int64)
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(rows)
        device = self.model.device
        tokens = torch.from_numpy(padded).to(device)
        if cache is None:
            # nothing looks to the right, so padding there needs no mask
            return self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        n_new = torch.from_numpy(lengths).to(device)
        return self.model.model(
            input_ids=tokens, past_key_values=cache, n_new=n_new, use_cache=True
        ).last_hidden_state

    def _keep(self, hidden: Tensor, wanted: Sequence[np.ndarray], offset: np.ndarray | int) -> None:
        """Score the `wanted` tokens of each row, at positions `offset` [B] behind the row's."""
        entries = np.concatenate(wanted)
        if not len(entries):
            return
        rows = np.repeat(np.arange(len(wanted)), [len(part) for part in wanted])
        skipped = np.broadcast_to(offset, len(wanted))[rows]
        flat = rows * hidden.shape[1] + self.scored.position[entries] - skipped
        order = np.argsort(flat, kind="stable")
        entries = entries[order]
        distinct, where = np.unique(flat[order], return_inverse=True)
        device = hidden.device
        states = hidden.flatten(0, 1)[torch.from_numpy(distinct).to(device)]  # [P, D]
        for start in range(0, len(distinct), self.positions):
            low, high = np.searchsorted(where, (start, start + self.positions))
            logits = self.model.lm_head(states[start : start + self.positions])  # [P, V]
            logits = logits.to(state_dtype(logits))
            index = torch.from_numpy(where[low:high] - start).to(device)
            token = torch.from_numpy(self.scored.token[entries[low:high]]).to(device)
            chances = logits[index, token] - logits.logsumexp(-1)[index]
            greedy = logits.argmax(-1)[index] == token
            self.found.append((self.scored.owner[entries[low:high]], chances, greedy))
