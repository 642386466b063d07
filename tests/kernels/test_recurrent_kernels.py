"""Mamba mixers in a decode pass: Triton against the reference, and that against the mixers.

Errors are relative to the largest expected value. Reference against a mixer's whole-sequence form
in fp64: 1e-11. Kernels in fp32: 2e-5, as exponentials and sums of up to 48 terms differ in their
last bits. In bf16 outputs 2^-7 (two roundings), states 2e-5, in native Mamba-1, whose step sizes
come out of rounded numbers, 2^-7. How tokens are cut into windows must not change a bit, except in
the closed form of Mamba-2, where it may change the last of an output's bits (2^-7).
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from mambactl.kernels.decode.reference.linear import convolved, ring_rows, segment_positions  # noqa: E402
from mambactl.kernels.decode.reference.ops import ReferenceOps  # noqa: E402
from mambactl.kernels.decode.triton import ops as triton_ops  # noqa: E402
from mambactl.kernels.decode.triton.ops import TritonOps  # noqa: E402
from mambactl.models.mixers.mamba1 import Mamba1Mixer, Mamba1Settings  # noqa: E402
from mambactl.models.mixers.mamba2 import Mamba2Mixer  # noqa: E402
from mambactl.models.mixers.mamba2_decode import Mamba2Settings  # noqa: E402
from mambactl.models.mixers.spec import StepContext  # noqa: E402

# of softplus, whose other branch is taken then
pytestmark = [
    pytest.mark.one_in(6),
    pytest.mark.filterwarnings("ignore:divide by zero"),
    pytest.mark.filterwarnings("ignore:invalid value"),
]

NAN, SLOTS, HIDDEN = float("nan"), 16, 20
REFERENCE = ReferenceOps()
KINDS = [torch.float32, torch.bfloat16]
FORMS = {
    "mamba2": Mamba2Settings(2, 24, 12, x_heads=1, b_groups=1, c_groups=2, norm_groups=2),
    # a head wider than a program, normed by a kernel of its own
    "mamba2-wide": Mamba2Settings(2, 72, 12, x_heads=2, b_groups=1, c_groups=2, norm_groups=2),
    "mamba2-grouped": Mamba2Settings(2, 16, 40, 2, b_groups=2, c_groups=1, norm_groups=1),
    "native": Mamba1Settings(40, dt_rank=3, d_state=5, native=True),
    "attention": Mamba1Settings(48, dt_rank=20, d_state=6, x_dim=24, repeat_width=12),
}


@dataclass
class Segment:
    """The position of a pass; n_new[b] = count[b] * scale."""

    start: Tensor
    count: Tensor
    scale: int
    base: Tensor
    base_next: Tensor
    T: int
    offset: int = 0

    @property
    def n_new(self) -> list[int]:
        return (self.count * self.scale).tolist()


class Layer:
    """A mixer with random weights and the way a pass calls its kernels."""

    def __init__(self, name: str, kind: torch.dtype, device: str, seed: int = 0):
        self.sizes = s = FORMS[name]
        self.kind, self.device, self.mamba2 = kind, device, name.startswith("mamba2")
        config = SimpleNamespace(hidden_size=HIDDEN)
        self.mixer = (Mamba2Mixer if self.mamba2 else Mamba1Mixer)(config, s).to(torch.float64)
        self._randomize(torch.Generator().manual_seed(seed))
        self.mixer.to(kind).to(device)
        # rows of in_proj outside the gate go to the ring
        n_z = s.d_inner
        native = not self.mamba2 and s.native
        self.gate = slice(n_z, 2 * n_z) if native else slice(0, n_z)
        self.kept = slice(0, n_z) if native else slice(n_z, sum(s.in_rows))
        self.state_shape = (s.d_inner, s.d_state)
        if self.mamba2:
            self.state_shape = (s.n_heads, s.d_state, s.head_dim)
        self.low_width = s.dt_rank + 2 * s.d_state if native else 0
        # columns that the input projection hands over convolved
        self.mixed_width = s.conv_dim if self.mamba2 else s.d_inner if native else 0

    @torch.no_grad()
    def _randomize(self, g: torch.Generator) -> None:
        for name, parameter in self.mixer.named_parameters():
            noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            if name.endswith(("A_log", "bias")):
                parameter.copy_(0.5 * noise)
            elif name.endswith(("norm.weight", "D")):
                parameter.copy_(1 + 0.2 * noise)
            else:
                fan = 4 if "conv" in name else parameter.shape[-1]
                parameter.copy_(1.5 * noise / math.sqrt(fan))

    @property
    def fp32(self) -> torch.dtype:
        return torch.float64 if self.kind == torch.float64 else torch.float32

    def run(self, ops, ring, mixed, low, z, state, out, w: Segment) -> None:
        m, s = self.mixer, self.sizes
        where = {"T": w.T, "offset": w.offset}
        conv = m.conv1d.weight.detach()[:, 0].contiguous(), m.conv1d.bias.detach()
        A, D = -m.A_log.detach().to(self.fp32).exp(), m.D.detach().to(self.fp32)
        walk = (w.start, w.count, w.base, w.base_next, w.scale)
        if self.mamba2:
            by_head = s.norm_groups == s.n_heads
            gain = m.norm.weight.detach()
            ops.mamba2(
                ring, mixed, z, state, A, D, m.dt_bias.detach().to(self.fp32),
                gain if by_head else None, s.norm_eps, out, *walk, x_heads=s.x_heads,
                b_groups=s.b_groups, c_groups=s.c_groups, **where,
            )  # fmt: skip
            if not by_head:
                ops.grouped_norm(out, gain, s.norm_eps, s.norm_groups)
            return
        if s.native:
            ops.mamba1_low(mixed, m.x_proj.weight.detach(), low, w.start, w.count, w.scale, **where)
        ops.mamba1(
            ring, *((mixed, low) if s.native else (None, None)), z, state, *conv,
            m.dt_proj.weight.detach(), m.dt_proj.bias.detach(), A, D, out, *walk,
            piece=s.d_inner if s.native else s.repeat_width,
            repeat=1 if s.native else s.d_inner // s.x_dim, **where,
        )  # fmt: skip

    def convolve(self, ring: Tensor, mixed: Tensor, w: Segment) -> None:
        """SiLU(conv) at the window's slots of `mixed`, as the input projection leaves it."""
        if not self.mixed_width:
            return
        conv = self.mixer.conv1d
        at, real = segment_positions(w.start, w.count, w.scale, T=w.T, offset=w.offset)
        for b, t in real.nonzero().tolist():
            last = int(at[b, t])
            raw = ring_rows(ring[b], last - 3, last + 1)[..., : self.mixed_width]
            row = convolved(raw, conv.weight.detach()[:, 0], conv.bias.detach())[0, 0]
            mixed[b, last % SLOTS] = row.to(mixed.dtype)


