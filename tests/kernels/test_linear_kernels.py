"""Matrix products of a decode pass: Triton against the reference, and that against fp64.

Errors are relative to the largest expected value. Reference in fp64: 1e-12 (another order of
sums). Kernels in fp32: 1e-5, because sums of up to 576 products run in another order. Kernels in
bf16: 2^-7, two roundings of half an ulp each; the library's products round once more than ours,
which for SiLU(gate) * up, of two such factors, makes 2^-6. Logits 1e-5, as they are not rounded.
"""

import pytest
import torch
from kernels.products import (
    BF16,
    FP32,
    HEADS,
    KINDS,
    NAN,
    REFERENCE,
    SEGMENTS,
    all_close,
    close,
    draw_conv,
    draw_rotations,
    draw_stream,
    draw_where,
    generator,
    poisoned,
    run_head,
    run_project,
    run_qkv,
    run_residual,
    run_swiglu,
    same,
    spoil,
    weights,
)
from torch import Tensor

triton = pytest.importorskip("triton")

from kernels.ways import WAYS, Case  # noqa: E402

from mambactl.kernels.decode.triton.gemv import tiles_for  # noqa: E402
from mambactl.kernels.decode.triton.ops import TritonOps  # noqa: E402

pytestmark = pytest.mark.one_in(6)


