"""Decoding cache of a hybrid model: ragged rows, and an exact rollback that is a cursor move.

Attention layers keep keys and values at the slot of their position, so forgetting tokens is
lowering a length. A recurrent layer keeps the state at a permanent position (`base`), the live
state at the newest one, and the inputs of the tokens between. After a rollback the next forward
replays the kept inputs from the permanent state, in the order plain decoding would have used, so
the result is bitwise equal to never having gone further (arXiv 2408.15237, section 4).
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mambactl.kernels.reference import Records, Step, latest_inputs, multi_step, recur, run
from mambactl.models.key_ring import KeyRing, with_slots
from mambactl.models.loan import Loan
from mambactl.models.mixers.settings import WindowSettings
from mambactl.present import present

# longest run of tokens processed one by one after the prompt; longer ones go through chunks
MAX_SEQUENTIAL = 64


class LayerCache(Protocol):
    """Cache of one layer; every tensor in it has the batch as its first dimension."""

    def tensors(self) -> list[Tensor]:
        """The distinct tensors held."""
        ...

    def replace_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change` of every tensor in its place; tensors that are one stay one."""

    def resize(self, slots: int) -> None:
        """Cut or lengthen with zeros what has a slot for every token, as a new tensor or view."""

    def clear(self) -> None:
        """Drop everything that is held."""


class CacheLayout(Protocol):
    """A configuration, for as much as a cache asks of it."""

    def layer_caches(self) -> list[LayerCache]:
        """An empty cache for every layer."""
        ...


