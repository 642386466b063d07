"""Decode attention to a window with sinks, its keys in a ring, against a dense softmax in fp64.

The bounds are those of test_attention_kernel.py. Whatever no query sees is NaN: slots that were
never written, and those that hold a position which has left every window.
"""

from typing import NamedTuple

import pytest
import torch
from kernels.products import (
    HEADS,
    KINDS,
    NAN,
    REFERENCE,
    all_close,
    close,
    draw_rotations,
    draw_stream,
    draw_where,
    generator,
    run_qkv,
    spoil,
    weights,
)
from torch import Tensor

triton = pytest.importorskip("triton")

from mambactl.kernels.decode.reference import decode_attention as reference  # noqa: E402
from mambactl.kernels.decode.reference import recurrent  # noqa: E402
from mambactl.kernels.decode.reference.slots import positions_held, slot_of  # noqa: E402
from mambactl.kernels.decode.triton import decode_attention as kernel  # noqa: E402
from mambactl.kernels.decode.triton.ops import TritonOps  # noqa: E402
from mambactl.kernels.decode.triton.rotate import rotate as rotate_kernel  # noqa: E402
from mambactl.kernels.reference import rotate_states  # noqa: E402

pytestmark = pytest.mark.one_in(3)

FUNCTIONS = [reference.decode_attention, kernel.decode_attention]


class Case(NamedTuple):
    """Text [B, Hk, N, P] by position, the queries [B, T, H, P] at its end, and where they stand."""

    q: Tensor
    keys: Tensor
    values: Tensor
    start: Tensor
    count: Tensor
    window: int
    sinks: int

    @property
    def T(self) -> int:
        return self.q.shape[1]

    def seen(self, position: int) -> list[int]:
        near = range(max(position - self.window + 1, 0), position + 1)
        return sorted({*range(min(self.sinks, position + 1)), *near})

    def piece(self, first: int, length: int) -> "Case":
        count = (self.count - first).clamp(0, length)
        q = self.q[:, first : first + length]
        return self._replace(q=q, start=self.start + first, count=count)


def draw(device, starts, counts, T, window, sinks, kind=torch.float32, seed=0, P=16) -> Case:
    g = torch.Generator().manual_seed(seed)
    B, heads, kv_heads = len(starts), 4, 2
    q = 2 * torch.randn(B, T, heads, P, generator=g)
    for b, count in enumerate(counts):
        q[b, count:] = NAN
    text = torch.randn(2, B, kv_heads, max(starts) + T, P, generator=g)
    q, keys, values = (x.to(device, kind) for x in (q, *text))
    where = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, counts))
    return Case(q, keys, values, *where, window, sinks)


def fill(case: Case, text: Tensor, ring: int) -> Tensor:
    """The cache [B, Hk, sinks + ring, P] with NaN in all that no query sees."""
    B, Hk, _, P = text.shape
    cache = torch.full((B, Hk, case.sinks + ring, P), NAN, device=text.device, dtype=text.dtype)
    for b in range(B):
        begin, count = int(case.start[b]), int(case.count[b])
        indices = {at for position in range(begin, begin + count) for at in case.seen(position)}
        for at in sorted(indices):
            slot = int(slot_of(torch.tensor(at), case.sinks, ring))
            assert cache[b, :, slot].isnan().all(), "two positions that are seen share a slot"
            cache[b, :, slot] = text[b, :, at]
    return cache


def run(function, case: Case, ring: int, block_k: int = 16) -> Tensor:
    """The output [B, T, H, P], which held NaN before."""
    B, T, H, P = case.q.shape
    keys, values = (fill(case, text, ring) for text in (case.keys, case.values))
    counter = torch.zeros(B * 2 * 8, dtype=torch.int32, device=case.q.device)
    flat = case.q.reshape(B * T, H * P).contiguous()
    out = torch.full_like(flat, NAN)
    function(
        flat, keys, values, case.start, case.count, 1, out, None, counter, T=T, splits=1,
        window=case.window, sinks=case.sinks, ring=ring, block_k=block_k,
    )  # fmt: skip
    return out.view(B, T, H, P)


def check(actual: Tensor, case: Case) -> None:
    group = case.q.shape[2] // case.keys.shape[1]
    for b, count in enumerate(case.count.tolist()):
        assert actual[b, count:].isnan().all()
        for t in range(count):
            at = case.seen(int(case.start[b]) + t)
            keys, values = (
                x[b, :, at].double().repeat_interleave(group, 0) for x in (case.keys, case.values)
            )  # [H, n, P]
            scores = torch.einsum("hp,hnp->hn", case.q[b, t].double(), keys)
            weight = (scores / case.q.shape[3] ** 0.5).softmax(-1)
            y, size = (torch.einsum("hn,hnp->hp", weight, v) for v in (values, values.abs()))
            bound = 2e-6 * size.max()
            if actual.dtype == torch.bfloat16:
                bound = bound + 2**-8 * (size + y.abs())
            assert ((actual[b, t].double() - y).abs() <= bound).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("window", "sinks"), [(1, 2), (7, 3), (16, 4), (33, 16), (20, 0)])
def test_a_window_with_sinks_in_the_smallest_ring(device, function, kind, window, sinks) -> None:
    for T in (1, 3, 6):
        starts, counts = [0, 2, 15, 16, 49, 130], [T, T, 1, T, 0, T]
        case = draw(device, starts, counts, T, window, sinks, kind, seed=window + T)
        check(run(function, case, window + T - 1), case)


