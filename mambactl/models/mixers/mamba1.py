"""Mamba-1 mixer (arXiv 2312.00752), attention-initialised (arXiv 2408.15237) or native.

native:    x, z = in_proj(u);  x = SiLU(conv(x));  dt, B, C = x_proj(x)
attention: z, x, B, C, dt = in_proj(u);  x repeated over query groups, x = SiLU(conv(x))
dt = softplus(dt_proj(dt));  S[d, n] = exp(-dt_d exp(A_log[d, n])) S[d, n] + dt_d B_n x_d
y_d = sum_n C_n S[d, n] + D_d x_d;  out = out_proj(y SiLU(z))
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambactl.errors import ModelError
from mambactl.kernels import dispatch
from mambactl.kernels import reference as kernels
from mambactl.kernels.decode.reference.recurrent import spread
from mambactl.models.cache import RecurrentCache
from mambactl.models.mixers import from_attention as start
from mambactl.models.mixers.modules import CausalConv, KeepsFloat32
from mambactl.models.mixers.settings import Mamba1Settings
from mambactl.models.mixers.sizes import Mamba1Sizes
from mambactl.models.mixers.spec import (
    AttentionWeights,
    Basis,
    DecoderConfig,
    HeadFit,
    MixerCost,
    MixerForm,
    MixerSpec,
    StepContext,
)
from mambactl.models.packed import (
    PackedRecurrence,
    PassContext,
    Projection,
    RecurrentState,
    Residual,
    Rotations,
    Segment,
    load_ring,
    packed_conv,
    state_dtype,
)
from mambactl.models.prompt_ends import PromptEnds
from mambactl.models.session_size import StateSize
from mambactl.present import of_kind, present

# operations per state element: those of Mamba-2, and every channel's own exponential
STATE_OPERATIONS = 7
# channels that the paper's public code pairs
PAIRED = 16
# a score that dt can express whatever the scale of v
SMALL_SCORE = 0.01


class Mamba1Mixer(KeepsFloat32):
    """Recurrent mixer with one decay per channel and state index."""

    A_log: nn.Parameter  # [Ch, N]
    D: nn.Parameter  # [Ch]

    def __init__(self, config: DecoderConfig, settings: Mamba1Settings):
        super().__init__()
        self.sizes = s = settings
        self.in_proj = nn.Linear(config.hidden_size, sum(s.in_rows), bias=s.proj_bias)
        self.conv1d = CausalConv(s.d_inner, s.d_conv, s.conv_bias)
        if s.native:
            self.x_proj = nn.Linear(s.d_inner, s.dt_rank + 2 * s.d_state, bias=False)
        self.dt_proj = nn.Linear(s.dt_rank, s.d_inner)
        for name, value in self.initial_values().items():
            self.register_parameter(name, nn.Parameter(value))
        self.out_proj = nn.Linear(s.d_inner, config.hidden_size, bias=s.proj_bias)

    def initial_values(self) -> dict[str, Tensor]:
        """Initial values of the mixer's own parameters, A_log [Ch, N] and D [Ch], both fp32."""
        s = self.sizes
        steps = torch.arange(1, s.d_state + 1, dtype=torch.float32)
        decay = steps.log().expand(s.d_inner, -1).contiguous()
        return {"A_log": decay, "D": torch.ones(s.d_inner, dtype=torch.float32)}

    def forward(self, hidden: Tensor, context: StepContext, cache: RecurrentCache | None) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        return self.out_proj(self.features(hidden, context, cache).to(hidden.dtype))

    def features(
        self, hidden: Tensor, context: StepContext, cache: RecurrentCache | None = None
    ) -> Tensor:
        """The input of out_proj [B, T, d_inner], on which the least-squares refit regresses."""
        kind = kernels.state_dtype(hidden)
        z, raw, projected = self._project(hidden)
        if cache is not None and cache.state is None:
            s, batch = self.sizes, hidden.shape[0]
            state = torch.zeros(batch, s.d_inner, s.d_state, dtype=kind, device=hidden.device)
            cache.start(state, raw.new_zeros(batch, s.d_conv - 1, s.d_inner))
        previous = None
        if cache is not None:
            previous = cache.conv_inputs(context.at, self.sizes.d_conv - 1)
        x = self.conv1d(raw, previous, context.seq_idx, context.sequential)  # [B, T, Ch]
        dt, B, C = self._selection(x, projected)
        y = self._recur(raw, previous, x, dt, B, C, context, cache)
        y = y + self.D.to(kind) * x.to(kind)
        return y * F.silu(z.to(kind))

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Gate z, conv input [B, T, Ch], and (B, C, dt) where in_proj makes them."""
        parts = self.in_proj(hidden).split(list(self.sizes.in_rows), -1)
        if self.sizes.native:
            return parts[1], parts[0], ()
        return parts[0], self._repeat(parts[1]), parts[2:]

    def _repeat(self, t: Tensor) -> Tensor:
        """Repeat pieces of `repeat_width` channels to d_inner: grouped queries share x and B."""
        s = self.sizes
        pieces = t.unflatten(-1, (-1, s.repeat_width))
        return pieces.repeat_interleave(s.d_inner // s.pair_dim, dim=-2).flatten(-2)

    def _selection(self, x: Tensor, projected: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """dt [B, T, Ch] after softplus, B and C [B, T, G, N]."""
        s = self.sizes
        if s.native:
            low, B, C = self.x_proj(x).split([s.dt_rank, s.d_state, s.d_state], -1)
        else:
            B, C, low = projected
            B = self._repeat(B)
        dt = F.softplus(self.dt_proj(low).to(kernels.state_dtype(x)))
        return dt, B.unflatten(-1, (-1, s.d_state)), C.unflatten(-1, (-1, s.d_state))

    def _recur(
        self,
        raw: Tensor,
        previous: Tensor | None,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        context: StepContext,
        cache: RecurrentCache | None,
    ) -> Tensor:
        A = -self.A_log.to(dt.dtype).exp()
        if cache is None:
            return dispatch.selective_scan(x, dt, A, B, C, None, context.seq_idx)[0]
        step = kernels.bind(kernels.selective_step, A)
        if context.sequential:
            return cache.step_through(step, context.at, raw, (x, dt, B), C)
        state = cache.live_state(step, context.at)
        x, dt, B = kernels.mask_records((x, dt, B), context.n_new)
        y, state = dispatch.selective_scan(x, dt, A, B, C, state, context.seq_idx)
        cache.replace(kernels.latest_inputs(raw, present(previous), context.n_new), state)
        return y


@dataclass(frozen=True)
class PackedMamba1(PackedRecurrence):
    """Mamba-1 of a decode pass; `low` is x_proj of the native form, None in the attention form."""

    inner: Projection
    conv: Projection  # weight [Ch, 4]
    low: Tensor | None  # [dt_rank + 2 N, Ch]
    dt: Projection  # weight [Ch, dt_rank]
    A: Tensor  # [Ch, N]
    D: Tensor  # [Ch]
    out: Projection
    sizes: Mamba1Settings
    ring_lo: int
    piece: int
    repeat: int

    @cached_property
    def ring_source(self) -> Tensor:
        """The convolution channel that holds each x column of the ring, [ring x columns]."""
        found = torch.arange(self.sizes.d_inner)
        if not self.sizes.native:
            source = spread(self.sizes.d_inner, self.piece, self.repeat)
            first = torch.zeros(self.sizes.pair_dim, dtype=torch.long)
            # written from the end, so that the first channel with a source wins
            found = first.scatter(0, source.flip(0), found.flip(0))
        return found.to(self.D.device)

    def new_state(self, like: Tensor, size: StateSize) -> RecurrentState:
        """Empty rings and state."""
        s = self.sizes
        raw, *rest = (like.new_zeros(size.batch, size.slots, width) for width in s.ring_widths)
        mixed, low = rest or (None, None)
        state = like.new_zeros(size.batch, s.d_inner, s.d_state, dtype=state_dtype(like))
        return RecurrentState(raw, state, mixed, low)

    def load(self, state: RecurrentState, cache: RecurrentCache, ends: PromptEnds) -> None:
        """Take over the state and the newest inputs of the convolution."""
        load_ring(state, present(cache.live), present(cache.inputs)[..., self.ring_source], ends)

    def run(
        self,
        context: PassContext,
        state: RecurrentState,
        s: Residual,
        segment: Segment,
        gain: Tensor,
    ) -> None:
        """Add the mixer's output to the stream."""
        ops, at = context.ops, segment
        mixed = s.mixed[: at.rows * self.activations].view(at.rows, -1)
        z = s.wide[: at.rows * self.sizes.d_inner].view(at.rows, -1)
        conv = (
            None
            if state.mixed is None
            else (of_kind(Tensor, self.conv.weight), present(self.conv.bias), state.mixed)
        )
        ops.project(
            s.scaled, s.squares, context.eps, self.inner.weight, self.inner.bias, z, state.ring,
            at.start, count=at.active, scale=at.T, ring_lo=self.ring_lo, conv=conv, T=at.T,
            offset=at.offset,
        )  # fmt: skip
        if self.low is not None:
            ops.mamba1_low(
                present(state.mixed), self.low, present(state.low), at.start, at.active, at.T,
                T=at.T, offset=at.offset,
            )  # fmt: skip
        ops.mamba1(
            state.ring, state.mixed, state.low, z, state.state, of_kind(Tensor, self.conv.weight),
            present(self.conv.bias), of_kind(Tensor, self.dt.weight),
            dt_bias=present(self.dt.bias), A=self.A, D=self.D, out=mixed, start=at.start,
            count=at.active, base=at.base, base_next=at.base_next, scale=at.T, piece=self.piece,
            repeat=self.repeat, T=at.T, offset=at.offset,
        )  # fmt: skip
        out = self.out
        ops.add_residual(mixed, out.weight, out.bias, s.hidden, gain, s.scaled, s.squares)


