"""The Mamba-2 decode kernel against one that stores a state per token, in steady decoding.

Both walk the same text through layers whose states together are far larger than any cache. A step
drafts K tokens of which ACCEPTED are kept, so the replays and stores of the fused kernel come in
the order they come in when decoding; its time is the mean over that period.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mambactl.decode.gpu.state import PackedModel
from mambactl.errors import CheckError
from mambactl.kernels.decode.reference.verdict import next_store
from mambactl.kernels.decode.triton.ops import TritonOps
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.mamba2_decode import PackedMamba2
from mambactl.models.session_size import SessionSize
from mambactl.speed.shapes import SHAPES, materialise
from mambactl.speed.subject import Numbers
from tests.performance.graphs import Timer, capture
from tests.performance.snapshots import snapshot_segment
from tests.performance.verification import supported

SHAPE, BATCHES, TOKENS, ACCEPTED = "llama3-8b-hybrid-50", (1, 8, 32, 64), 5, 3
# bytes of states that a step walks through
STATES = 1 << 30
WARM_PERIODS, PERIODS = 2, 15
# of the largest output: two bf16 roundings of sums in another order
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2e-5}


@dataclass
class Layer:
    """Tensors that one layer works on; `fused` and `snapshots` are the states of the two ways."""

    ring: Tensor  # [B, R, C]
    mixed: Tensor  # [B, R, Ch]
    z: Tensor  # [B T, H P]
    fused: Tensor  # [B, H, N, P]
    snapshots: Tensor  # [B, T, H, N, P]
    fused_out: Tensor  # [B T, H P]
    snapshot_out: Tensor  # [B T, H P]


@dataclass(frozen=True)
class Standing:
    """The position of a step: int32 numbers that are the same for every sequence."""

    start: int
    base: int
    store: int
    slot: int


def one_layer(shape: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PackedModel:
    """A single Mamba-2 layer of a shape, with next to no vocabulary and MLP."""
    fields = {key: value for key, value in SHAPES[shape]().to_dict().items() if key != "model_type"}
    fields |= {"mixers": ["mamba2"], "num_hidden_layers": 1}
    fields |= {"vocab_size": 8, "intermediate_size": 8}
    return supported(materialise(HybridConfig(**fields), device, dtype, seed), 1)


def walk(limit: int, T: int = TOKENS, accepted: int = ACCEPTED) -> Iterator[Standing]:
    """Endless steps that keep `accepted` drafts each, from a stored state on; see `next_store`."""
    start = base = 3
    slot = 0
    while True:
        then = int(next_store(torch.tensor(start), torch.tensor(base), T, limit))
        yield Standing(start, base, then, slot)
        start, base, slot = start + accepted + 1, then, accepted


def period(limit: int, T: int = TOKENS, accepted: int = ACCEPTED) -> int:
    """Steps from one stored state to the next."""
    steps = enumerate(walk(limit, T, accepted))
    stores = (number for number, standing in steps if standing.store != standing.base)
    first, second = next(stores), next(stores)
    return second - first


class Contest:
    """Both kernels over the same layers, B sequences and the same walk."""

    def __init__(
        self, weights: PackedModel, batch: int, T: int = TOKENS, states: int = STATES, seed: int = 0
    ):
        self.mixer: PackedMamba2 = weights.layers[0].mixer
        self.batch, self.T, self.ops = batch, T, TritonOps()
        self.limit = SessionSize(batch, 0, T - 1).ring_limit(weights.stores_every_step)
        like = self.mixer.conv.weight
        self.generator = torch.Generator(like.device).manual_seed(seed)
        s = self.mixer.sizes
        self.state_bytes = 4 * batch * s.n_heads * s.d_state * s.head_dim
        self.layers = [self._layer(like) for _ in range(-(-states // self.state_bytes))]
        self.start, self.base, self.store, self.slot, self.active = (
            torch.ones(batch, dtype=torch.int32, device=like.device) for _ in range(5)
        )

    def _layer(self, like: Tensor) -> Layer:
        s, rows = self.mixer.sizes, self.batch * self.T
        slots = 1 << (self.limit - 1).bit_length()

        def random(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
            new = torch.empty(shape, dtype=dtype, device=like.device)
            return new.normal_(generator=self.generator)

        state = (self.batch, s.n_heads, s.d_state, s.head_dim)
        fused = random(*state, dtype=torch.float32)
        snapshots = fused.new_full((self.batch, self.T, *state[1:]), torch.nan)
        snapshots[:, 0] = fused
        z = random(rows, s.d_inner)
        return Layer(
            random(self.batch, slots, s.conv_dim + s.n_heads),
            random(self.batch, slots, s.conv_dim), z, fused, snapshots,
            torch.empty_like(z), torch.empty_like(z),
        )  # fmt: skip

    def stand(self, standing: Standing) -> None:
        """Go to a step."""
        self.start.fill_(standing.start)
        self.base.fill_(standing.base)
        self.store.fill_(standing.store)
        self.slot.fill_(standing.slot)

    def fused(self) -> None:
        """One step of every layer with the decode engine's kernel."""
        for held in self.layers:
            self.ops.mamba2(
                *self._inputs(held, held.fused), held.fused_out, self.start, self.active,
                self.base, self.store, self.T, T=self.T, offset=0, **self._groups(),
            )  # fmt: skip

    def snapshots(self) -> None:
        """The same step with a state stored per token."""
        for held in self.layers:
            snapshot_segment(
                *self._inputs(held, held.snapshots), held.snapshot_out, self.start, self.slot,
                **self._groups(), pdl=self.ops.pdl,
            )  # fmt: skip

    def _inputs(self, held: Layer, state: Tensor) -> tuple:
        m = self.mixer
        gain = m.gain if m.norm_by_head else None
        weights = (m.A, m.D, m.dt_bias, gain, m.sizes.norm_eps)
        return (held.ring, held.mixed, held.z, state, *weights)

    def _groups(self) -> dict[str, int]:
        s = self.mixer.sizes
        return {"x_heads": s.x_heads, "b_groups": s.b_groups, "c_groups": s.c_groups}

    def compare(self, ways: Sequence[Callable[[], None]], standings: Sequence[Standing]) -> float:
        """The largest difference of outputs over these steps, relative to the largest output.

        Outputs are NaN before every step, so one that is not written makes this NaN.
        """
        errors = []
        for standing in standings:
            for held in self.layers:
                held.fused_out.fill_(torch.nan)
                held.snapshot_out.fill_(torch.nan)
            self.stand(standing)
            for way in ways:
                way()
            for held in self.layers:
                expected = held.fused_out.float()
                difference = held.snapshot_out.float() - expected
                errors.append(difference.abs().max() / expected.abs().max())
        # unlike Python's, this maximum keeps a NaN
        return torch.stack(errors).max().item()

    def bytes_moved(self, standing: Standing) -> tuple[int, int]:
        """Bytes of one step of one layer: of the fused kernel, and with a state per token."""
        outside = sum(t.nbytes for t in (self.layers[0].z, self.layers[0].fused_out))
        row = self.layers[0].mixed[:, 0].nbytes
        fused = self.state_bytes * (1 + (standing.store != standing.base))
        fused += outside + row * (standing.start - standing.base + self.T)
        return fused, self.state_bytes * (1 + self.T) + outside + row * self.T


