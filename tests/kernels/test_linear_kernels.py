"""Matrix products of a decode pass: Triton against the reference, and that against fp64.

Errors are relative to the largest expected value. Reference in fp64: 1e-12 (another order of
sums). Kernels in fp32: 1e-5, because sums of up to 576 products run in another order. Kernels in
bf16: 2^-7, two roundings of half an ulp each (the library's products round once more than ours);
logits 1e-5, as they are not rounded.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from mambactl.kernels.triton.ops import TritonOps  # noqa: E402
from mambactl.kernels.window.ops import WindowOps  # noqa: E402

NAN, EPS = float("nan"), 1e-5
REFERENCE = WindowOps()
ROWS = [1, 2, 3, 5, 16, 17, 32, 33]
# rows M -> sequences and tokens of each
WINDOWS = {1: (1, 1), 2: (1, 2), 3: (3, 1), 5: (1, 5), 16: (4, 4), 17: (17, 1), 32: (16, 2),
           33: (11, 3)}  # fmt: skip
KINDS = [torch.float32, torch.bfloat16]
KIND_AND_BIAS = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]


# `exact` makes no difference to passes of more rows
CASES = [(False, M) for M in ROWS] + [(True, 1), (True, 2)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{'exact' if c[0] else 'fast'}-{c[1]}")
def case(request, device) -> tuple[TritonOps, int]:
    """Operations, and how many rows they are to have."""
    exact, rows = request.param
    return TritonOps(exact), rows


@pytest.fixture(scope="module")
def ops(device) -> TritonOps:
    return TritonOps()


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
        begins, counts = self.start.tolist(), self.count.tolist()
        return [
            [
                begin + self.offset + t
                if t < count * self.scale and begin + self.offset + t >= 0
                else None
                for t in range(self.T)
            ]
            for begin, count in zip(begins, counts, strict=True)
        ]

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
    wide = torch.float64 if kind == torch.float64 else torch.float32
    squares = torch.zeros(M, pieces, dtype=wide)
    for piece, part in enumerate(hidden.to(wide).pow(2).chunk(max(pieces - 1, 1), 1)):
        squares[:, piece] = part.sum(1)
    scaled = (hidden.to(wide) * gain.to(wide)).to(kind)
    return Stream(*(x.to(device) for x in (hidden, scaled, squares, gain)))


def draw_where(g, M, device, scaled_counts=True) -> Where:
    """Sequence 0 stands at 0 and looks back one token if there are others; one has ended."""
    B, T = WINDOWS[M]
    start = torch.randint(5, 60, (B,), generator=g, dtype=torch.int32)
    count = torch.ones(B, dtype=torch.int32)
    offset = 0
    if B > 1:
        start[0], count[-1], offset = 0, 0, -1
    if scaled_counts:
        return Where(start.to(device), count.to(device), T, T, offset)
    return Where(start.to(device), (count * T).to(device), 1, T, offset)


def weights(g, N, K, kind, device, bias=True) -> tuple[Tensor, Tensor | None]:
    w = torch.randn(N, K, generator=g) / math.sqrt(K)
    b = torch.randn(N, generator=g)
    return w.to(device, kind), b.to(device, kind) if bias else None


def poisoned(device, kind, *shape) -> Tensor:
    return torch.full(shape, NAN, device=device, dtype=kind)


def close(actual: Tensor, expected: Tensor, kind: torch.dtype) -> None:
    """Equal NaNs (nothing written), and values within the tolerance of the kind."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.nan_to_num(), expected.nan_to_num()
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[kind]
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
    assert error <= bound, f"relative error {error:.1e}"


def spoil(stream: Stream, where: Where) -> None:
    """NaN in the rows that are padding."""
    padding = ~where.real.to(stream.hidden.device)
    for x in (stream.hidden, stream.scaled, stream.squares):
        x[padding] = NAN