CASES = [
    ("fast", 1, BF16, True), ("fast", 2, FP32, False), ("fast", 3, BF16, True),
    ("fast", 16, FP32, False), ("exact", 1, FP32, True), ("exact", 2, BF16, False),
    *[("steps", M, KINDS[M // 2 % 2], M % 2 == 0) for M in range(1, 9)],
    ("steps", 1, BF16, False), ("steps", 2, FP32, True), ("steps", 16, BF16, True),
    # the library's, but for residuals of up to 32 rows
    ("steps", 17, BF16, True), ("steps", 32, FP32, False), ("steps", 33, FP32, True),
    ("steps", 40, BF16, False),
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-{str(c[2])[6:]}")
def case(request, device) -> Case:
    way, *rest = request.param
    return Case(WAYS[way](), *rest)


@pytest.fixture(scope="module")
def ops(device) -> TritonOps:
    return TritonOps()


def dense_project(stream, where, w, bias, width, ring_lo, conv) -> list[Tensor]:
    """The same in fp64, a row at a time."""
    y = torch.einsum("mk,nk->mn", stream.normed(), w.double())
    y = (y if bias is None else y + bias.double()).view(len(where.start), where.T, -1)
    plain = poisoned("cpu", torch.float64, *y.shape[:2], y.shape[2] - width)
    channels = len(conv.weight)
    mixed, ring = poisoned("cpu", torch.float64, *y.shape[:2], channels), conv.ring.clone()
    for b, row in enumerate(where.positions):
        for t, at in enumerate(row):
            if at is not None:
                ring[b, at % 16] = y[b, t, ring_lo : ring_lo + width]
                plain[b, t] = torch.cat([y[b, t, :ring_lo], y[b, t, ring_lo + width :]])
                x = conv.bias + sum(
                    ring[b, (at - 3 + i) % 16, :channels] * conv.weight[:, i]
                    for i in range(4) if at - 3 + i >= 0
                )  # fmt: skip
                mixed[b, t] = x / (1 + (-x).exp())
    return [plain.flatten(0, 1), ring, mixed.flatten(0, 1)]


SHAPES = [(72, 40, 13, 9), (576, 33, 20, 0), (128, 64, 30, 34), (136, 37, 20, 17)]


def test_project(case, device) -> None:
    ops, M, kind, bias = case
    K, N, width, ring_lo = SHAPES[M % 4]
    g = generator(M, bias)
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    where = draw_where(g, M, device, bias)
    spoil(stream, where)
    w, b = weights(g, N, K, kind, device, bias)
    rest = (stream, where, w, b, width, ring_lo)
    conv = draw_conv(g, where, width, kind, device)
    convolved = run_project(ops, *rest, conv)
    all_close(convolved, run_project(REFERENCE, *rest, conv), kind)
    if kind == FP32:
        plain, ring = run_project(ops, *rest)
        same(plain, convolved[0])
        same(ring, torch.where(conv.ring.isnan(), convolved[1], NAN))


@pytest.mark.parametrize(("M", "bias"), [(1, False), (3, True), (33, False), (40, True)])
def test_reference_project(M, bias) -> None:
    K, N, width, ring_lo = SHAPES[M % 4]
    g = generator(M, bias)
    stream = draw_stream(g, M, K, torch.float64, "cpu", 5)
    where = draw_where(g, M, "cpu")
    w, b = weights(g, N, K, torch.float64, "cpu", bias)
    conv = draw_conv(g, where, width, torch.float64, "cpu")
    rest = (stream, where, w, b, width, ring_lo)
    expected = dense_project(*rest, conv)
    all_close(run_project(REFERENCE, *rest, conv), expected, torch.float64)
    ring = torch.where(conv.ring.isnan(), expected[1], NAN)
    all_close(run_project(REFERENCE, *rest), [expected[0], ring], torch.float64)


def test_project_qkv(case, device) -> None:
    ops, M, kind, bias = case
    H, HK, P = HEADS[M % 4] if M <= 32 else (2, 1, 16)
    g, K = generator(M, bias, 1), 72
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    where = draw_where(g, M, device, bias)
    spoil(stream, where)
    w, b = weights(g, (H + 2 * HK) * P, K, kind, device, bias)
    rest = (stream, where, w, b, draw_rotations(g, P, device), H, HK, P)
    all_close(run_qkv(ops, *rest), run_qkv(REFERENCE, *rest), kind)


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
            rotated = torch.complex(*y[b, t].chunk(2, -1)) * torch.complex(cos[at], sin[at])
            rotated = torch.cat([rotated.real, rotated.imag], -1)
            expected[0][b * where.T + t] = rotated[:H].flatten()
            expected[1][b, :, at], expected[2][b, :, at] = rotated[H : H + HK], y[b, t, H + HK :]
    all_close(actual, expected, torch.float64)


def test_add_residual(case, device) -> None:
    ops, M, kind, bias = case
    K, N, *_ = SHAPES[M % 4]
    g = generator(M, bias, 2)
    stream = draw_stream(g, M, N, kind, device)
    x = torch.randn(M, K, generator=g).to(device, kind)
    if M > 2:
        x[1] = NAN  # padding
    w, b = weights(g, N, K, kind, device, bias)
    expected = run_residual(REFERENCE, x, w, b, stream)
    all_close(run_residual(ops, x, w, b, stream), expected, kind)


def test_reference_add_residual() -> None:
    g, K, N = generator(3), 72, 40
    stream = draw_stream(g, 5, N, torch.float64, "cpu")
    x = torch.randn(5, K, generator=g, dtype=torch.float64)
    w, b = weights(g, N, K, torch.float64, "cpu")
    hidden = stream.hidden + torch.stack([(w * row).sum(1) for row in x]) + b
    expected = [hidden, hidden * stream.gain, hidden.norm(dim=1) ** 2]
    all_close(run_residual(REFERENCE, x, w, b, stream), expected, torch.float64)


def test_swiglu(case, device) -> None:
    ops, M, kind, _ = case
    K, N, *_ = SHAPES[M % 4]
    g = generator(M, 4)
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    if M > 2:
        stream.scaled[1] = NAN
    w, _ = weights(g, 2 * N, K, kind, device)
    close(run_swiglu(ops, stream, w), run_swiglu(REFERENCE, stream, w), kind, 2 if M > 16 else 1)


def test_reference_swiglu() -> None:
    g = generator(5)
    stream = draw_stream(g, 7, 72, torch.float64, "cpu", 4)
    w, _ = weights(g, 80, 72, torch.float64, "cpu")
    gate, up = (stream.normed() @ half.T for half in w.chunk(2))
    close(run_swiglu(REFERENCE, stream, w), gate / (1 + (-gate).exp()) * up, torch.float64)


def test_head(case, device) -> None:
    """Only the last row of every three is read, out of wider tensors."""
    ops, M, kind, _ = case
    K, N = (72, 97) if M != 33 else (72, 1100)
    g = generator(M, 6)
    stream = draw_stream(g, 3 * M, K, kind, device, ops.square_pieces(3 * M, K))
    scaled, squares = stream.scaled, stream.squares
    for x in (scaled, squares):
        x[0::3], x[1::3] = NAN, NAN
    w, _ = weights(g, N, K, kind, device)
    # the best token, and logits of a vocabulary that is smaller, the same or larger
    for V in (None, (90, N, N + 31)[M % 3]):
        expected = run_head(REFERENCE, scaled[2::3], squares[2::3], w, V)
        actual = run_head(ops, scaled[2::3], squares[2::3], w, V)
        assert torch.equal(actual[0].isinf(), expected[0].isinf())
        close(actual[0].clamp(min=-1e4), expected[0].clamp(min=-1e4), FP32)
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


@pytest.mark.parametrize("pieces", [1, 3, 2500])
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


@pytest.mark.parametrize("M", [1, 5, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_embed(ops, device, kind, M) -> None:
    """Tokens are a piece of wider rows; ids outside the table are clamped."""
    (B, T), D = SEGMENTS[M], (72, 130)[M % 2]
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


def test_which_rows_are_the_librarys() -> None:
    names = ("project", "project_qkv", "add_residual", "swiglu", "head")
    for rows in range(1, 17):
        for exact in (False, True):
            assert all(tiles_for(name, rows, exact) for name in names)
    for rows in (17, 32):
        assert [name for name in names if tiles_for(name, rows)] == ["add_residual"]
    assert not any(tiles_for(name, rows, exact) for name in names for rows in (33, 99))
    one_way = {tiles_for("project", rows, exact=True) for rows in range(1, 17)}
    assert len(one_way) == 1
