"""Mamba-2 mixer (arXiv 2405.21060), attention-initialised (arXiv 2408.15237) or native.

    z, (x, B, C), dt = in_proj(u);  x, B, C = SiLU(conv(x, B, C));  dt = softplus(dt + dt_bias)
    S_t = exp(-dt exp(A_log)) S_{t-1} + dt x_t B_t^T;  y = S C + D x
    out = out_proj(RMSNorm_grouped(y SiLU(z)) weight)
With `rotary`, B and C rotate with the position before they meet the state.
With x_heads = n_heads it is what state-spaces/mamba2-* and GraniteMoeHybrid compute.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambactl.errors import UsageError
from mambactl.kernels import dispatch
from mambactl.kernels import reference as kernels
from mambactl.kernels.reference import rotate_states
from mambactl.models.cache import RecurrentCache
from mambactl.models.mixers import from_attention as start
from mambactl.models.mixers.mamba2_decode import PackedMamba2
from mambactl.models.mixers.modules import CausalConv, KeepsFloat32, is_its_weight
from mambactl.models.mixers.settings import Mamba2Settings
from mambactl.models.mixers.sizes import Mamba2Sizes
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
from mambactl.models.packed import Projection, Rotations, packed_conv
from mambactl.present import present

# columns: 16 bytes of bf16
ALIGNED = 8
# operations per state element: decay, outer product (multiply, add), read-out (multiply, add)
STATE_OPERATIONS = 5


class GatedRMSNorm(nn.Module):
    """RMSNorm of (y + D x) SiLU(z) within each of `groups` equal slices, times a weight."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor, x: Tensor, D: Tensor, kind: torch.dtype) -> Tensor:
        """y [B, T, H, P], z [B, T, H P], x [B, T, Hx, P], D [H] -> [B, T, H P] of dtype `kind`."""
        return dispatch.gated_norm(y, z, x, D, self.weight, self.groups, self.eps, kind)