def run_project(ops, stream, where, w, bias, width, ring_lo) -> tuple[Tensor, Tensor]:
    """plain, its padding rows NaN, and the ring of 16 slots."""
    kind, device = w.dtype, w.device
    plain = poisoned(device, kind, len(stream.scaled), len(w) - width)
    ring = poisoned(device, kind, len(where.start), 16, width)
    ops.project(
        stream.scaled, stream.squares, EPS, w, bias, plain, ring, where.start, where.count,
        where.scale, ring_lo=ring_lo, **where.keywords,
    )  # fmt: skip
    plain[~where.real.to(device)] = NAN
    return plain, ring


def dense_project(stream, where, w, bias, width, ring_lo) -> tuple[Tensor, Tensor]:
    """The same in fp64, a row at a time."""
    y = torch.einsum("mk,nk->mn", stream.normed(), w.double())
    y = (y if bias is None else y + bias.double()).view(len(where.start), where.T, -1)
    plain = poisoned("cpu", torch.float64, *y.shape[:2], y.shape[2] - width)
    ring = poisoned("cpu", torch.float64, len(where.start), 16, width)
    for b, row in enumerate(where.positions):
        for t, at in enumerate(row):
            if at is not None:
                ring[b, at % 16] = y[b, t, ring_lo : ring_lo + width]
                plain[b, t] = torch.cat([y[b, t, :ring_lo], y[b, t, ring_lo + width :]])
    return plain.flatten(0, 1), ring


SHAPES = [(72, 40, 13, 9), (576, 97, 40, 57), (128, 64, 30, 34), (513, 33, 20, 0)]


@pytest.mark.parametrize(("kind", "bias"), KIND_AND_BIAS)
def test_project(case, device, kind, bias) -> None:
    ops, M = case
    K, N, width, ring_lo = SHAPES[(M + bias) % 4]
    g = generator(M, bias)
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    where = draw_where(g, M, device, bias)
    spoil(stream, where)
    w, b = weights(g, N, K, kind, device, bias)
    expected = run_project(REFERENCE, stream, where, w, b, width, ring_lo)
    actual = run_project(ops, stream, where, w, b, width, ring_lo)
    for one, other in zip(actual, expected, strict=True):
        close(one, other, kind)


