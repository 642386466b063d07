"""Inputs of a decode pass's matrix products, and how tests run and compare them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mambactl.kernels.decode.reference.ops import ReferenceOps

NAN, EPS = float("nan"), 1e-5
REFERENCE = ReferenceOps()
KINDS = [FP32, BF16] = [torch.float32, torch.bfloat16]
# rows M -> sequences and tokens of each
SEGMENTS = {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2), 5: (1, 5), 6: (2, 3), 7: (7, 1), 8: (2, 4),
           16: (4, 4), 17: (17, 1), 32: (16, 2), 33: (11, 3), 40: (8, 5)}  # fmt: skip


class Stream(NamedTuple):
    """A residual stream [M, K] in its three forms, and the norm's weight."""

    hidden: Tensor
    scaled: Tensor
    squares: Tensor
    gain: Tensor

    def normed(self) -> Tensor:
        """RMSNorm in fp64."""
        x = self.hidden.double()
        return x / (x.pow(2).mean(1, keepdim=True) + EPS).sqrt() * self.gain.double()


class Where(NamedTuple):
    """A window of T tokens per sequence; `real` [M] marks rows that are not padding."""

    start: Tensor
    count: Tensor
    scale: int
    T: int
    offset: int

    @property
    def positions(self) -> list[list[int | None]]:
        """[B][T], None for padding."""
        indices = []
        for begin, count in zip(self.start.tolist(), self.count.tolist(), strict=True):
            row = [begin + self.offset + t for t in range(self.T)]
            indices.append([p if t < count * self.scale and p >= 0 else None
                           for t, p in enumerate(row)])  # fmt: skip
        return indices

    @property
    def real(self) -> Tensor:
        return torch.tensor([at is not None for row in self.positions for at in row])

    @property
    def keywords(self) -> dict:
        return {"T": self.T, "offset": self.offset}


def generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seeds) % 2**31)


def draw_stream(g, M, K, kind, device, pieces=1) -> Stream:
    """`squares` is cut in pieces of unequal size, the last ones empty."""
    hidden = (3 * torch.randn(M, K, generator=g)).to(kind)
    gain = (1 + 0.3 * torch.randn(K, generator=g)).to(kind)
    wide = torch.promote_types(kind, torch.float32)
    squares = torch.zeros(M, pieces, dtype=wide)
    for piece, part in enumerate(hidden.to(wide).pow(2).chunk(max(pieces - 1, 1), 1)):
        squares[:, piece] = part.sum(1)
    scaled = (hidden.to(wide) * gain.to(wide)).to(kind)
    return Stream(*(x.to(device) for x in (hidden, scaled, squares, gain)))


