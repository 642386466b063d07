"""Mamba-1 mixer (arXiv 2312.00752), attention-initialised (arXiv 2408.15237) or native.

native:    x, z = in_proj(u);  x = SiLU(conv(x));  dt, B, C = x_proj(x)
attention: z, x, B, C, dt = in_proj(u);  x repeated over query groups, x = SiLU(conv(x))
dt = softplus(dt_proj(dt));  S[d, n] = exp(-dt_d exp(A_log[d, n])) S[d, n] + dt_d B_n x_d
y_d = sum_n C_n S[d, n] + D_d x_d;  out = out_proj(y SiLU(z))
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


class Mamba1Mixer(KeepsFloat32):
    """Recurrent mixer with one decay per channel and state index."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.sizes = s = config.mamba1_settings
        self.in_proj = nn.Linear(config.hidden_size, sum(s.in_rows), bias=s.proj_bias)
        self.conv1d = nn.Conv1d(s.d_inner, s.d_inner, s.d_conv, groups=s.d_inner, bias=s.conv_bias)
        if s.native:
            self.x_proj = nn.Linear(s.d_inner, s.dt_rank + 2 * s.d_state, bias=False)
        self.dt_proj = nn.Linear(s.dt_rank, s.d_inner)
        steps = torch.arange(1, s.d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(steps.log().expand(s.d_inner, -1).contiguous())  # [Ch, N]
        self.D = nn.Parameter(torch.ones(s.d_inner, dtype=torch.float32))
        self.out_proj = nn.Linear(s.d_inner, config.hidden_size, bias=s.proj_bias)

    def forward(self, hidden: Tensor, context: StepContext, cache: RecurrentCache | None) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        return self.out_proj(self.features(hidden, context, cache).to(hidden.dtype))

    def features(
        self, hidden: Tensor, context: StepContext, cache: RecurrentCache | None = None
    ) -> Tensor:
        """The input of out_proj [B, T, d_inner]: what a least-squares refit regresses on."""
        kind = kernels.state_dtype(hidden)
        z, raw, projected = self._project(hidden)
        if cache is not None and cache.state is None:
            s, batch = self.sizes, hidden.shape[0]
            state = torch.zeros(batch, s.d_inner, s.d_state, dtype=kind, device=hidden.device)
            cache.start(state, raw.new_zeros(batch, s.d_conv - 1, s.d_inner))
        window = None
        if cache is not None:
            window = cache.conv_inputs(context.cursor, self.sizes.d_conv - 1)
        taps = raw, self.conv1d.weight[:, 0], self.conv1d.bias, window, context.seq_idx
        # token by token must round like the replay after a rollback, so it stays on the reference
        if context.sequential:
            x = F.silu(kernels.causal_conv1d(*taps))  # [B, T, Ch]
        else:
            x = dispatch.causal_conv1d_silu(*taps)
        dt, B, C = self._selection(x, projected)
        y = self._recur(raw, window, x, dt, B, C, context, cache)
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
        return pieces.repeat_interleave(s.d_inner // s.x_dim, dim=-2).flatten(-2)

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
        window: Tensor | None,
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
            return cache.step_through(step, context.cursor, raw, (x, dt, B), C)
        state = cache.live_state(step, context.cursor)
        x, dt, B = kernels.mask_records((x, dt, B), context.n_new)
        y, state = dispatch.selective_scan(x, dt, A, B, C, state, context.seq_idx)
        cache.replace(kernels.conv_window(raw, window, context.n_new), state)
        return y