@pytest.mark.parametrize("M", [1, 3, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_reference_project(M, bias) -> None:
    K, N, width, ring_lo = SHAPES[(M + bias) % 4]
    g = generator(M, bias)
    stream = draw_stream(g, M, K, torch.float64, "cpu", 5)
    where = draw_where(g, M, "cpu")
    w, b = weights(g, N, K, torch.float64, "cpu", bias)
    actual = run_project(REFERENCE, stream, where, w, b, width, ring_lo)
    expected = dense_project(stream, where, w, b, width, ring_lo)
    for one, other in zip(actual, expected, strict=True):
        close(one, other, torch.float64)


HEADS = [(3, 1, 16), (2, 2, 48), (4, 2, 64), (3, 3, 24)]


def draw_rotations(g, P, device) -> tuple[Tensor, Tensor]:
    angle = 6 * torch.rand(64, P // 2, generator=g, dtype=torch.float64)
    kind = torch.float64 if device == "fp64" else torch.float32
    place = "cpu" if device == "fp64" else device
    return angle.cos().to(place, kind), angle.sin().to(place, kind)


def run_qkv(ops, stream, where, w, bias, rotations, H, HK, P) -> list[Tensor]:
    """q and both caches, NaN where not written."""
    kind, device = w.dtype, w.device
    q = poisoned(device, kind, len(stream.scaled), H * P)
    keys, values = (poisoned(device, kind, len(where.start), HK, 64, P) for _ in range(2))
    ops.project_qkv(
        stream.scaled, stream.squares, EPS, w, bias, *rotations, q, keys, values, where.start,
        where.count, where.scale, **where.keywords,
    )  # fmt: skip
    return [q, keys, values]


@pytest.mark.parametrize(("kind", "bias"), KIND_AND_BIAS)
def test_project_qkv(case, device, kind, bias) -> None:
    ops, M = case
    H, HK, P = HEADS[(M // 2 + bias) % 4] if M <= 32 else HEADS[0]
    g, K = generator(M, bias, 1), 72
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    where = draw_where(g, M, device, bias)
    spoil(stream, where)
    w, b = weights(g, (H + 2 * HK) * P, K, kind, device, bias)
    rotations = draw_rotations(g, P, device)
    expected = run_qkv(REFERENCE, stream, where, w, b, rotations, H, HK, P)
    actual = run_qkv(ops, stream, where, w, b, rotations, H, HK, P)
    for one, other in zip(actual, expected, strict=True):
        close(one, other, kind)


@pytest.mark.parametrize("M", [2, 33])
@pytest.mark.parametrize("heads", HEADS)
def test_reference_project_qkv(M, heads) -> None:
    """Rotation as a complex product of the two halves."""
    H, HK, P = heads
    g, K = generator(M, P), 72
    stream = draw_stream(g, M, K, torch.float64, "cpu")
    where = draw_where(g, M, "cpu")
    w, b = weights(g, (H + 2 * HK) * P, K, torch.float64, "cpu")
    cos, sin = draw_rotations(g, P, "fp64")
    actual = run_qkv(REFERENCE, stream, where, w, b, (cos, sin), H, HK, P)
    expected = [torch.full_like(x, NAN) for x in actual]
    y = (stream.normed() @ w.T + b).view(len(where.start), where.T, -1, P)
    for b, row in enumerate(where.positions):
        for t, at in enumerate(row):
            if at is None:
                continue
            turned = torch.complex(*y[b, t].chunk(2, -1)) * torch.complex(cos[at], sin[at])
            turned = torch.cat([turned.real, turned.imag], -1)
            expected[0][b * where.T + t] = turned[:H].flatten()
            expected[1][b, :, at], expected[2][b, :, at] = turned[H : H + HK], y[b, t, H + HK :]
    for one, other in zip(actual, expected, strict=True):
        close(one, other, torch.float64)


def run_residual(ops, x, w, bias, stream) -> list[Tensor]:
    """hidden, scaled and the sum of squares."""
    M, N = stream.hidden.shape
    hidden, scaled = stream.hidden.clone(), torch.full_like(stream.hidden, NAN)
    squares = poisoned(w.device, stream.squares.dtype, M, ops.square_pieces(M, N))
    ops.add_residual(x, w, bias, hidden, stream.gain, scaled, squares)
    return [hidden, scaled, squares.sum(1)]


@pytest.mark.parametrize(("kind", "bias"), KIND_AND_BIAS)
def test_add_residual(case, device, kind, bias) -> None:
    ops, M = case
    K, N, *_ = SHAPES[(M + bias) % 4]
    g = generator(M, bias, 2)
    stream = draw_stream(g, M, N, kind, device)
    x = torch.randn(M, K, generator=g).to(device, kind)
    if M > 2:
        x[1] = NAN  # padding
    w, b = weights(g, N, K, kind, device, bias)
    expected = run_residual(REFERENCE, x, w, b, stream)
    for one, other in zip(run_residual(ops, x, w, b, stream), expected, strict=True):
        close(one, other, kind)


def test_reference_add_residual() -> None:
    g, K, N = generator(3), 72, 40
    stream = draw_stream(g, 5, N, torch.float64, "cpu")
    x = torch.randn(5, K, generator=g, dtype=torch.float64)
    w, b = weights(g, N, K, torch.float64, "cpu")
    hidden = stream.hidden + torch.stack([(w * row).sum(1) for row in x]) + b
    expected = [hidden, hidden * stream.gain, hidden.norm(dim=1) ** 2]
    actual = run_residual(REFERENCE, x, w, b, stream)
    for one, other in zip(actual, expected, strict=True):
        close(one, other, torch.float64)


def run_swiglu(ops, stream, w) -> Tensor:
    out = poisoned(w.device, w.dtype, len(stream.scaled), len(w) // 2)
    ops.swiglu(stream.scaled, stream.squares, EPS, w, out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_swiglu(case, device, kind) -> None:
    ops, M = case
    K, N, *_ = SHAPES[M % 4]
    g = generator(M, 4)
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    if M > 2:
        stream.scaled[1] = NAN
    w, _ = weights(g, 2 * N, K, kind, device)
    close(run_swiglu(ops, stream, w), run_swiglu(REFERENCE, stream, w), kind)


def test_reference_swiglu() -> None:
    g = generator(5)
    stream = draw_stream(g, 7, 72, torch.float64, "cpu", 4)
    w, _ = weights(g, 80, 72, torch.float64, "cpu")
    gate, up = stream.normed() @ w[:40].T, stream.normed() @ w[40:].T
    close(run_swiglu(REFERENCE, stream, w), gate / (1 + (-gate).exp()) * up, torch.float64)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", [None, 90, 97, 128])
def test_head(case, device, kind, V) -> None:
    """Only the last row of every three is read, out of wider tensors."""
    ops, M = case
    K, N = (72, 97) if M != 33 else (72, 1100)
    g = generator(M, 6)
    stream = draw_stream(g, 3 * M, K, kind, device, ops.square_pieces(3 * M, K))
    scaled, squares = stream.scaled, stream.squares
    for x in (scaled, squares):
        x[0::3], x[1::3] = NAN, NAN
    w, _ = weights(g, N, K, kind, device)
    expected = run_head(REFERENCE, scaled[2::3], squares[2::3], w, V)
    actual = run_head(ops, scaled[2::3], squares[2::3], w, V)
    close(actual[0].clamp(min=-1e4), expected[0].clamp(min=-1e4), torch.float32)
    assert torch.equal(actual[0].isinf(), expected[0].isinf())
    if V is None:
        assert torch.equal(actual[1], expected[1])


def test_reference_head() -> None:
    g = generator(7)
    stream = draw_stream(g, 6, 72, torch.float64, "cpu", 3)
    w, _ = weights(g, 97, 72, torch.float64, "cpu")
    y = stream.normed() @ w.T
    best, token = run_head(REFERENCE, stream.scaled, stream.squares, w)
    close(best, y.max(1).values, torch.float64)
    assert token.tolist() == y.argmax(1).tolist()
    for V in (90, 97):
        close(run_head(REFERENCE, stream.scaled, stream.squares, w, V)[0], y[:, :V], torch.float64)
    wider = run_head(REFERENCE, stream.scaled, stream.squares, w, 128)[0]
    assert (wider[:, 97:] == float("-inf")).all()


@pytest.mark.parametrize("M", [1, 5, 33])
def test_the_lowest_of_equal_tokens_wins(ops, device, M) -> None:
    """Equal columns in one piece and in pieces far apart."""
    g = generator(M, 8)
    stream = draw_stream(g, M, 16, torch.float32, device)
    w, _ = weights(g, 1200, 16, torch.float32, device)
    w[[45, 47, 1100]] = 9 * stream.scaled[:1].sign()
    token = run_head(ops, stream.scaled[:1].expand(M, -1), stream.squares[:1].expand(M, -1), w)[1]
    assert token.tolist() == [45] * M


@pytest.mark.parametrize("pieces", [1, 3, 1024, 2500])
def test_pick(ops, device, pieces) -> None:
    g = generator(pieces)
    best = torch.randint(0, 4, (3, pieces), generator=g).float().to(device)
    index = torch.arange(pieces, dtype=torch.int32, device=device) * 16 + 3
    index = index.expand(3, -1).contiguous()
    tokens, expected = (torch.zeros(3, dtype=torch.int32, device=device) for _ in range(2))
    ops.pick(best, index, tokens)
    REFERENCE.pick(best, index, expected)
    first = [16 * row.index(max(row)) + 3 for row in best.tolist()]
    assert tokens.tolist() == expected.tolist() == first


@pytest.mark.parametrize("kind", KINDS)
def test_embed(case, device, kind) -> None:
    """Tokens are a piece of wider rows; ids outside the table are clamped."""
    ops, M = case
    (B, T), D = WINDOWS[M], (72, 130)[M % 2]
    g = generator(M, 9)
    table, gain = torch.randn(97, D, generator=g), torch.randn(D, generator=g)
    table, gain = table.to(device, kind), gain.to(device, kind)
    wider = torch.randint(-3, 101, (B, T + 4), generator=g, dtype=torch.int32).to(device)
    results = []
    for one in (ops, REFERENCE):
        hidden, scaled = poisoned(device, kind, 2, M, D)
        squares = poisoned(device, torch.float32, M, one.square_pieces(M, D))
        one.embed(wider[:, 2 : 2 + T], table, gain, hidden, scaled, squares)
        results.append((hidden, scaled, squares.sum(1)))
    rows = torch.tensor([min(max(i, 0), 96) for i in wider[:, 2 : 2 + T].flatten().tolist()])
    (hidden, scaled, squares), expected = results
    assert torch.equal(hidden, expected[0]) and torch.equal(hidden.cpu(), table.cpu()[rows])
    assert torch.equal(scaled, expected[1])
    close(squares, expected[2], torch.float32)
    close(squares, table.double().cpu()[rows].pow(2).sum(1), torch.float32)


def all_products(ops, stream, weights, x, m: slice) -> list[Tensor]:
    """Results [rows, ...] of every product for some of the rows, each in a window of its own."""
    w, w_qkv, w_mlp, w_out = weights
    some = Stream(*(t[m].contiguous() for t in stream[:3]), stream.gain)
    rows = len(some.scaled)
    ints = {"dtype": torch.int32, "device": w.device}
    where = Where(torch.arange(3, 60, **ints)[m], torch.ones(rows, **ints), 1, 1, 0)
    plain, ring = run_project(ops, some, where, w, None, 20, 0)
    rotations = draw_rotations(generator(1), 16, w.device)
    q, keys, _ = run_qkv(ops, some, where, w_qkv, None, rotations, 1, 1, 16)
    narrow = Stream(*(t[m, :24].contiguous() for t in stream[:3]), stream.gain[:24])
    hidden, scaled, squares = run_residual(ops, x[m].contiguous(), w_out, None, narrow)
    best, token = run_head(ops, some.scaled, some.squares, w)
    (logits,) = run_head(ops, some.scaled, some.squares, w, 60)
    mlp = run_swiglu(ops, some, w_mlp)
    return [plain, ring, q, keys, hidden, scaled, squares, best, token, logits, mlp]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("exact", "lots"), [(True, [(0, 1), (7, 9)]), (False, [(5, 8)])])
def test_a_row_is_bitwise_the_same_alone_and_among_sixteen(device, kind, exact, lots) -> None:
    """Without `exact` only from three rows on."""
    ops, K, g = TritonOps(exact), 520, generator(exact)
    stream = draw_stream(g, 16, K, kind, device, ops.square_pieces(16, K))
    x = torch.randn(16, K, generator=g).to(device, kind)
    sizes = [(50, K), (48, K), (34, K), (24, K)]
    w = [weights(g, N, k, kind, device)[0] for N, k in sizes]
    whole = all_products(ops, stream, w, x, slice(0, 16))
    for first, last in lots:
        part = all_products(ops, stream, w, x, slice(first, last))
        for one, other in zip(part, whole, strict=True):
            other = other[first:last]
            assert torch.equal(one.isnan(), other.isnan())
            assert torch.equal(one.nan_to_num(), other.nan_to_num())