def draw_where(g, M, device, scaled_counts=True) -> Where:
    """Sequence 0 stands at 0 and looks back one token if there are others; one has ended."""
    B, T = SEGMENTS[M]
    start = torch.randint(5, 60, (B,), generator=g, dtype=torch.int32)
    count = torch.ones(B, dtype=torch.int32)
    offset = 0
    if B > 1:
        start[0], count[-1], offset = 0, 0, -1
    scale = T if scaled_counts else 1
    return Where(start.to(device), (count * T // scale).to(device), scale, T, offset)


def weights(g, N, K, kind, device, bias=True) -> tuple[Tensor, Tensor | None]:
    w = torch.randn(N, K, generator=g) / math.sqrt(K)
    b = torch.randn(N, generator=g)
    return w.to(device, kind), b.to(device, kind) if bias else None


def poisoned(device, kind, *shape) -> Tensor:
    return torch.full(shape, NAN, device=device, dtype=kind)


def close(actual: Tensor, expected: Tensor, kind: torch.dtype, times: int = 1) -> None:
    """Equal NaNs (nothing written), and values within `times` the tolerance of the kind."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.nan_to_num(), expected.nan_to_num()
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[kind]
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
    assert error <= times * bound, f"relative error {error:.1e}"


def same(actual: Tensor, expected: Tensor) -> None:
    """Bitwise, NaN equal to NaN."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


def all_close(actual, expected, kind: torch.dtype) -> None:
    for one, other in zip(actual, expected, strict=True):
        close(one, other, kind)


def spoil(stream: Stream, where: Where) -> None:
    """NaN in the rows that are padding."""
    padding = ~where.real.to(stream.hidden.device)
    for x in (stream.hidden, stream.scaled, stream.squares):
        x[padding] = NAN


class Conv(NamedTuple):
    """A convolution of the ring's first columns, and the ring before the window: NaN but for
    three positions.
    """

    weight: Tensor
    bias: Tensor
    ring: Tensor


def draw_conv(g, where: Where, width: int, kind, device) -> Conv:
    ring = poisoned("cpu", torch.float64, len(where.start), 16, width)
    for b, begin in enumerate((where.start + where.offset).tolist()):
        for at in range(max(begin - 3, 0), begin):
            ring[b, at % 16] = torch.randn(width, generator=g)
    channels = width - width % 3
    weight, bias = torch.randn(channels, 4, generator=g) / 2, torch.randn(channels, generator=g)
    return Conv(*(x.to(device, kind) for x in (weight, bias, ring)))


def run_project(ops, stream, where, w, bias, width, ring_lo, conv=None, **others) -> list[Tensor]:
    """plain, its padding rows NaN, the ring of 16 slots, and the convolved rows if asked for."""
    kind, device = stream.scaled.dtype, stream.scaled.device
    columns = len(w) - sum(each.rows for each in others.get("beside", ()))
    plain = poisoned(device, kind, len(stream.scaled), columns - width)
    channels = 0 if conv is None else len(conv.weight)
    mixed = poisoned(device, kind, len(where.start), 16, channels)
    ring = (
        poisoned(device, kind, len(where.start), 16, width) if conv is None else conv.ring.clone()
    )
    ops.project(
        stream.scaled, stream.squares, EPS, w, bias, plain, ring, where.start, where.count,
        where.scale, ring_lo=ring_lo, conv=None if conv is None else (*conv[:2], mixed),
        **where.keywords, **others,
    )  # fmt: skip
    plain[~where.real.to(device)] = NAN
    if conv is None:
        return [plain, ring]
    rows = poisoned(device, kind, len(where.start), where.T, channels)
    for b, row in enumerate(where.positions):
        for t, at in enumerate(row):
            if at is not None:
                rows[b, t], mixed[b, at % 16] = mixed[b, at % 16], NAN
    assert mixed.isnan().all()
    return [plain, ring, rows.flatten(0, 1)]


HEADS = [(3, 1, 16), (1, 1, 48), (2, 1, 32), (3, 3, 24)]


def draw_rotations(g, P, device) -> tuple[Tensor, Tensor]:
    angle = 6 * torch.rand(64, P // 2, generator=g, dtype=torch.float64)
    to = ("cpu", torch.float64) if device == "fp64" else (device, torch.float32)
    return angle.cos().to(*to), angle.sin().to(*to)


def run_qkv(
    ops, stream, where, w, bias, rotations, H, HK, P, slots=64, **ring
) -> list[Tensor]:  # fmt: skip
    """q and both caches, NaN where not written."""
    kind, device = stream.scaled.dtype, stream.scaled.device
    q = poisoned(device, kind, len(stream.scaled), H * P)
    keys, values = (poisoned(device, kind, len(where.start), HK, slots, P) for _ in range(2))
    ops.project_qkv(
        stream.scaled, stream.squares, EPS, w, bias, *rotations, q, keys, values, where.start,
        where.count, where.scale, **where.keywords, **ring,
    )  # fmt: skip
    return [q, keys, values]


def run_residual(ops, x, w, bias, stream, beside=()) -> list[Tensor]:
    """hidden, scaled and the sum of squares."""
    M, N = stream.hidden.shape
    hidden, scaled = stream.hidden.clone(), torch.full_like(stream.hidden, NAN)
    squares = poisoned(x.device, stream.squares.dtype, M, ops.square_pieces(M, N))
    ops.add_residual(x, w, bias, hidden, stream.gain, scaled, squares, beside)
    return [hidden, scaled, squares.sum(1)]


def run_swiglu(ops, stream, w) -> Tensor:
    out = poisoned(stream.scaled.device, stream.scaled.dtype, len(stream.scaled), len(w) // 2)
    ops.swiglu(stream.scaled, stream.squares, EPS, w, out)
    return out


def run_head(ops, scaled, squares, w, V=None) -> list[Tensor]:
    """Best logits and tokens, or all V logits."""
    M, (N, _) = len(scaled), w.shape
    if V is not None:
        logits = poisoned(w.device, squares.dtype, M, V)
        ops.head_logits(scaled, squares, EPS, w, logits)
        return [logits]
    pieces = ops.best_pieces(M, N)
    best = poisoned(w.device, squares.dtype, M, pieces)
    index = torch.full((M, pieces), -7, dtype=torch.int32, device=w.device)
    ops.head_best(scaled, squares, EPS, w, best, index)
    # every token id in a row of its own, so that what pick must not touch shows
    tokens = torch.full((M, 3), -7, dtype=torch.int32, device=w.device)
    ops.pick(best, index, tokens[:, 1])
    assert (tokens[:, 0] == -7).all() and (tokens[:, 2] == -7).all()
    return [best.amax(1), tokens[:, 1]]