class Mamba2Mixer(KeepsFloat32):
    """Recurrent replacement of attention with one scalar decay per head."""

    A_log: nn.Parameter  # [H]
    D: nn.Parameter  # [H]
    dt_bias: nn.Parameter  # [H]

    def __init__(self, config: DecoderConfig, settings: Mamba2Settings):
        super().__init__()
        self.sizes = s = settings
        self.in_proj = nn.Linear(config.hidden_size, sum(s.in_rows), bias=s.proj_bias)
        self.conv1d = CausalConv(s.conv_dim, s.d_conv, s.conv_bias)
        for name, value in self.initial_values().items():
            self.register_parameter(name, nn.Parameter(value))
        self.norm = GatedRMSNorm(s.d_inner, s.norm_groups, s.norm_eps)
        self.out_proj = nn.Linear(s.d_inner, config.hidden_size, bias=s.proj_bias)

    def initial_values(self) -> dict[str, Tensor]:
        """Initial values of the mixer's own parameters, all [H] and fp32."""
        heads = self.sizes.n_heads
        zeros, ones = (make(heads, dtype=torch.float32) for make in (torch.zeros, torch.ones))
        return {"dt_bias": zeros, "A_log": zeros.clone(), "D": ones}

    def forward(self, hidden: Tensor, context: StepContext, cache: RecurrentCache | None) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        return self.out_proj(self._mix(hidden, context, cache, hidden.dtype))

    def features(
        self, hidden: Tensor, context: StepContext, cache: RecurrentCache | None = None
    ) -> Tensor:
        """The input of out_proj [B, T, d_inner] before it is rounded to the dtype of `hidden`.

        On it the least-squares refit regresses.
        """
        return self._mix(hidden, context, cache, kernels.state_dtype(hidden))

    def _mix(
        self,
        hidden: Tensor,
        context: StepContext,
        cache: RecurrentCache | None,
        rounded: torch.dtype,
    ) -> Tensor:
        """The input of out_proj [B, T, d_inner] in the dtype `rounded`."""
        s = self.sizes
        z, raw, dt = self._project(hidden, whole=cache is None)
        kind = kernels.state_dtype(hidden)
        dt = F.softplus(dt.to(kind) + self.dt_bias.to(kind))  # [B, T, H]
        if cache is not None and cache.state is None:
            self._start(cache, hidden, raw)
        previous = None
        if cache is not None:
            previous = cache.conv_inputs(context.at, s.d_conv - 1)
        # [B, T, conv_dim]
        mixed = self.conv1d(raw, previous, context.seq_idx, context.sequential)
        x, B, C = self._split(mixed)
        if s.rotary:
            B, C = (dispatch.rotate_states(t, context.angles) for t in (B, C))
        y = self._recur(raw, previous, x, dt, B, C, context, cache)
        return self.norm(y, z, x, self.D, rounded)

    def _project(self, hidden: Tensor, whole: bool) -> tuple[Tensor, ...]:
        """Gate z, inputs of the convolution, dt; `whole` fills the rows up to what a GPU aligns.

        A product of an odd number of columns runs at a fraction of the speed. In training each of
        the three is a product of its own: the gradients of one would first have to be copied next
        to each other, which takes longer than one product saves.
        """
        s = self.sizes
        widths = [s.d_inner, s.conv_dim, s.n_heads]
        if not whole or not is_its_weight(self.in_proj):
            return self.in_proj(hidden).split(widths, -1)
        missing = -sum(widths) % ALIGNED
        weight, bias = self.in_proj.weight, self.in_proj.bias
        if self.training:
            biases = [None] * 3 if bias is None else bias.split(widths)
            parts = zip(weight.split(widths), biases, widths, strict=True)
            return tuple(self._aligned(hidden, w, b)[..., :width] for w, b, width in parts)
        if not missing:
            return self.in_proj(hidden).split(widths, -1)
        return self._aligned(hidden, weight, bias).split([*widths, missing], -1)[:3]

    @staticmethod
    def _aligned(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A product with as many columns of zeros as are missing."""
        missing = -weight.shape[0] % ALIGNED
        if missing:
            weight = F.pad(weight, (0, 0, 0, missing))
            bias = None if bias is None else F.pad(bias, (0, missing))
        return F.linear(hidden, weight, bias)

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.sizes
        _, n_x, n_b, n_c, _ = s.in_rows
        x, B, C = mixed.split([n_x, n_b, n_c], -1)
        return (
            x.unflatten(-1, (s.x_heads, s.head_dim)),  # [B, T, Hx, P]
            B.unflatten(-1, (s.b_groups, s.d_state)),  # [B, T, Gb, N]
            C.unflatten(-1, (s.c_groups, s.d_state)),  # [B, T, Gc, N]
        )

    def _heads(self, x: Tensor) -> Tensor:
        """Every x head once for each head that shares it."""
        shared = self.sizes.n_heads // self.sizes.x_heads
        return x.unsqueeze(-2).expand(*x.shape[:-1], shared, x.shape[-1]).flatten(-3, -2)

    def _start(self, cache: RecurrentCache, hidden: Tensor, raw: Tensor) -> None:
        s, batch = self.sizes, hidden.shape[0]
        state = torch.zeros(
            batch,
            s.n_heads,
            s.head_dim,
            s.d_state,
            dtype=kernels.state_dtype(hidden),
            device=hidden.device,
        )
        cache.start(state, raw.new_zeros(batch, s.d_conv - 1, s.conv_dim))

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
        chunk = self.sizes.chunk_size
        if cache is None:
            return dispatch.ssd(x, dt, A, B, C, None, context.seq_idx, chunk)[0]
        step = kernels.bind(self._step, A)
        if context.sequential:
            return cache.step_through(step, context.at, raw, (x, dt, B), C)
        state = cache.live_state(step, context.at)
        x, dt, B = kernels.mask_records((x, dt, B), context.n_new)
        y, state = dispatch.ssd(x, dt, A, B, C, state, context.seq_idx, chunk)
        cache.replace(kernels.latest_inputs(raw, present(previous), context.n_new), state)
        return y

    def _step(
        self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        return kernels.ssd_step(state, self._heads(x), dt, A, B, C)


def mamba2_from_attention(
    config: DecoderConfig, proj_bias: bool, rotary: bool = False, kv_heads: int | None = None
) -> Mamba2Settings:
    """One SSM head per query head with a square state, x and B from KV heads (2408.15237, 2.2).

    For all KV heads of the model, or `kv_heads` of them with their query heads.
    """
    kv_heads = config.num_key_value_heads if kv_heads is None else kv_heads
    heads = kv_heads * (config.num_attention_heads // config.num_key_value_heads)
    return Mamba2Settings(
        n_heads=heads,
        head_dim=config.head_dim,
        d_state=config.head_dim,
        x_heads=kv_heads,
        b_groups=kv_heads,
        c_groups=heads,
        norm_groups=heads,
        norm_eps=config.rms_norm_eps,
        proj_bias=proj_bias,
        rotary=rotary,
    )


def write_fit(mixer: Mamba2Mixer, attention: AttentionWeights, fit: HeadFit) -> None:
    """Write a fit into taps, dt, decay, skip and norm weight of a neutral mixer."""
    s = mixer.sizes
    repeat = s.n_heads // s.x_heads
    taps = {name: start.LINEAR_RANGE / attention.rms(name, s.head_dim) for name in "qkv"}
    # SiLU(t x) ~ t x / 2, so each tap counts half
    x_gain = (taps["v"] / 2).repeat_interleave(repeat)  # [H]
    pair_gain = taps["q"] / 2 * (taps["k"] / 2).repeat_interleave(repeat) * math.sqrt(s.head_dim)
    # one sign per head makes its constant positive, as SiLU needs; the norm weight undoes it
    sign = torch.where(fit.constant < 0, -1.0, 1.0)
    kappa = sign * start.NORM_RANGE * math.sqrt(s.norm_eps) / fit.rms.clamp(min=1e-8)
    wanted = kappa * fit.score / x_gain
    dt = (wanted.abs() / pair_gain).clamp(1e-4, 10)
    score_tap = wanted / (dt * pair_gain) * taps["q"]  # [H], may be negative
    constant = kappa * fit.constant / (x_gain * dt)

    weight, bias = mixer.conv1d.weight[:, 0, -1], present(mixer.conv1d.bias)  # [Ch]
    n_x, n_b = s.in_rows[1], s.in_rows[2]
    weight[:n_x] = taps["v"].repeat_interleave(s.head_dim)
    # without positions, q.k of the pair that rotates fastest means least: its channel 0 is held
    for part, gain, held in (
        (slice(n_x, n_x + n_b), taps["k"], torch.ones(s.b_groups)),
        (slice(n_x + n_b, None), score_tap, constant),
    ):
        tap = gain[:, None].repeat(1, s.d_state)  # [groups, N]
        tap[:, 0] = 0
        shift = torch.zeros_like(tap)
        shift[:, 0] = start.inverse_silu(held)
        weight[part], bias[part] = tap.flatten(), shift.flatten()
    mixer.dt_bias.copy_(start.inverse_softplus(dt))
    mixer.A_log.copy_((math.log(2) / (fit.half_life * dt)).log())
    mixer.D.copy_(kappa * fit.skip / x_gain)
    scale = sign * fit.rms / start.NORM_RANGE * math.sqrt(1 + start.NORM_RANGE**2)
    mixer.norm.weight.copy_(scale.repeat_interleave(s.head_dim))


def head_basis(
    mixer: Mamba2Mixer, attention: AttentionWeights, hidden: Tensor, context: StepContext
) -> Basis:
    """Each head's v, and its scored and plain running sums."""
    s = mixer.sizes
    q, k, v = (attention.heads(name, hidden, s.head_dim) for name in "qkv")
    q = q / math.sqrt(s.head_dim)
    # the mixer holds channel 0 of B and C constant
    q[..., 0] = 0
    if s.rotary:
        q, k = rotate_states(q, context.angles), rotate_states(k, context.angles)
    repeat = s.n_heads // s.x_heads
    wide = v.repeat_interleave(repeat, 2)  # [B, T, H, P]
    ones = torch.ones(*v.shape[:2], 1, 1)

    def mix(half_life: float) -> list[Tensor]:
        A = torch.full((s.n_heads,), -math.log(2) / half_life)
        dt = torch.ones(wide.shape[:3])
        scored, _ = kernels.ssd(wide, dt, A, k, q, seq_idx=context.seq_idx)
        dt, A = dt[..., : s.x_heads], A[: s.x_heads]
        plain, _ = kernels.ssd(v, dt, A, ones, ones, seq_idx=context.seq_idx)
        return [wide, scored, plain.repeat_interleave(repeat, 2)]

    return mix


class Mamba2Spec(Mamba2Sizes, MixerSpec[Mamba2Settings, Mamba2Mixer]):
    """Mamba-2 alone, in the form of attention or native."""

    title = "Mamba-2 mixer"
    module_type = Mamba2Mixer
    with_window = "mamba2_window"
    can_rotate = True
    in_granite = True
    rescales_heads = True

    def cache(self, settings: Mamba2Settings) -> RecurrentCache:
        """An empty cache of one layer."""
        return RecurrentCache()

    def from_attention(self, config: DecoderConfig, form: MixerForm, index: int) -> Mamba2Settings:
        """Sizes in the place of the attention of layer `index`."""
        if form.rotary and not config.rotated(index):
            raise UsageError(
                f"--rotary: the attention of layer {index} does not rotate", "drop --rotary"
            )
        return mamba2_from_attention(config, form.biased(config), rotary=form.rotary)

    def initialise(
        self,
        mixer: Mamba2Mixer,
        attention: AttentionWeights,
        method: str,
        generator: torch.Generator,
    ) -> None:
        """Fill a mixer in place; `method` is reference or calibrated (with the prior)."""
        start.copy_projections(mixer, attention)
        if method == "reference":
            start.draw_defaults(mixer, generator)
            dt = start.log_uniform_dt(mixer.dt_bias.shape, generator)
            mixer.dt_bias.copy_(start.inverse_softplus(dt))
            heads = torch.rand(mixer.A_log.shape, generator=generator)
            mixer.A_log.copy_((1 + 15 * heads).log())
            mixer.norm.weight.fill_(1)
            mixer.D.fill_(1)
            return
        rows = start.open_gate(mixer)
        mixer.in_proj.weight[rows["dt"]] = 0
        mixer.norm.weight.fill_(1)
        s = mixer.sizes
        write_fit(mixer, attention, start.prior_fit(s.n_heads, s.head_dim, attention))

    def basis(
        self,
        mixer: Mamba2Mixer,
        attention: AttentionWeights,
        hidden: Tensor,
        context: StepContext,
    ) -> Basis:
        """Each head's v, and its scored and plain running sums."""
        return head_basis(mixer, attention, hidden, context)

    def apply_fit(self, mixer: Mamba2Mixer, attention: AttentionWeights, fit: HeadFit) -> None:
        """Write a fit into taps, dt, decay, skip and norm weight of a neutral mixer."""
        write_fit(mixer, attention, fit)

    def rescale(self, mixer: Mamba2Mixer, scale: Tensor) -> None:
        """Multiply each head's norm weight by scale [H]."""
        mixer.norm.weight.mul_(scale.repeat_interleave(mixer.sizes.head_dim))

    def cost(self, config: DecoderConfig, settings: Mamba2Settings, length: int) -> MixerCost:
        """Operations per token; the recurrence counts what its equation needs."""
        s, width = settings, config.hidden_size
        mixing = STATE_OPERATIONS * s.d_inner * s.d_state + 2 * s.d_conv * s.conv_dim
        return MixerCost(2 * width * sum(s.in_rows), 2 * s.d_inner * width, mixing)

    def pack(
        self,
        mixer: Mamba2Mixer,
        config: DecoderConfig,
        settings: Mamba2Settings,
        rotations: Rotations | None,
    ) -> PackedMamba2:
        """Weights for the decode kernels."""
        return PackedMamba2(
            inner=Projection(mixer.in_proj.weight, mixer.in_proj.bias),
            conv=packed_conv(mixer.conv1d),
            A=-mixer.A_log.float().exp(),
            D=mixer.D.float(),
            dt_bias=mixer.dt_bias.float(),
            gain=mixer.norm.weight,
            out=Projection(mixer.out_proj.weight, mixer.out_proj.bias),
            sizes=mixer.sizes,
            rotation=present(rotations).of_states if settings.rotary else None,
        )