@dataclass
class Text:
    """The input projection's output for all positions of B sequences, and states to start at."""

    layer: Layer
    raw: Tensor  # [B, L, C]
    z: Tensor  # [B, L, inner]
    state: Tensor

    @classmethod
    def draw(cls, layer: Layer, length: int, batch: int = 3, seed: int = 0) -> "Text":
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(batch, length, HIDDEN, generator=g, dtype=torch.float64)
        state = torch.randn(batch, *layer.state_shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            y = layer.mixer.in_proj(hidden.to(layer.device, layer.kind))
        state = state.to(layer.device, layer.fp32)
        return cls(layer, y[..., layer.kept], y[..., layer.gate], state)


class Held:
    """Rings and states of one walk; every slot that a pass must not read is NaN."""

    def __init__(self, text: Text, ops, state: Tensor | None = None):
        self.text, self.ops, self.layer = text, ops, text.layer
        self.state = (text.state if state is None else state).clone()
        # convolved columns and those of x_proj by position, as passes have written them
        self.mixed, self.low = (
            torch.full((*text.raw.shape[:2], width), NAN).to(text.raw)
            for width in (self.layer.mixed_width, self.layer.low_width)
        )

    def run(self, w: Segment, drafts: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Outputs [B, T, inner] of a pass; rows `drafts` and `z` [B, T, ...] if not the text's."""
        raw, batch = self.text.raw.clone(), len(self.state)
        rows = [[begin + w.offset + t for t in range(w.T)] for begin in w.start.tolist()]
        gate = torch.full((batch, w.T, self.text.z.shape[2]), NAN).to(raw)
        for b, t in [(i, t) for i in range(batch) for t in range(w.n_new[i])]:
            at = rows[b][t]
            if at < 0:
                continue
            gate[b, t] = self.text.z[b, at] if z is None else z[b, t]
            if drafts is not None:
                raw[b, at] = drafts[b, t]
        ring, mixed, low = self._rings(raw, w)
        self.layer.convolve(ring, mixed, w)
        out = torch.full_like(gate, NAN)
        gate = gate.flatten(0, 1)
        self.layer.run(self.ops, ring, mixed, low, gate, self.state, out.view_as(gate), w)
        for b in range(batch):
            for at in range(max(rows[b][0], 0), rows[b][0] + w.n_new[b]):
                self.low[b, at] = low[b, at % SLOTS]
                self.mixed[b, at] = mixed[b, at % SLOTS]
        return out

    def _rings(self, raw: Tensor, w: Segment) -> tuple[Tensor, Tensor, Tensor]:
        ring, mixed, low = (
            torch.full((len(raw), SLOTS, width), NAN).to(raw)
            for width in (raw.shape[2], self.layer.mixed_width, self.layer.low_width)
        )
        for b, begin in enumerate((w.start + w.offset).tolist()):
            last = begin + w.n_new[b]
            assert last - int(w.base[b]) + 3 <= SLOTS
            for at in range(max(int(w.base[b]) - 3, 0), last):
                ring[b, at % SLOTS] = raw[b, at]
                if int(w.base[b]) <= at < begin:
                    low[b, at % SLOTS] = self.low[b, at]
                    mixed[b, at % SLOTS] = self.mixed[b, at]
        return ring, mixed, low


def ints(*values: int, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.nan_to_num(), expected.nan_to_num()
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
    assert error <= bound, f"relative error {error:.1e}"


def same(actual: Tensor, expected: Tensor) -> None:
    """Bitwise, NaN equal to NaN."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


def plain(text: Text, ops, begins: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Outputs [B, length, inner] and the states after them: token by token, stored after each."""
    held, outputs = Held(text, ops), []
    for i in range(length):
        here = ints(*[begin + i for begin in begins], device=text.layer.device)
        outputs.append(held.run(Segment(here, torch.ones_like(here), 1, here, here + 1, 1)))
    return torch.cat(outputs, 1), held.state


def speculate(
    text: Text, ops, begins: list[int], length: int, seed: int, T: int = 5
) -> tuple[Tensor, Tensor]:
    """The same by windows of T tokens of which some are rejected, with flushes at any phase."""
    held, g, batch = Held(text, ops), torch.Generator().manual_seed(seed), len(begins)
    y = torch.full((batch, length, text.z.shape[2]), NAN).to(text.z)
    start, base = list(begins), list(begins)
    ends = [begin + length for begin in begins]
    while base != ends:
        live = [int(at < end) for at, end in zip(base, ends, strict=True)]
        drafts, z = (
            torch.randn(batch, T, x.shape[2], generator=g).to(x) for x in (text.raw, text.z)
        )
        kept, moved = [0] * batch, list(base)
        for b in (b for b in range(batch) if live[b]):
            at, ahead = start[b], min(ends[b] - start[b], T)
            kept[b] = int(torch.randint(0, ahead, (), generator=g)) + 1 if ahead else 0
            drafts[b, : kept[b]] = text.raw[b, at : at + kept[b]]
            z[b, : kept[b]] = text.z[b, at : at + kept[b]]
            # what the next pass replays must fit the ring with its window
            least = at if ahead == 0 else min(max(at + kept[b] + T + 3 - SLOTS, base[b]), at)
            moved[b] = int(torch.randint(least, at + 1, (), generator=g))
            if kept[b] == T and at + T < ends[b]:
                moved[b] = at + T
        before = held.state.clone()
        indices = (ints(*x, device=text.layer.device) for x in (start, live, base, moved))
        where, count, first, then = indices
        out = held.run(Segment(where, count, T, first, then, T), drafts, z)
        for b in range(batch):
            at = start[b] - begins[b]
            y[b, at : at + kept[b]] = out[b, : kept[b]]
            assert live[b] or out[b].isnan().all()
            assert base[b] != moved[b] or torch.equal(held.state[b], before[b])
        base, start = moved, [a + k for a, k in zip(start, kept, strict=True)]
    return y, held.state


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, torch.float32) for name in FORMS] + [("native", torch.bfloat16)],
)
def test_windows_rejections_and_flushes_do_not_change_a_bit(device, name, kind) -> None:
    """From the beginning, and past the end of the ring."""
    begins, length = [0, 13], 5
    text = Text.draw(Layer(name, kind, device), 26, len(begins), seed=len(name))
    y, state = plain(text, TritonOps(), begins, length)
    assert not y.isnan().any() and not state.isnan().any()
    walked = speculate(text, TritonOps(), begins, length, seed=len(name))
    same(walked[0], y)
    same(walked[1], state)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("T", [1, 5])
