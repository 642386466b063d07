"""Products with weights of 8 bits: Triton against the reference in fp32 with the same numbers.

Errors are relative to the largest expected value, with the bounds of `test_linear_kernels`: 1e-5
where x is fp32, and 2^-7 where it is bf16 (SiLU(gate) * up of products that are rounded once more:
2^-6). The reference is compared with fp64 there and in `test_byte_matrix`.
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
    Stream,
    Where,
    all_close,
    close,
    draw_conv,
    draw_rotations,
    draw_stream,
    draw_where,
    generator,
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

from mambactl.kernels.byte_matrix import ByteMatrix, quantise  # noqa: E402
from mambactl.kernels.decode.triton.ops import TritonOps  # noqa: E402
from mambactl.kernels.sequence import byte_matrix as kernel  # noqa: E402

pytestmark = pytest.mark.one_in(8)


CASES = [
    ("fast", 1, BF16, True), ("fast", 2, FP32, False), ("fast", 3, BF16, True),
    ("fast", 16, FP32, False), ("exact", 1, BF16, True), ("exact", 2, FP32, False),
    *[("steps", M, KINDS[M // 2 % 2], M % 2 == 0) for M in (1, 2, 4, 5, 7, 8, 16)],
    ("steps", 1, FP32, True), ("steps", 2, BF16, False),
    ("steps", 17, BF16, True), ("steps", 32, BF16, False), ("steps", 33, FP32, True),
    ("steps", 40, BF16, False),
]  # fmt: skip
SHAPES = [(72, 40, 13, 9), (576, 33, 20, 0), (128, 64, 30, 34), (136, 37, 20, 17)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-{str(c[2])[6:]}")
def case(request, device) -> Case:
    way, *rest = request.param
    return Case(WAYS[way](), *rest)


@pytest.fixture(params=["fp8", "int8"])
def stored(request) -> str:
    return request.param


def draw(g, N: int, K: int, device: str, like: torch.dtype, stored: str, bias: bool = True):
    """Rows of several magnitudes, one of them zero, in 8 bits, and a bias."""
    w, b = weights(g, N, K, torch.float32, "cpu", bias)
    w *= torch.exp2(torch.randint(-3, 4, (N, 1), generator=g).float())
    w[N // 2] = 0
    found = quantise(w, stored)
    b = None if b is None else b.to(device, like)
    return ByteMatrix(found.values.to(device), found.scale.to(device)), b


def test_project(case, device, stored) -> None:
    ops, M, kind, bias = case
    K, N, width, ring_lo = SHAPES[M % 4]
    g = generator(M, bias, 21)
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    where = draw_where(g, M, device, bias)
    spoil(stream, where)
    rest = (stream, where, *draw(g, N, K, device, kind, stored, bias), width, ring_lo)
    conv = draw_conv(g, where, width, kind, device)
    all_close(run_project(ops, *rest, conv), run_project(REFERENCE, *rest, conv), kind)


def test_project_qkv(case, device, stored) -> None:
    ops, M, kind, bias = case
    H, HK, P = HEADS[M % 4] if M <= 32 else (2, 1, 16)
    g, K = generator(M, bias, 22), 72
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    where = draw_where(g, M, device, bias)
    spoil(stream, where)
    matrix, b = draw(g, (H + 2 * HK) * P, K, device, kind, stored, bias)
    cosines = draw_rotations(g, P, device)
    # in fp64: bf16 heads are rounded before and after their rotation, by the reference as well
    exact = Stream(*(t.double() for t in stream)), where, matrix, b if b is None else b.double()
    expected = run_qkv(REFERENCE, *exact, [t.double() for t in cosines], H, HK, P)
    all_close(run_qkv(ops, stream, where, matrix, b, cosines, H, HK, P), expected, kind)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_add_residual(case, device, stored, parts) -> None:
    """Up to three products, whose weights have scales of their own."""
    ops, M, kind, bias = case
    K, N, *_ = SHAPES[M % 4]
    g = generator(M, bias, 23)
    stream = draw_stream(g, M, N, kind, device)
    depths = [K, 48, 80][:parts]
    xs = [torch.randn(M, k, generator=g).to(device, kind) for k in depths]
    if M > 2:
        xs[0][1] = NAN  # padding
    (w, b), *others = [draw(g, N, k, device, kind, stored, bias) for k in depths]
    beside = [(x, matrix) for x, (matrix, _) in zip(xs[1:], others, strict=True)]
    expected = run_residual(REFERENCE, xs[0], w, b, stream, beside)
    all_close(run_residual(ops, xs[0], w, b, stream, beside), expected, kind)


def test_swiglu(case, device, stored) -> None:
    ops, M, kind, _ = case
    K, N, *_ = SHAPES[M % 4]
    g = generator(M, 24)
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    if M > 2:
        stream.scaled[1] = NAN
    w, _ = draw(g, 2 * N, K, device, kind, stored)
    close(run_swiglu(ops, stream, w), run_swiglu(REFERENCE, stream, w), kind, 2 if M > 16 else 1)


@pytest.mark.parametrize("M", [1, 4, 16, 40])
@pytest.mark.parametrize("power", [-60, 30])
def test_a_stream_of_any_magnitude_stays_in_range(device, stored, M, power) -> None:
    """The norm undoes a factor of 2^30 or 2^-60, which fp16 does not hold."""
    ops, g, K = TritonOps(), generator(M, 25), 72
    drawn = draw_stream(g, M, K, BF16, device, ops.square_pieces(M, K))
    factor = 2.0**power
    stream = Stream(drawn.hidden, drawn.scaled * factor, drawn.squares * factor**2, drawn.gain)
    w, _ = draw(g, 96, K, device, BF16, stored)
    actual = torch.empty(M, 48, dtype=BF16, device=device)
    expected = torch.empty_like(actual)
    # an eps that does not matter beside the squares
    for run, out in ((ops, actual), (REFERENCE, expected)):
        run.swiglu(stream.scaled, stream.squares, 0.0, w, out)
    close(actual, expected, BF16, 2 if M > 16 else 1)


@pytest.mark.parametrize("M", [1, 3, 17])
def test_large_activations_of_an_output_projection(device, stored, M) -> None:
    """Activations of 500,000, beyond the range of fp16, do not overflow."""
    ops, g, K, N = TritonOps(), generator(M, 26), 72, 40
    stream = draw_stream(g, M, N, BF16, device)
    x = torch.randn(M, K, generator=g).to(device, BF16)
    x[:, 3] = 500_000
    w, _ = draw(g, N, K, device, BF16, stored)
    expected = run_residual(REFERENCE, x, w, None, stream)
    all_close(run_residual(ops, x, w, None, stream), expected, BF16)


def every_product(ops, stream, x, matrices, m: slice) -> list[Tensor]:
    """Results [rows, ...] of each product for some of the rows, each in a window of its own."""
    w, w_qkv, w_mlp, w_out = matrices
    some = Stream(*(t[m].contiguous() for t in stream[:3]), stream.gain)
    rows = len(some.scaled)
    ints = {"dtype": torch.int32, "device": x.device}
    where = Where(torch.arange(3, 60, **ints)[m], torch.ones(rows, **ints), 1, 1, 0)
    plain, ring = run_project(ops, some, where, w, None, 20, 0)
    rotations = draw_rotations(generator(1), 16, x.device)
    q, keys, _ = run_qkv(ops, some, where, w_qkv, None, rotations, 1, 1, 16)
    narrow = Stream(*(t[m, :24].contiguous() for t in stream[:3]), stream.gain[:24])
    out = run_residual(ops, x[m].contiguous(), w_out, None, narrow)
    return [plain, ring, q, keys, *out, run_swiglu(ops, some, w_mlp)]


@pytest.mark.parametrize(
    ("exact", "rows", "lots"), [(True, 16, [(0, 1), (7, 9)]), (False, 8, [(2, 7)])]
)
def test_a_row_is_bitwise_the_same_alone_and_among_others(
    device, stored, exact, rows, lots
) -> None:
    ops, K, g = TritonOps(exact), 520, generator(exact, 27)
    stream = draw_stream(g, rows, K, BF16, device, ops.square_pieces(rows, K))
    x = torch.randn(rows, K, generator=g).to(device, BF16)
    matrices = [draw(g, N, K, device, BF16, stored)[0] for N in (50, 48, 34, 24)]
    whole = every_product(ops, stream, x, matrices, slice(0, rows))
    for first, last in lots:
        part = every_product(ops, stream, x, matrices, slice(first, last))
        for one, other in zip(part, whole, strict=True):
            same(one, other[first:last])


@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 33, 17), (19, 300, 70), (40, 64, 33), (130, 136, 65)]
)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", [BF16, torch.float16])
def test_products_of_many_rows(device, stored, M, K, N, added, kind) -> None:
    """Against fp64 with the weights that 8 bits hold, rows of x of magnitudes from 2^-40 to 2^15.

    fp16 holds those from 2^-14 on. 2^-8 of a row's largest, which is one rounding to bf16.
    """
    g = generator(M, added, 28)
    matrix, _ = draw(g, N, K, device, kind, stored)
    lowest = -40 if kind == BF16 else -6
    powers = torch.linspace(lowest, 5, M).round()[:, None]
    x = (torch.randn(M, K, generator=g) * torch.exp2(powers)).to(device, kind)
    wide = torch.full((M, K + 3), NAN, device=device, dtype=kind)
    wide[:, :K] = x
    before = torch.randn(M, N, generator=g).to(device, kind) if added else None
    y = kernel.product(wide[:, :K], matrix, before)
    expected = x.double() @ matrix.dense(torch.float64).T
    expected = expected if before is None else expected + before.double()
    assert y.dtype == kind and y.shape == (M, N)
    error = (y.double() - expected).abs().amax(1) / expected.abs().amax(1)
    assert error.max() <= 2**-8


def test_more_rows_and_other_types_are_the_librarys(device, stored) -> None:
    """With weights that are rounded to the type of x."""
    g = generator(29)
    matrix, _ = draw(g, 40, 48, device, FP32, stored)
    for rows, kind, bound in ((kernel.MOST_ROWS + 1, BF16, 2**-8), (5, FP32, 1e-5)):
        x = torch.randn(rows, 48, generator=g).to(device, kind)
        y = kernel.product(x, matrix)
        expected = x.double() @ matrix.dense(kind).double().T
        assert y.dtype == kind
        assert (y.double() - expected).abs().max() / expected.abs().max() <= bound


def test_halves_are_exact_in_each_row(device) -> None:
    """Zero rows stay zero, and no factor leaves a row beyond fp16."""
    x = torch.tensor([[1.0, -3, 2**-20], [0, 0, 0], [3e38, -1e30, 0], [2**-90, 0, -(2**-95)]])
    half, factor = kernel.halved(x.to(device, BF16))
    assert half.dtype == torch.float16 and torch.isfinite(half).all()
    back = half.double().cpu() / factor.double().cpu()[:, None]
    # 1e30 is less than 2^-28 of what stands beside it
    kept = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]])
    assert torch.equal(back * kept, x.to(BF16).double() * kept)
