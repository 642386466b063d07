"""Attentions beside a recurrence in its launches: against the reference, and against separate ones.

Tolerances are those of `test_linear_kernels`. What a launch computes for each part must be what
the part's own launch computes, bit for bit where nothing but the launch differs.
"""

from collections.abc import Sequence

import pytest
import torch
from kernels.products import (
    BF16,
    EPS,
    FP32,
    REFERENCE,
    all_close,
    close,
    draw_conv,
    draw_rotations,
    draw_stream,
    draw_where,
    generator,
    poisoned,
    run_project,
    run_qkv,
    same,
    spoil,
    weights,
)
from torch import Tensor

triton = pytest.importorskip("triton")

from mambactl.kernels.decode.operations import AttentionArguments  # noqa: E402
from mambactl.kernels.decode.triton.ops import TritonOps  # noqa: E402

pytestmark = pytest.mark.one_in(6)

# query heads, KV heads, window and sinks (0: every position in a slot of its own)
NEAR, FAR, ONE = (4, 2, 5, 2), (3, 1, 0, 0), (1, 1, 0, 0)
# rows, kind, width of heads, bias, attentions
CASES = [
    (1, BF16, 16, False, (FAR, NEAR)), (2, FP32, 48, False, (FAR,)),
    (3, BF16, 16, True, (NEAR, FAR)), (6, FP32, 16, True, (ONE, NEAR)),
    (16, FP32, 16, True, (NEAR,)),
    # the library's product: too many rows, or heads that programs would cut
    (17, FP32, 16, True, (NEAR,)), (4, BF16, 24, True, (NEAR, FAR)),
]  # fmt: skip


def arguments(
    shapes: Sequence[tuple[int, ...]], rows: int, batch: int, P: int, kind, device
) -> list[AttentionArguments]:
    """Attentions whose tensors hold NaN; rings have 24 slots."""
    found = []
    for heads, kv_heads, window, sinks in shapes:
        ring = 24 if window else 0
        keys, values = (
            poisoned(device, kind, batch, kv_heads, sinks + ring or 64, P) for _ in range(2)
        )
        q, out = (poisoned(device, kind, rows, heads * P) for _ in range(2))
        splits = 1 if window else 4
        partial = poisoned(device, FP32, batch * kv_heads * rows * heads * splits * (P + 2))
        counter = torch.zeros(batch * kv_heads * rows * heads, dtype=torch.int32, device=device)
        found.append(
            AttentionArguments(
                q, keys, values, out, partial, counter, splits, window, sinks, ring
            )  # fmt: skip
        )
    return found


@pytest.mark.parametrize(("M", "kind", "P", "bias", "shapes"), CASES)
def test_project(device, M, kind, P, bias, shapes) -> None:
    ops, K, own, width, ring_lo = TritonOps(), 72, 40, 13, 9
    g = generator(M, P)
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    where = draw_where(g, M, device, bias)
    spoil(stream, where)
    batch = len(where.start)
    rotations = draw_rotations(g, P, device)
    conv = draw_conv(g, where, width, kind, device)
    sizes = [each.rows for each in arguments(shapes, M, batch, P, kind, device)]
    w, b = weights(g, own + sum(sizes), K, kind, device, bias)
    done = []
    for each in (ops, REFERENCE):
        beside = arguments(shapes, M, batch, P, kind, device)
        results = run_project(
            each, stream, where, w, b, width, ring_lo, conv, rotation=rotations, beside=beside
        )
        done.append([*results, *(t for args in beside for t in args[:3])])
    all_close(*done, kind)
    # the same as launches of their own
    alone = run_project(
        REFERENCE, stream, where, w[:own], None if b is None else b[:own], width, ring_lo, conv
    )
    all_close(done[0][:3], alone, kind)
    first = own
    for shape, args, rows in zip(shapes, beside, sizes, strict=True):
        rest = slice(first, first + rows)
        slots = {"sinks": shape[3], "ring": args.ring, "slots": args.keys.shape[2]}
        expected = run_qkv(
            REFERENCE, stream, where, w[rest], None if b is None else b[rest], rotations,
            *shape[:2], P, **slots,
        )  # fmt: skip
        for actual, other in zip(args[:3], expected, strict=True):
            same(actual, other)
        first += rows