def test_reference_is_what_the_mixer_computes(name, T) -> None:
    length = 21
    layer = Layer(name, torch.float64, "cpu", seed=T)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, length + 6, HIDDEN, generator=g, dtype=torch.float64)
    with torch.no_grad():
        expected = layer.mixer.features(hidden, StepContext(torch.zeros(3, length + 6), None, None))
        y = layer.mixer.in_proj(hidden)
    state = torch.zeros(3, *layer.state_shape, dtype=torch.float64)
    text = Text(layer, y[..., layer.kept], y[..., layer.gate], state)
    by_token = plain(text, REFERENCE, [0] * 3, length)
    for outputs, last in (by_token, speculate(text, REFERENCE, [0] * 3, length, T, T)):
        close(outputs, expected[:, :length], 1e-11)
        close(last, by_token[1], 1e-11)


def both(text: Text, w: Segment) -> list[tuple[Tensor, Tensor]]:
    """Outputs and states of kernel and reference for one window, replaying the text."""
    results = []
    for ops in (TritonOps(), REFERENCE):
        held = Held(text, ops)
        g = torch.Generator().manual_seed(5)
        held.low, held.mixed = (
            torch.randn(t.shape, generator=g).to(t) for t in (held.low, held.mixed)
        )
        results.append((held.run(w), held.state))
    return results


