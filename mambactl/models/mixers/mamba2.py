"""Mamba-2 mixer (arXiv 2405.21060), attention-initialised (arXiv 2408.15237) or native.

    z, (x, B, C), dt = in_proj(u);  x, B, C = SiLU(conv(x, B, C));  dt = softplus(dt + dt_bias)
    S_t = exp(-dt exp(A_log)) S_{t-1} + dt x_t B_t^T;  y = S C + D x
    out = out_proj(RMSNorm_grouped(y SiLU(z)) weight)
With `rotary`, B and C turn with the position before they meet the state.
With x_heads = n_heads it is what state-spaces/mamba2-* and GraniteMoeHybrid compute.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambactl.kernels import dispatch
from mambactl.kernels import reference as kernels
from mambactl.models.cache import RecurrentCache
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.context import StepContext
from mambactl.models.mixers.float32 import KeepsFloat32
from mambactl.models.mixers.rotary import turn

# columns: 16 bytes of bf16
ALIGNED = 8


class GatedRMSNorm(nn.Module):
    """RMSNorm of y SiLU(z) within each of `groups` equal slices, times a weight."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y and z [B, T, D] -> [B, T, D], computed in y's precision."""
        y = y * F.silu(z.to(y.dtype))
        grouped = y.unflatten(-1, (self.groups, -1))  # [B, T, G, D / G]
        normed = F.rms_norm(grouped, grouped.shape[-1:], None, self.eps)
        return normed.flatten(-2) * self.weight.to(y.dtype)


class Mamba2Mixer(KeepsFloat32):
    """Recurrent replacement of attention with one scalar decay per head."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.sizes = s = config.mamba2_settings
        self.in_proj = nn.Linear(config.hidden_size, sum(s.in_rows), bias=s.proj_bias)
        self.conv1d = nn.Conv1d(
            s.conv_dim, s.conv_dim, s.d_conv, groups=s.conv_dim, bias=s.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(s.n_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(s.n_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(s.n_heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(s.d_inner, s.norm_groups, s.norm_eps)
        self.out_proj = nn.Linear(s.d_inner, config.hidden_size, bias=s.proj_bias)

    def forward(self, hidden: Tensor, context: StepContext, cache: RecurrentCache | None) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        return self.out_proj(self.features(hidden, context, cache).to(hidden.dtype))

    def features(
        self, hidden: Tensor, context: StepContext, cache: RecurrentCache | None = None
    ) -> Tensor:
        """The input of out_proj [B, T, d_inner]: what a least-squares refit regresses on."""
        s = self.sizes
        z, raw, dt = self._project(hidden, whole=cache is None)
        kind = kernels.state_dtype(hidden)
        dt = F.softplus(dt.to(kind) + self.dt_bias.to(kind))  # [B, T, H]
        if cache is not None and cache.state is None:
            self._start(cache, hidden, raw)
        window = None
        if cache is not None:
            window = cache.conv_inputs(context.cursor, s.d_conv - 1)
        taps = raw, self.conv1d.weight[:, 0], self.conv1d.bias, window, context.seq_idx
        # token by token must round like the replay after a rollback, so it stays on the reference
        if context.sequential:
            mixed = F.silu(kernels.causal_conv1d(*taps))  # [B, T, conv_dim]
        else:
            mixed = dispatch.causal_conv1d_silu(*taps)
        x, B, C = self._split(mixed)
        if s.rotary:
            B, C = turn(B, context.rotary), turn(C, context.rotary)
        y = self._recur(raw, window, x, dt, B, C, context, cache)
        return self.norm((y + self._skip(x.to(kind))).flatten(-2), z)

    def _project(self, hidden: Tensor, whole: bool) -> tuple[Tensor, ...]:
        """Gate z, inputs of the convolution, dt; `whole` fills the rows up to what a GPU aligns.

        A product of an odd number of columns runs at a fraction of the speed. In training each of
        the three is a product of its own: the gradients of one would first have to be copied next
        to each other, which takes longer than one product saves.
        """
        s = self.sizes
        widths = [s.d_inner, s.conv_dim, s.n_heads]
        # an adapter around the projection acts when it is called, not in its weight
        whole = whole and type(self.in_proj) is nn.Linear
        missing = -sum(widths) % ALIGNED if whole else 0
        weight, bias = self.in_proj.weight, self.in_proj.bias
        if whole and self.training:
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

    def _skip(self, x: Tensor) -> Tensor:
        """D x [B, T, H, P] for x [B, T, Hx, P], whose heads are not copied for those that share."""
        D = self.D.to(x.dtype).unflatten(0, (self.sizes.x_heads, -1, 1))  # [Hx, H / Hx, 1]
        return (D * x.unsqueeze(-2)).flatten(-3, -2)

    def _start(self, cache: RecurrentCache, hidden: Tensor, raw: Tensor) -> None:
        s, batch = self.sizes, hidden.shape[0]
        state = torch.zeros(
            batch, s.n_heads, s.head_dim, s.d_state,
            dtype=kernels.state_dtype(hidden), device=hidden.device,
        )  # fmt: skip
        cache.start(state, raw.new_zeros(batch, s.d_conv - 1, s.conv_dim))

    def _recur(
        self,
        raw: Tensor,
        window: Tensor | None,
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
            return cache.step_through(step, context.cursor, raw, (x, dt, B), C)
        state = cache.live_state(step, context.cursor)
        x, dt, B = kernels.mask_records((x, dt, B), context.n_new)
        y, state = dispatch.ssd(x, dt, A, B, C, state, context.seq_idx, chunk)
        cache.replace(kernels.conv_window(raw, window, context.n_new), state)
        return y

    def _step(
        self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        return kernels.ssd_step(state, self._heads(x), dt, A, B, C)
