"""Decoding cache of a hybrid model: ragged rows, and an exact rollback that is a cursor move.

Attention layers keep keys and values at the slot of their position, so forgetting tokens is
lowering a length. A recurrent layer keeps the state at a permanent position (`base`), the live
state at the newest one, and the inputs of the tokens between. After a rollback the next forward
replays the kept inputs from the permanent state, in the order plain decoding would have used, so
the result is bitwise equal to never having gone further (arXiv 2408.15237, section 4).
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mambactl.kernels.reference import Records, Step, conv_window, multi_step, recur
from mambactl.models.config import HybridConfig, WindowSettings
from mambactl.models.key_ring import KeyRing

# longest run of tokens processed one by one after the prompt; longer ones go through chunks
MAX_SEQUENTIAL = 64


class AttentionCache:
    """Keys and values [B, Hk, S, P], written at the slot that equals the token's position."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, positions: Tensor, slots: int) -> tuple:
        """Write [B, Hk, T, P] at positions [B, T] and return the first `slots` slots."""
        self.keys = self._write(self.keys, keys, positions, slots)
        self.values = self._write(self.values, values, positions, slots)
        return self.keys[:, :, :slots], self.values[:, :, :slots]

    @staticmethod
    def _write(store: Tensor | None, new: Tensor, positions: Tensor, slots: int) -> Tensor:
        held = 0 if store is None else store.shape[2]
        if slots > held:
            # zeros, not empty memory: a masked NaN would still poison the softmax average
            grown = new.new_zeros(*new.shape[:2], max(slots, 2 * held), new.shape[3])
            if store is not None:
                grown[:, :, :held] = store
            store = grown
        index = positions[:, None, :, None].expand_as(new)  # [B, Hk, T, P]
        store.scatter_(2, index, new)
        return store

    def tensors(self) -> list[str]:
        """Names of the tensors with a batch dimension."""
        return ["keys", "values"]


@dataclass(frozen=True)
class Cursor:
    """Where a forward call starts: the same for every layer of a cache.

    `held` [B] tokens since the permanent position; `settle` makes them permanent first;
    `rolled_back` says that the live state is newer than the cursor; `n_new` [B] as in kernels.
    """

    held: Tensor
    settle: bool
    rolled_back: bool
    recording: bool
    n_new: Tensor | None


class RecurrentCache:
    """State, conv inputs and token records of one Mamba layer.

    `state` is the state at the permanent position, `live` at the newest token (one tensor when
    nothing is recorded). `window` [B, W-1+R, Ch] holds raw conv inputs from W-1 before the
    permanent position; `x`, `dt`, `B` [B, R, ...] are the records of the tokens since.
    """

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.live: Tensor | None = None
        self.window: Tensor | None = None
        self.x: Tensor | None = None
        self.dt: Tensor | None = None
        self.B: Tensor | None = None

    def start(self, state: Tensor, window: Tensor) -> None:
        """Hold the state and conv window [B, W-1, Ch] before the first token."""
        self.state = self.live = state
        self.window = window

    def conv_inputs(self, cursor: Cursor, width: int) -> Tensor:
        """The `width` raw conv inputs [B, width, Ch] before the cursor."""
        return _rows_from(self.window, cursor.held, width)

    def step_through(
        self, step: Step, cursor: Cursor, raw: Tensor, records: Records, C: Tensor
    ) -> Tensor:
        """Run T tokens one by one from the cursor; returns their outputs [B, T, ...]."""
        width = self.window.shape[1] - self._recorded
        if cursor.settle and cursor.rolled_back:
            y, kept, live = multi_step(
                step, self.state, self._records, cursor.held, records, C, cursor.n_new
            )
        else:
            y, live = recur(step, self.live, records, C, cursor.n_new)
            kept = self.live if cursor.settle else self.state
        if not cursor.recording:
            self.replace(conv_window(raw, self.conv_inputs(cursor, width), cursor.n_new), live)
            return y
        held = cursor.held
        if cursor.settle:
            self.window = self.conv_inputs(cursor, width)
            self.x = self.dt = self.B = None
            held = torch.zeros_like(held)
        self.state, self.live = kept, live
        self.window = _write_rows(self.window, raw, held + width)
        records = zip((self.x, self.dt, self.B), records, strict=True)
        self.x, self.dt, self.B = (_write_rows(store, new, held) for store, new in records)
        return y

    def live_state(self, step: Step, cursor: Cursor) -> Tensor:
        """The state at the cursor, replayed if the cursor moved back."""
        if cursor.rolled_back:
            return recur(step, self.state, self._records, None, cursor.held)[1]
        return self.live

    def replace(self, window: Tensor, live: Tensor) -> None:
        """Move on for good: no token before this point can be taken back."""
        self.window, self.live, self.state = window, live, live
        self.x = self.dt = self.B = None

    @property
    def _recorded(self) -> int:
        return 0 if self.x is None else self.x.shape[1]

    @property
    def _records(self) -> Records:
        return self.x, self.dt, self.B

    def tensors(self) -> list[str]:
        """Names of the tensors with a batch dimension."""
        return ["state", "live", "window", "x", "dt", "B"]