@pytest.mark.parametrize(
    ("M", "kind"), [(1, BF16), (2, FP32), (5, BF16), (16, FP32), (32, BF16), (33, FP32)]
)
def test_add_residual_of_several_products(device, M, kind) -> None:
    ops, N = TritonOps(), 136
    g = generator(M, 7)
    stream = draw_stream(g, M, N, kind, device)
    depths = (72, 40, 24)[: 2 + M % 2]
    (w, bias), *others = (weights(g, N, K, kind, device) for K in depths)
    x, *xs = (torch.randn(M, K, generator=g).to(device, kind) for K in depths)
    beside = [(other, weight) for other, (weight, _) in zip(xs, others, strict=True)]
    done = []
    for each in (ops, REFERENCE):
        hidden, scaled = stream.hidden.clone(), torch.full_like(stream.hidden, float("nan"))
        squares = poisoned(device, stream.squares.dtype, M, each.square_pieces(M, N))
        each.add_residual(x, w, bias, hidden, stream.gain, scaled, squares, beside=beside)
        done.append([hidden, scaled, squares.sum(1)])
    all_close(*done, kind)
    exact = bias.double() + sum(a.double() @ b.double().T for a, b in ((x, w), *beside))
    close(done[0][0], stream.hidden.double() + exact, kind)


def recurrence(g, batch: int, T: int, kind, device) -> tuple[list[Tensor], dict[str, int]]:
    """Arguments of `mamba2` up to `eps`, for four heads of 16 on a state of 12."""
    H, P, N, slots = 4, 16, 12, 16

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    channels = 2 * P + N + 4 * N
    ring, mixed = draw(batch, slots, channels + H).to(kind), draw(batch, slots, channels).to(kind)
    state = draw(batch, H, N, P)
    parts = [ring, mixed, draw(batch * T, H * P).to(kind), state, -draw(H).exp(), draw(H), draw(H)]
    return [*parts, (1 + draw(H * P) / 5).to(kind)], {"x_heads": 2, "b_groups": 1, "c_groups": 4}


@pytest.mark.parametrize(
    ("batch", "T", "kind", "shapes"),
    [(1, 1, BF16, (NEAR,)), (2, 3, FP32, (FAR,)), (1, 9, BF16, (FAR, NEAR)),
     (2, 2, FP32, (NEAR, FAR)), (8, 2, BF16, (FAR, NEAR))],
)  # fmt: skip
def test_mamba2_and_attentions_are_those_of_their_own_launches(
    device, batch, T, kind, shapes
) -> None:
    """One sequence of several has ended."""
    ops, P, g = TritonOps(), 16, generator(batch, T)
    tensors, groups = recurrence(g, batch, T, kind, device)
    start = torch.randint(3, 9, (batch,), generator=g, dtype=torch.int32).to(device)
    count = torch.ones_like(start)
    if batch > 1:
        count[-1] = 0
    base, stored = start - 2, start
    found = arguments(shapes, batch * T, batch, P, kind, device)
    for args in found:
        args.q.copy_(torch.randn(args.q.shape, generator=g))
        # every slot that holds a position
        for t in (args.keys, args.values):
            t.copy_(torch.randn(t.shape, generator=g))
            if not args.ring:
                t[:, :, int(start.max()) + T :] = float("nan")
    done = []
    for together in (True, False):
        out = poisoned(device, kind, *tensors[2].shape)
        state = tensors[3].clone()
        call = [*tensors[:3], state, *tensors[4:], EPS, out, start, count, base, stored, T]
        where = {"T": T, "offset": 0}
        for args in found:
            args.out.fill_(float("nan"))
        ops.mamba2(*call, **where, **groups, beside=found if together else ())
        for args in () if together else found:
            ops.attention(
                args.q, args.keys, args.values, start, count, T, *args[3:6], splits=args.splits,
                window=args.window, sinks=args.sinks, ring=args.ring, **where,
            )  # fmt: skip
        assert not any(args.counter.any() for args in found)
        done.append([out, state, *(args.out.clone() for args in found)])
    for one, other in zip(*done, strict=True):
        same(one, other)
    assert not done[0][0][:T].isnan().any() and not done[0][2][:T].isnan().any()