def check(text: Text, w: Segment, name: str, kind: torch.dtype) -> None:
    (y, state), (expected, after) = both(text, w)
    rough = kind == torch.bfloat16
    close(y, expected, 2**-7 if rough else 2e-5)
    close(state, after, 2**-7 if rough and name == "native" else 2e-5)
    for b, n in enumerate(w.n_new):
        kept = n == 0 or w.base[b] == w.base_next[b]
        assert torch.equal(state[b], text.state[b]) == bool(kept)
        begin = int(w.start[b]) + w.offset
        written = [t < n and begin + t >= int(w.base[b]) for t in range(w.T)]
        assert (~y[b].isnan().any(1)).tolist() == written


# accepted tokens after a window of K = 4, and where the state goes meanwhile
PHASES = [(n, flush) for n in range(5) for flush in ("kept", "moved", "middle", "end")]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_accepted_count_and_flush(device, name, kind) -> None:
    text = Text.draw(Layer(name, kind, device, 1), 60, seed=1)
    step = 7 if kind == torch.bfloat16 else 3
    for i, (accepted, flush) in enumerate(PHASES[::step]):
        T, g = i % 5 + 1, torch.Generator().manual_seed(i)
        start = torch.randint(0, 50, (3,), generator=g, dtype=torch.int32)
        start[0] = i % 2
        base = (start - 1 - accepted).clamp(min=0)
        count = torch.ones(3, dtype=torch.int32)
        count[i % 3] = 0
        scale = T
        if i % 2:
            count, scale = count * (T - i % T), 1
        middle, end = (base + start) // 2, start + count * scale
        base_next = {"kept": base, "moved": start, "middle": middle, "end": end}[flush]
        index = [x.to(device) for x in (start, count, base, base_next)]
        check(text, Segment(*index[:2], scale, *index[2:], T), name, kind)