class WindowedCache(KeyRing, RecurrentCache):
    """What a Mamba layer with a window of attention holds: constant in length."""

    def __init__(self, settings: WindowSettings) -> None:
        RecurrentCache.__init__(self)
        KeyRing.__init__(self, settings)

    def tensors(self) -> list[str]:
        """Names of the tensors with a batch dimension."""
        return [*RecurrentCache.tensors(self), "keys", "values"]


def _rows_from(store: Tensor, start: Tensor, count: int) -> Tensor:
    index = start[:, None] + torch.arange(count, device=start.device)  # [B, count]
    return store.gather(1, index[..., None].expand(-1, -1, store.shape[2]))


def _write_rows(store: Tensor | None, new: Tensor, start: Tensor) -> Tensor:
    """Write new [B, T, ...] at row offsets start [B], growing the store as needed."""
    length = new.shape[1]
    room = int(start.max()) + length if start.numel() else length
    held = 0 if store is None else store.shape[1]
    grown = new.new_zeros(new.shape[0], room, *new.shape[2:])
    if held:
        grown[:, : min(held, room)] = store[:, :room]
    index = start[:, None] + torch.arange(length, device=start.device)  # [B, T]
    index = index.view(*index.shape, *[1] * (new.ndim - 2)).expand_as(new)
    return grown.scatter(1, index, new)


def _layer_cache(config: HybridConfig, mixer: str) -> AttentionCache | RecurrentCache:
    if mixer == "mamba2_window":
        return WindowedCache(config.mamba2_window_settings)
    return AttentionCache() if mixer == "attention" else RecurrentCache()


class HybridCache(Cache):
    """One cache object per layer, plus how many tokens each row holds.

    `recording=True` keeps what a rollback needs. `lengths` [B] counts tokens per row.
    """

    def __init__(
        self,
        config: HybridConfig,
        batch_size: int,
        device: torch.device | str = "cpu",
        recording: bool = False,
    ):
        super().__init__(layers=[_layer_cache(config, mixer) for mixer in config.mixers])
        self.recording = recording
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.base = self.lengths
        self.seen = 0
        self._settle = self._rolled_back = False

    def cursor(self, n_new: Tensor | None) -> Cursor:
        """Where the forward call about to happen starts."""
        held = self.lengths - self.base
        return Cursor(held, self._settle, self._rolled_back, self.recording, n_new)

    def advance(self, n_new: Tensor | int, columns: int, permanent: bool) -> None:
        """Called once by the model when all layers have processed `columns` columns."""
        if self._settle:
            self.base = self.lengths
        self._settle = self._rolled_back = False
        self.lengths = self.lengths + n_new
        if permanent:
            self.base = self.lengths
        self.seen += columns

    def rollback(self, lengths: Tensor) -> None:
        """Return every row to an earlier length, exactly; what remains becomes permanent.

        Rows can go back to the last rollback, mark or prompt, not further: ValueError.
        """
        if not self.recording:
            raise ValueError("this cache was made without recording=True and cannot roll back")
        if bool(((lengths < self.base) | (lengths > self.lengths)).any()):
            raise ValueError(
                f"cannot roll back to {lengths.tolist()}: rows hold {self.lengths.tolist()} "
                f"tokens, of which {self.base.tolist()} are permanent"
            )
        self._rolled_back |= bool((lengths != self.lengths).any())
        self._settle = True
        self.lengths = lengths.clone()

    def mark(self) -> None:
        """Make everything held permanent."""
        if self.recording:
            self.rollback(self.lengths)

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows [B'] in the given order (repeats allowed)."""
        for layer in self.layers:
            held = {name: getattr(layer, name) for name in layer.tensors()}
            # names that share a tensor keep sharing it
            moved = {id(t): t.index_select(0, rows) for t in held.values() if t is not None}
            for name, tensor in held.items():
                setattr(layer, name, moved.get(id(tensor)))
        self.lengths, self.base = self.lengths[rows], self.base[rows]

    def select(self, rows: Tensor) -> "HybridCache":
        """A cache of the given rows [B'] (repeats allowed); this one stays as it is."""
        other = copy(self)
        other.layers = [copy(layer) for layer in self.layers]
        other.reorder(rows)
        return other

    def nbytes(self) -> int:
        """Bytes held in all layers."""
        held = [getattr(layer, name) for layer in self.layers for name in layer.tensors()]
        distinct = {id(tensor): tensor for tensor in held if tensor is not None}.values()
        return sum(tensor.numel() * tensor.element_size() for tensor in distinct)

    # what transformers' generate() asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns processed so far, padding included."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No upper limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search's name for `reorder`."""
        self.reorder(beam_idx)

    batch_repeat_interleave = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Contrastive search's name for `reorder`."""
        self.reorder(indices)

    def crop(self, max_length: int) -> None:
        """Shorten every row to max_length tokens (negative: by that many)."""
        longest = int(self.lengths.max())
        target = min(max_length if max_length >= 0 else longest + max_length, longest)
        self.rollback(self.lengths.clamp(max=target))
        self.seen -= longest - target

    @property
    def is_compileable(self) -> bool:
        """Shapes grow, so no."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether any token was processed."""
        return self.seen > 0

    @property
    def max_batch_size(self) -> int:
        """Rows held."""
        return self.lengths.shape[0]