def mamba1_from_attention(
    config: DecoderConfig, repeat_width: int, proj_bias: bool
) -> Mamba1Settings:
    """Per-channel decays with 16 states; B and x from KV heads, C from query heads."""
    return Mamba1Settings(
        d_inner=config.num_attention_heads * config.head_dim,
        dt_rank=-(-config.hidden_size // 16),
        x_dim=config.num_key_value_heads * config.head_dim,
        repeat_width=repeat_width,
        proj_bias=proj_bias,
    )


def head_shape(mixer: Mamba1Mixer, attention: AttentionWeights) -> tuple[int, int]:
    """Query heads and their width, of a mixer that repeats whole heads."""
    # the reference pairing has no head structure
    head_dim = mixer.sizes.repeat_width
    return attention.q.shape[0] // head_dim, head_dim


def write_fit(mixer: Mamba1Mixer, attention: AttentionWeights, fit: HeadFit) -> None:
    """Write a fit into taps, dt, decay and skip of a neutral mixer."""
    heads, head_dim = head_shape(mixer, attention)
    repeat = heads // (mixer.sizes.pair_dim // head_dim)
    # fp32 x needs no norm behind it, so taps carry only the linear range
    tap = start.LINEAR_RANGE / attention.rms("v", head_dim)
    tap = tap.repeat_interleave(repeat)  # [H]
    mixer.conv1d.weight[:, 0, -1] = tap.repeat_interleave(head_dim)
    # B and C see no SiLU; d_state of head_dim products stand for the whole score
    gain = tap / 2 * math.sqrt(head_dim)
    dt = (fit.score / gain).clamp(1e-5, 10)
    mixer.dt_proj.bias.copy_(start.inverse_softplus(dt).repeat_interleave(head_dim))
    rate = (math.log(2) / (fit.half_life * dt)).log().repeat_interleave(head_dim)
    mixer.A_log.copy_(rate[:, None].expand_as(mixer.A_log))
    mixer.D.copy_((fit.skip / (tap / 2)).repeat_interleave(head_dim))


def head_basis(
    mixer: Mamba1Mixer, attention: AttentionWeights, hidden: Tensor, context: StepContext
) -> Basis:
    """Each head's v and its scored running sum, as the mixer itself computes it."""
    width = mixer.sizes.repeat_width
    heads = attention.q.shape[0] // width
    v = attention.heads("v", hidden, width)
    v = v.repeat_interleave(heads // v.shape[2], 2)  # [B, T, H, P]
    fit = {"constant": 0.0, "score": SMALL_SCORE, "skip": 0.0, "rms": 1.0}

    def mix(half_life: float) -> list[Tensor]:
        values = {"half_life": half_life, **fit}
        one = HeadFit(**{name: torch.full((heads,), value) for name, value in values.items()})
        write_fit(mixer, attention, one)
        return [v, mixer.features(hidden, context).view_as(v).to(v.dtype) / SMALL_SCORE]

    return mix


class Mamba1Spec(Mamba1Sizes, MixerSpec[Mamba1Settings, Mamba1Mixer]):
    """Mamba-1, in the form of attention or native."""

    title = "Mamba-1 mixer"
    module_type = Mamba1Mixer

    def cache(self, settings: Mamba1Settings) -> RecurrentCache:
        """An empty cache of one layer."""
        return RecurrentCache()

    def from_attention(self, config: DecoderConfig, form: MixerForm, index: int) -> Mamba1Settings:
        """Sizes in the place of the attention of layer `index`; ModelError for odd head sizes."""
        if config.head_dim % PAIRED:
            raise ModelError(
                f"mamba1 needs a head size divisible by 16, this model has {config.head_dim}",
                "use --mixer mamba2",
            )
        # whole heads keep each query with its own key
        width = config.head_dim if form.calibrated else PAIRED
        return mamba1_from_attention(config, width, proj_bias=form.biased(config))

    def initialise(
        self,
        mixer: Mamba1Mixer,
        attention: AttentionWeights,
        method: str,
        generator: torch.Generator,
    ) -> None:
        """Fill a mixer in place; `method` is reference or calibrated (with the prior)."""
        start.copy_projections(mixer, attention)
        if method == "reference":
            start.draw_defaults(mixer, generator)
            start.uniform_(mixer.dt_proj.weight, mixer.sizes.dt_rank**-0.5, generator)
            dt = start.log_uniform_dt(mixer.dt_proj.bias.shape, generator)
            # the public Mamba-1 layer adds this bias twice; folding keeps its effective step
            mixer.dt_proj.bias.copy_(2 * start.inverse_softplus(dt))
            steps = torch.arange(1, mixer.sizes.d_state + 1, dtype=torch.float32)
            mixer.A_log.copy_(steps.log().expand_as(mixer.A_log))
            mixer.D.fill_(1)
            return
        rows = start.open_gate(mixer)
        # the low-rank input must not vanish together with dt_proj, or neither could learn
        bound = mixer.in_proj.weight.shape[1] ** -0.5
        drawn = torch.Generator().manual_seed(0)
        start.uniform_(mixer.in_proj.weight[rows["dt"]], bound, drawn)
        mixer.dt_proj.weight.zero_()
        write_fit(mixer, attention, start.prior_fit(*head_shape(mixer, attention), attention))

    def basis(
        self,
        mixer: Mamba1Mixer,
        attention: AttentionWeights,
        hidden: Tensor,
        context: StepContext,
    ) -> Basis:
        """Each head's v and its scored running sum."""
        return head_basis(mixer, attention, hidden, context)

    def apply_fit(self, mixer: Mamba1Mixer, attention: AttentionWeights, fit: HeadFit) -> None:
        """Write a fit into taps, dt, decay and skip of a neutral mixer."""
        write_fit(mixer, attention, fit)

    def cost(self, config: DecoderConfig, settings: Mamba1Settings, length: int) -> MixerCost:
        """Operations per token; the recurrence counts what its equation needs."""
        s, width = settings, config.hidden_size
        selected = s.d_inner * (s.dt_rank + 2 * s.d_state) if s.native else 0
        weights = 2 * (selected + s.dt_rank * s.d_inner + s.d_inner * width)
        mixing = STATE_OPERATIONS * s.d_inner * s.d_state + 2 * s.d_conv * s.d_inner
        return MixerCost(2 * width * sum(s.in_rows), weights, mixing)

    def pack(
        self,
        mixer: Mamba1Mixer,
        config: DecoderConfig,
        settings: Mamba1Settings,
        rotations: Rotations | None,
    ) -> PackedMamba1:
        """Weights for the decode kernels."""
        s = mixer.sizes
        return PackedMamba1(
            inner=Projection(mixer.in_proj.weight, mixer.in_proj.bias),
            conv=packed_conv(mixer.conv1d),
            low=mixer.x_proj.weight if s.native else None,
            dt=Projection(mixer.dt_proj.weight, mixer.dt_proj.bias),
            A=-mixer.A_log.float().exp().contiguous(),
            D=mixer.D.float(),
            out=Projection(mixer.out_proj.weight, mixer.out_proj.bias),
            sizes=s,
            ring_lo=0 if s.native else s.d_inner,
            piece=s.d_inner if s.native else s.repeat_width,
            repeat=1 if s.native else s.d_inner // s.pair_dim,
        )