@pytest.fixture
def closed(monkeypatch) -> None:
    """The closed form of Mamba-2 for few sequences as well."""
    monkeypatch.setattr(triton_ops, "CLOSED_FORM_FROM", 1)


CLOSED = [name for name in FORMS if name.startswith("mamba2")]


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_at_every_accepted_count_and_flush(device, name, closed, monkeypatch) -> None:
    monkeypatch.setattr(triton_ops.mamba2_step, "mamba2_segment", None)
    test_every_accepted_count_and_flush(device, name, torch.bfloat16)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_through_windows_rejections_and_flushes(device, name, closed) -> None:
    begins, length = [0, 13], 9
    text = Text.draw(Layer(name, torch.bfloat16, device), 30, len(begins), seed=len(name))
    y, state = plain(text, REFERENCE, begins, length)
    walked = speculate(text, TritonOps(), begins, length, seed=len(name))
    close(walked[0], y, 2**-7)
    close(walked[1], state, 2e-5)


def test_closed_form_forgets_all_and_keeps_the_rest_exact(device, closed) -> None:
    """A token that leaves nothing of the state, in the replay and among the new ones."""
    layer = Layer("mamba2", torch.bfloat16, device, 4)
    text = Text.draw(layer, 40, seed=4)
    text.raw[:, [9, 14], -layer.sizes.n_heads :] = 3e4
    start, base = ints(12, 13, 11, device=device), ints(8, 10, 11, device=device)
    w = Segment(start, torch.ones_like(start), 5, base, start, 5)
    (y, state), (expected, after) = both(text, w)
    close(y, expected, 2**-7)
    close(state, after, 2e-5)


def test_exact_ops_walk_through_the_tokens(device, closed, monkeypatch) -> None:
    monkeypatch.setattr(triton_ops.mamba2_closed, "mamba2_closed", None)
    text = Text.draw(Layer("mamba2", torch.bfloat16, device), 20, seed=6)
    begins = ints(3, 4, 5, device=device)
    w = Segment(begins, torch.ones_like(begins), 1, begins, begins, 1)
    out = Held(text, TritonOps(exact=True)).run(w)
    close(out, Held(text, REFERENCE).run(w), 2**-7)


@pytest.mark.parametrize("name", FORMS)
def test_windows_that_begin_before_position_0(device, name) -> None:
    text = Text.draw(Layer(name, torch.float32, device, 2), 30, seed=2)
    start, base = ints(0, 1, 0, device=device), ints(0, 0, 0, device=device)
    for T, offset, counts in ((1, -2, (1, 1, 1)), (2, -1, (1, 1, 0)), (5, -2, (1, 1, 1))):
        w = Segment(start, ints(*counts, device=device), T, base, base, T, offset)
        (y, state), (expected, after) = both(text, w)
        close(y, expected, 2e-5)
        same(state, after)
        first = [max(-int(at) - offset, 0) for at in start]
        for b, n in enumerate(w.n_new):
            assert (~y[b].isnan().any(1)).tolist() == [first[b] <= t < n for t in range(T)]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_reading_a_token_again(device, name, kind) -> None:
    """Two tokens from one back, with the ring written again, and one token: the same bits."""
    text = Text.draw(Layer(name, kind, device, 3), 40, seed=3)
    here, ones = ints(17, 6, 33, device=device), ints(1, 1, 1, device=device)
    base = here - ints(4, 1, 0, device=device)
    # what a pass over the replayed tokens wrote of them
    before, begin = Held(text, TritonOps()), here - 4
    before.run(Segment(begin, ones, 4, begin, begin, 4))
    results = []
    middle = torch.maximum(torch.minimum(here - 1, base + 2), base)
    for T, offset, next_base in ((1, 0, base), (2, -1, base), (2, -1, middle)):
        held = Held(text, TritonOps())
        held.low, held.mixed = before.low.clone(), before.mixed.clone()
        results.append(held.run(Segment(here, ones, T, base, next_base, T, offset)))
    once, twice, flushed = results
    same(twice[:, 1:], once)
    same(flushed, twice)
    assert twice[2, 0].isnan().all() and not twice[:2].isnan().any()