@pytest.mark.parametrize("block_k", [16, 64])
@pytest.mark.parametrize("ring", [30, 64, 100])
def test_rings_and_blocks_of_any_size(device, ring, block_k) -> None:
    starts = [0, 3, 4, 5, 16, 27, 28, 63, 64, 99, 100, 101, 160]
    case = draw(device, starts, [2] * len(starts), 2, 29, 4, seed=ring)
    check(run(kernel.decode_attention, case, ring, block_k), case)


@pytest.mark.parametrize("block_k", [16, 64])
@pytest.mark.parametrize("sinks", [16, 17, 70])
def test_sinks_may_fill_several_blocks(device, sinks, block_k) -> None:
    """The window stands among them, partly, and in the first block behind them and later ones."""
    starts = [0, 15, 40, sinks - 1, sinks, sinks + 9, 80, 95, 200]
    case = draw(device, starts, [3] * len(starts), 3, 11, sinks, seed=sinks)
    check(run(kernel.decode_attention, case, 13, block_k), case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [3, 35])
def test_a_row_comes_out_the_same_however_tokens_are_grouped(device, kind, sinks) -> None:
    case = draw(device, [12, 46, 0, 77], [6, 3, 6, 5], 6, 9, sinks, kind, seed=2)
    whole = run(kernel.decode_attention, case, 32)
    check(whole, case)
    for cuts in ([1] * 6, [4, 2]):
        firsts = [sum(cuts[:i]) for i in range(len(cuts))]
        pieces = [
            run(kernel.decode_attention, case.piece(a, n), 32)
            for a, n in zip(firsts, cuts, strict=True)
        ]
        assert torch.equal(torch.cat(pieces, 1).nan_to_num(9e9), whole.nan_to_num(9e9))


def test_what_a_ring_holds(device) -> None:
    """Written one by one, as passes write."""
    for sinks, ring in ((0, 5), (3, 7), (4, 16)):
        written = torch.full((1, sinks + ring), -1)
        for end in range(1, 40):
            at = torch.tensor(end - 1)
            written[0, slot_of(at, sinks, ring)] = at
            held = positions_held(torch.tensor([end]), sinks + ring, sinks, ring)
            assert torch.equal(held, written)


def test_sinks_need_one_split(device) -> None:
    case = draw(device, [5], [1], 1, 4, 2)
    rest = (case.start, case.count, 1, case.q.flatten(1), None, None)
    with pytest.raises(ValueError, match="sinks"):
        kernel.decode_attention(
            case.q.flatten(1), case.keys, case.values, *rest, T=1, splits=2, window=4, sinks=2,
            ring=16,
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 4, 7, 33])
def test_keys_and_values_go_to_their_slots(device, kind, M) -> None:
    """One row a program, and the library's product for many rows."""
    H, HK, P = HEADS[M % 4] if M <= 32 else (2, 1, 16)
    g, K, sinks, ring = generator(M, 7), 72, 6, 11
    ops = TritonOps()
    stream = draw_stream(g, M, K, kind, device, ops.square_pieces(M, K))
    where = draw_where(g, M, device)
    spoil(stream, where)
    w, b = weights(g, (H + 2 * HK) * P, K, kind, device)
    rest = (stream, where, w, b, draw_rotations(g, P, device), H, HK, P)
    whole = run_qkv(REFERENCE, *rest)
    for one in (ops, REFERENCE):
        found = run_qkv(one, *rest, sinks=sinks, ring=ring)
        expected = [whole[0], *(torch.full_like(x, NAN) for x in whole[1:])]
        for b, row in enumerate(where.positions):
            for at in filter(lambda at: at is not None, row):
                slot = at if at < sinks else sinks + at % ring
                for to, of in zip(expected[1:], whole[1:], strict=True):
                    to[b, :, slot] = of[b, :, at]
        all_close(found, expected, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("groups", "size"), [(1, 2), (3, 6), (5, 16)])
def test_states_turn_by_their_positions(device, kind, groups, size) -> None:
    """The kernel against the reference, and that against the mixer's rotation in fp64."""
    slots, other = 16, 5
    for M in (1, 4, 7, 33):
        g = generator(M, groups)
        where = draw_where(g, M, "cpu")
        cos, sin = draw_rotations(g, size, "fp64")
        cos[:, 0], sin[:, 0] = 1, 0
        ring = torch.full((len(where.start), slots, other + groups * size), NAN).double()
        expected = ring.clone()
        for b, row in enumerate(where.positions):
            for at in filter(lambda at: at is not None, row):
                new = torch.randn(ring.shape[2], generator=g, dtype=torch.float64)
                ring[b, at % slots] = new
                rotation = tuple(x[at].repeat(2)[None, None] for x in (cos, sin))
                states = new[other:].view(1, 1, groups, size)
                expected[b, at % slots] = torch.cat(
                    [new[:other], rotate_states(states, rotation).flatten()]
                )
        rest = {"T": where.T, "offset": where.offset, "groups": groups}
        found = ring.clone()
        recurrent.rotate(found, cos, sin, where.start, where.count, where.scale, **rest)
        close(found, expected, torch.float64)
        ours, theirs = ring.to(device, kind), ring.to(device, kind)
        tables = [x.float().to(device).contiguous() for x in (cos, sin)]
        at = [x.to(device) for x in (where.start, where.count)]
        rotate_kernel(ours, *tables, *at, where.scale, **rest, pdl=False)
        recurrent.rotate(theirs, *tables, *at, where.scale, **rest)
        close(ours, theirs, kind)