class HeldTensors:
    """A layer cache whose tensors are the attributes named in `held`, alone or in a tuple."""

    held: tuple[str, ...] = ()

    def tensors(self) -> list[Tensor]:
        """The distinct tensors held."""
        found: dict[int, Tensor] = {}
        for name in self.held:
            value = getattr(self, name)
            for tensor in value if isinstance(value, tuple) else (value,):
                if tensor is not None:
                    found[id(tensor)] = tensor
        return list(found.values())

    def replace_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change` of every tensor in its place; tensors that are one stay one."""
        # a subclass answers for more than these
        changed = {id(tensor): change(tensor) for tensor in HeldTensors.tensors(self)}
        for name in self.held:
            value = getattr(self, name)
            if isinstance(value, tuple):
                setattr(self, name, tuple(changed[id(tensor)] for tensor in value))
            elif value is not None:
                setattr(self, name, changed[id(value)])

    def resize(self, slots: int) -> None:
        """Do nothing: the memory is the same for any number of tokens."""

    def clear(self) -> None:
        """Drop everything that is held."""
        for name in self.held:
            setattr(self, name, None)


class AttentionCache(HeldTensors):
    """Keys and values [B, Hk, S, P], written at the slot that equals the token's position."""

    held = ("keys", "values")

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, positions: Tensor | None, slots: int) -> tuple:
        """Write [B, Hk, T, P] at positions [B, T] and return the first `slots` slots.

        Without positions they are the last of the slots.
        """
        self.keys = self._write(self.keys, keys, positions, slots)
        self.values = self._write(self.values, values, positions, slots)
        return self.keys[:, :, :slots], self.values[:, :, :slots]

    def resize(self, slots: int) -> None:
        """Cut to the first `slots` slots, or add empty ones."""
        if self.keys is not None:
            self.keys = with_slots(self.keys, slots)
            self.values = with_slots(present(self.values), slots)

    @staticmethod
    def _write(store: Tensor | None, new: Tensor, positions: Tensor | None, slots: int) -> Tensor:
        store = new[:, :, :0] if store is None else store
        if slots > (held := store.shape[2]):
            store = with_slots(store, max(slots, 2 * held))
        if positions is None:
            store[:, :, slots - new.shape[2] : slots] = new
            return store
        index = positions[:, None, :, None].expand_as(new)  # [B, Hk, T, P]
        store.scatter_(2, index, new)
        return store


@dataclass(frozen=True)
class Cursor:
    """Start of a forward call, the same for every layer of a cache.

    `held` [B] tokens since the permanent position; `settle` makes them permanent first;
    `rolled_back` says that the live state is newer than the cursor; `n_new` [B] as in kernels.
    """

    held: Tensor
    settle: bool
    rolled_back: bool
    recording: bool
    n_new: Tensor | None


class RecurrentCache(HeldTensors):
    """State, inputs of the convolution and token records of one recurrent layer.

    `state` is the state at the permanent position, `live` at the newest token (one tensor when
    nothing is recorded). `inputs` [B, W-1+R, Ch] holds raw inputs of the convolution from W-1
    before the permanent position, None without a convolution; `records` [B, R, ...] is what a step
    of the mixer reads of each token since.
    """

    held = ("state", "live", "inputs", "records")

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.live: Tensor | None = None
        self.inputs: Tensor | None = None
        self.records: Records | None = None

    def start(self, state: Tensor, inputs: Tensor | None = None) -> None:
        """Hold the state and the inputs [B, W-1, Ch] before the first token."""
        self.state = self.live = state
        self.inputs = inputs

    def conv_inputs(self, cursor: Cursor, width: int) -> Tensor:
        """The `width` raw inputs of the convolution [B, width, Ch] before the cursor."""
        return _rows_from(present(self.inputs), cursor.held, width)

    def step_through(
        self, step: Step, cursor: Cursor, raw: Tensor | None, records: Records, query: Tensor
    ) -> Tensor:
        """Run T tokens one by one from the cursor; returns their outputs [B, T, ...].

        `step(state, *records of a token, query)` gives the token's output and the next state;
        `raw` [B, T, Ch] are the inputs of the convolution, None without one.
        """
        if cursor.settle and cursor.rolled_back:
            before = present(self.state), present(self.records), cursor.held
            y, kept, live = multi_step(step, *before, records, query, cursor.n_new)
        else:
            y, live = run(step, present(self.live), records, query, cursor.n_new)
            kept = self.live if cursor.settle else self.state
        width = 0 if raw is None else present(self.inputs).shape[1] - self._recorded
        if not cursor.recording:
            inputs = None
            if raw is not None:
                inputs = latest_inputs(raw, self.conv_inputs(cursor, width), cursor.n_new)
            self.replace(inputs, live)
            return y
        held = cursor.held
        if cursor.settle:
            if raw is not None:
                self.inputs = self.conv_inputs(cursor, width)
            self.records = None
            held = torch.zeros_like(held)
        self.state, self.live = kept, live
        if raw is not None:
            self.inputs = _write_rows(self.inputs, raw, held + width)
        before = self.records or (None,) * len(records)
        self.records = tuple(
            _write_rows(store, new, held) for store, new in zip(before, records, strict=True)
        )
        return y

    def live_state(self, step: Step, cursor: Cursor) -> Tensor:
        """The state at the cursor, replayed if the cursor moved back."""
        if cursor.rolled_back:
            return recur(step, present(self.state), present(self.records), None, cursor.held)[1]
        return present(self.live)

    def replace(self, inputs: Tensor | None, live: Tensor) -> None:
        """Move on for good: no token before this point can be taken back."""
        self.inputs, self.live, self.state = inputs, live, live
        self.records = None

    @property
    def _recorded(self) -> int:
        return 0 if self.records is None else self.records[0].shape[1]


class WindowedCache(KeyRing, RecurrentCache):
    """Cache of a recurrent layer with a window of attention: constant in length."""

    held = (*RecurrentCache.held, "keys", "values")

    def __init__(self, settings: WindowSettings) -> None:
        RecurrentCache.__init__(self)
        KeyRing.__init__(self, settings)


class MixedCache(WindowedCache):
    """Cache of a layer some of whose heads keep every key (`kept`), the others as above."""

    def __init__(self, settings: WindowSettings) -> None:
        super().__init__(settings)
        self.kept = AttentionCache()

    def tensors(self) -> list[Tensor]:
        """The distinct tensors held."""
        return [*super().tensors(), *self.kept.tensors()]

    def replace_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change` of every tensor in its place; tensors that are one stay one."""
        super().replace_tensors(change)
        # the cache that this one is a copy of keeps its own
        self.kept = copy(self.kept)
        self.kept.replace_tensors(change)

    def resize(self, slots: int) -> None:
        """Cut the keys that are all kept to the first `slots` slots, or add empty ones."""
        self.kept = copy(self.kept)
        self.kept.resize(slots)

    def clear(self) -> None:
        """Drop everything that is held."""
        super().clear()
        self.kept = AttentionCache()


def _rows_from(store: Tensor, start: Tensor, count: int) -> Tensor:
    index = start[:, None] + torch.arange(count, device=start.device)  # [B, count]
    return store.gather(1, index[..., None].expand(-1, -1, store.shape[2]))


def _write_rows(store: Tensor | None, new: Tensor, start: Tensor) -> Tensor:
    """Write new [B, T, ...] at row offsets start [B], growing the store as needed."""
    length = new.shape[1]
    room = int(start.max()) + length if start.numel() else length
    grown = new.new_zeros(new.shape[0], room, *new.shape[2:])
    if store is not None and (held := store.shape[1]):
        grown[:, : min(held, room)] = store[:, :room]
    index = start[:, None] + torch.arange(length, device=start.device)  # [B, T]
    index = index.view(*index.shape, *[1] * (new.ndim - 2)).expand_as(new)
    return grown.scatter(1, index, new)


class HybridCache(Cache):
    """One cache object per layer, plus how many tokens each row holds.

    `recording=True` keeps what a rollback needs. `lengths` [B] counts tokens per row. Of the first
    tokens that come, the prompt, the newest `revocable` can be taken back. A caller whose rows
    stand level, those that have new tokens at least, says so by `level`: nothing asks the device
    for lengths then, and attention needs no mask. A cache with a `loan` lies in a graph's memory.
    """

    revocable = 0
    level = False
    loan: Loan | None = None
    layers: list[LayerCache]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        config: CacheLayout,
        batch_size: int,
        device: torch.device | str = "cpu",
        recording: bool = False,
    ):
        super().__init__(layers=config.layer_caches())  # pyright: ignore[reportArgumentType]
        self.recording = recording
        self._begin(batch_size, device)

    def _begin(self, batch_size: int, device: torch.device | str) -> None:
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.base = self.lengths
        self.seen = 0
        self._settle = self._rolled_back = False

    def cursor(self, n_new: Tensor | None) -> Cursor:
        """Cursor at which the next forward call starts."""
        held = self.lengths - self.base
        return Cursor(held, self._settle, self._rolled_back, self.recording, n_new)

    def advance(self, n_new: Tensor | int, columns: int, permanent: bool) -> None:
        """Move the cursor on, once all layers have processed `columns` columns."""
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
            # layers may lie on several devices
            layer.replace_tensors(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        self.lengths, self.base = (at[rows.to(at.device)] for at in (self.lengths, self.base))
        self.loan = None

    def select(self, rows: Tensor) -> "HybridCache":
        """A cache of the given rows [B'] (repeats allowed); this one stays as it is."""
        other = copy(self)
        other.layers = [copy(layer) for layer in self.layers]
        other.reorder(rows)
        return other

    def copies(self, rows: int) -> "HybridCache":
        """A cache of `rows` rows or times the only one; views, which are not to be written to."""
        other = copy(self)
        other.layers = [copy(layer) for layer in self.layers]
        for layer in other.layers:
            layer.replace_tensors(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))
        other.lengths, other.base = (t.expand(rows) for t in (self.lengths, self.base))
        return other

    def nbytes(self) -> int:
        """Bytes held in all layers."""
        distinct = {id(held): held for layer in self.layers for held in layer.tensors()}.values()
        return sum(tensor.numel() * tensor.element_size() for tensor in distinct)

    # what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns processed so far, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Always -1: the length has no upper limit."""
        return -1

    get_max_cache_shape = get_max_length  # earlier versions' name

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a mask covers when `query_length` are added, and the first of them."""
        return self.seen + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """True if any token was processed."""
        return self.seen > 0

    def reset(self) -> None:
        """Forget every token."""
        for layer in self.layers:
            layer.clear()
        self._begin(self.max_batch_size, self.lengths.device)

    def activate_past_recording(self) -> None:
        """Keep from now on what a rollback needs, into the end of the prompt too."""
        self.recording = True
        self.revocable = MAX_SEQUENTIAL

    @property
    def is_croppable(self) -> bool:
        """True if tokens from now on can be taken back."""
        return self.recording

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search's name for `reorder`."""
        self.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies next to each other."""
        rows = torch.arange(self.max_batch_size, device=self.lengths.device)
        self.reorder(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Contrastive search's name for `reorder`."""
        self.reorder(indices)

    def crop(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, max_length: int
    ) -> None:
        """Shorten every row to max_length tokens; 0 or less: by that many, which become permanent.

        Raises ValueError like `rollback`.
        """
        if max_length > 0:
            removed = max(int(self.lengths.max()) - max_length, 0)
            self.rollback(self.lengths.clamp(max=max_length))
        else:
            removed = -max_length
            self.rollback(self.lengths - removed)
        self.seen -= removed

    @property
    def is_compileable(self) -> bool:
        """Always False: the shapes of a cache grow."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True if any token was processed."""
        return self.seen > 0

    @property
    def max_batch_size(self) -> int:
        """Number of rows held."""
        return self.lengths.shape[0]
