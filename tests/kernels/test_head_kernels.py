"""Norms, rotation and scale of queries and keys in place, and norms behind a mixer.

Against the reference, in fp32 and bf16; what no row owns stays as it was.
"""

import pytest
import torch
from kernels.products import BF16, EPS, FP32, REFERENCE, draw_rotations, draw_where, generator

triton = pytest.importorskip("triton")

from mambactl.kernels.decode.operations import AttentionArguments  # noqa: E402
from mambactl.kernels.decode.reference.slots import slot_of  # noqa: E402
from mambactl.kernels.decode.triton.ops import TritonOps  # noqa: E402
from mambactl.kernels.reference import rms_norm, rotated  # noqa: E402

# query heads, KV heads, window and sinks (0: every position in a slot of its own)
NEAR, FAR, ONE = (4, 2, 5, 2), (3, 1, 0, 0), (2, 2, 0, 0)
BOUND = {FP32: 2e-6, BF16: 2**-7}


def draw(g, shapes, M, batch, P, kind, device) -> list[AttentionArguments]:
    found = []
    for heads, kv_heads, window, sinks in shapes:
        ring = 24 if window else 0
        keys = torch.randn(batch, kv_heads, sinks + ring or 64, P, generator=g)
        q = torch.randn(M, heads * P, generator=g)
        q, keys = (t.to(device, kind) for t in (q, keys))
        found.append(AttentionArguments(q, keys, keys, q, q, q, 1, window, sinks, ring))
    return found


def copied(parts: list[AttentionArguments]) -> list[AttentionArguments]:
    return [part._replace(q=part.q.clone(), keys=part.keys.clone()) for part in parts]


def gains_of(g, parts, joint: bool, kind, device) -> list[tuple[torch.Tensor, ...]]:
    widths = [
        (p.q.shape[1], p.keys.shape[1] * p.keys.shape[3]) if joint else (p.keys.shape[3],) * 2
        for p in parts
    ]
    return [
        tuple((1 + 0.3 * torch.randn(n, generator=g)).to(device, kind) for n in pair)
        for pair in widths
    ]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("norm", ["none", "each", "joint"])
@pytest.mark.parametrize(
    ("M", "kind", "P", "shapes", "rotates", "factor"),
    [
        (1, FP32, 16, (NEAR,), True, 1.0), (3, BF16, 24, (FAR, NEAR), True, 0.3),
        (6, FP32, 12, (FAR,), False, 1.7), (5, FP32, 48, (ONE, NEAR), True, 1.0),
    ],
)  # fmt: skip
def test_settle_heads(device, norm, M, kind, P, shapes, rotates, factor) -> None:
    g = generator(M, P)
    where = draw_where(g, M, device)
    rotation = draw_rotations(g, P, device) if rotates else None
    parts = draw(g, shapes, M, len(where.start), P, kind, device)
    gains = [] if norm == "none" else gains_of(g, parts, norm == "joint", kind, device)
    done = []
    for ops in (TritonOps(), REFERENCE):
        own = copied(parts)
        ops.settle_heads(
            own, gains, EPS, factor, rotation, where.start, where.count, where.scale, T=where.T,
            offset=where.offset, joint=norm == "joint",
        )  # fmt: skip
        done.append(own)
    for ours, theirs, before in zip(*done, parts, strict=True):
        for name in ("q", "keys"):
            a, b, was = (getattr(each, name).float() for each in (ours, theirs, before))
            assert torch.equal(a == was, b == was)
            assert float((a - b).abs().max()) <= BOUND[kind] * float(b.abs().max())


def test_the_reference_is_the_models_own_norm() -> None:
    """Each head is normed by itself, then rotated as the model's attention does."""
    g = generator(2, 16)
    (part,) = draw(g, (NEAR,), 2, 2, 16, FP32, "cpu")
    (gains,) = gains_of(g, [part], False, FP32, "cpu")
    cos, sin = draw_rotations(g, 16, "cpu")
    start, count = torch.tensor([9, 3]), torch.tensor([1, 1])
    (own,) = copied([part])
    REFERENCE.settle_heads([own], [gains], EPS, 2.0, (cos, sin), start, count, 1, T=1, offset=0)
    wide = [torch.cat([t[start], t[start]], -1)[:, None] for t in (cos, sin)]
    wanted = 2 * rotated(rms_norm(part.q.view(2, 4, 16), gains[0], EPS), *wide)
    torch.testing.assert_close(own.q.view(2, 4, 16), wanted)
    slot, rows = slot_of(start, part.sinks, part.ring), torch.arange(2)
    wanted = rotated(rms_norm(part.keys[rows, :, slot], gains[1], EPS), *wide)
    torch.testing.assert_close(own.keys[rows, :, slot], wanted)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("M", "kind", "N"), [(1, FP32, 72), (5, BF16, 130)])
def test_add_normed(device, plain, M, kind, N) -> None:
    g = generator(M, N)
    hidden, branch = (torch.randn(M, N, generator=g).to(device, kind) for _ in range(2))
    weight, gain = (1 + 0.3 * torch.randn(2, N, generator=g)).to(device, kind)
    done = []
    for ops in (TritonOps(), REFERENCE):
        stream = hidden.clone()
        scaled = (branch.float() * weight.float()).to(kind)
        squares = torch.zeros(M, 3, device=device)
        squares[:, 1] = branch.float().square().sum(1)
        ops.add_normed(scaled, squares, EPS, stream, None if plain else gain, scaled, squares)
        done.append((stream, scaled, squares.sum(1)))
    for ours, theirs in zip(*done, strict=True):
        error = (ours.float() - theirs.float()).abs().max()
        assert float(error) <= BOUND[kind] * float(theirs.float().abs().max())
    stream, scaled, squares = done[1]
    wanted = hidden.float() + rms_norm(branch.float(), weight.float(), EPS)
    assert float((stream.float() - wanted).abs().max()) <= 4 * BOUND[kind] * float(
        wanted.abs().max()
    )
    rate = torch.rsqrt(squares / N + EPS)[:, None]
    read = wanted if plain else rms_norm(wanted, gain.float(), EPS)
    error = (scaled.float() * rate - read).abs().max()
    assert float(error) <= 4 * BOUND[kind] * float(read.abs().max())