def contest(batch: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Numbers:
    """Check that both kernels agree, then time them; CUDA only."""
    held = Contest(one_layer(SHAPE, device, dtype, seed), batch, seed=seed)
    length = period(held.limit)
    held.stand(next(walk(held.limit)))
    graphs = [capture(held.fused), capture(held.snapshots)]
    ways = [graph.replay for graph in graphs]
    # the first step stores nothing but snapshots: where it began is lost to them
    for layer in held.layers:
        layer.snapshots[:, 0] = layer.fused
    steps = walk(held.limit)
    error = held.compare(ways, [next(steps) for _ in range(WARM_PERIODS * length + 1)])
    if not error <= TOLERANCE[dtype]:
        raise CheckError(f"the two kernels differ by {error:.1e} at batch {batch}")
    timers, moved = [Timer(), Timer()], [[], []]
    for _ in range((WARM_PERIODS + PERIODS) * length):
        standing = next(steps)
        held.stand(standing)
        for timer, way in zip(timers, ways, strict=True):
            timer.run(way)
        for sums, one in zip(moved, held.bytes_moved(standing), strict=True):
            sums.append(one)
    return _row(held, length, error, [_mean(timer.seconds(), length) for timer in timers], moved)


def _mean(seconds: list[float], length: int) -> float:
    """The mean of the medians of every phase of the period."""
    kept = seconds[WARM_PERIODS * length :]
    return statistics.mean(statistics.median(kept[phase::length]) for phase in range(length))


def _row(
    held: Contest, length: int, error: float, seconds: list[float], moved: list[list[int]]
) -> Numbers:
    row: Numbers = {
        "batch_size": held.batch,
        "tokens": held.T,
        "accepted": ACCEPTED,
        "period": length,
        "layers": len(held.layers),
        "error": error,
    }
    for name, total, sizes in zip(("fused", "snapshots"), seconds, moved, strict=True):
        each, size = total / len(held.layers), statistics.mean(sizes)
        row |= {
            f"{name}_microseconds": each * 1e6,
            f"{name}_bytes": size,
            f"{name}_bytes_per_second": size / each,
        }
    return row | {"ratio": row["snapshots_microseconds"] / row["fused_microseconds"]}
