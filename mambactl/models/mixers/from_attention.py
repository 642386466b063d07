"""Initial values of a Mamba mixer that replaces an attention layer.

Both methods copy x <- v_proj, B <- k_proj, C <- q_proj, out_proj <- o_proj (arXiv 2408.15237,
Algorithm 1) bit for bit; they differ in everything else.

reference   what the paper's public code does: default random gate, convolution and dt rows,
            A_log and D as in Mamba.
calibrated  the mixer starts as decayed linear attention. Convolutions pass the current token
            through in the linear range of their SiLU, the gate is 1, dt and the decay do not
            depend on the input. In Mamba-2 one state channel per KV head is held constant, so a
            head computes
                o_t ~ sum_s 2^(-(t-s)/h) (c + a q_t.k_s / sqrt(P)) v_s + d v_t,
            the first two terms of exp(q.k) in attention, and its output enters the gated norm
            small enough that eps makes the norm nearly linear. h, c, a, d per head come from
            `HeadFit`: a prior without data, least squares with it (`mambactl.conversion.fit`).
            In a rotary mixer q and k are rotated, but for the constant channel's pair.

A window of attention beside the mixer gets the attention's own projections; without data the
calibrated mixer then puts out zero, and only its out_proj is in the way of learning more.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from mambactl.models.mixers.spec import AttentionWeights, HeadFit
from mambactl.present import present

# argument of SiLU whose value is 1
UNIT_GATE = 1.2784645
# rms of SiLU arguments in the linear range: the quadratic term is then 2.5 %
LINEAR_RANGE = 0.05
# rms of a head's output entering the gated norm, in units of sqrt(eps)
NORM_RANGE = 0.3
# tokens; beyond any context, so it stands for no decay
NO_DECAY = 1e5
# without data, medians and quantiles of 135 heads of SmolLM2-135M-Instruct fitted on 6k tokens:
# half-lives in tokens that the heads of a layer cycle through, the weight of the running mean of
# v, the score's weight relative to it, and the output's rms relative to that of v
PRIOR_HALF_LIVES = (3.0, 12.0, 48.0, 1.5, 6.0, 24.0, 3.0, 24.0, 96.0)
PRIOR_MEAN, PRIOR_SCORE, PRIOR_RMS = 0.4, 0.25, 0.13


class InputRows(Protocol):
    """Settings that say how the rows of in_proj are cut."""

    @property
    def in_rows(self) -> tuple[int, ...]:
        """Rows of z, x, B, C and dt."""
        ...

    @property
    def d_conv(self) -> int: ...


class ReplacingMixer(Protocol):
    """A Mamba mixer in the form that attention is copied into."""

    in_proj: nn.Linear
    out_proj: nn.Linear

    @property
    def sizes(self) -> InputRows: ...

    @property
    def conv1d(self) -> nn.Conv1d: ...


def sections(mixer: ReplacingMixer) -> dict[str, slice]:
    """Rows of in_proj by name."""
    names = ("z", "x", "B", "C", "dt")
    slices, start = {}, 0
    for name, rows in zip(names, mixer.sizes.in_rows, strict=True):
        slices[name] = slice(start, start + rows)
        start += rows
    return slices


def copy_projections(mixer: ReplacingMixer, attention: AttentionWeights) -> None:
    """Copy x <- v, B <- k, C <- q and out_proj <- o (arXiv 2408.15237, Algorithm 1), biases too."""
    rows = sections(mixer)
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias.zero_()
        mixer.out_proj.bias.zero_()
    for section, name in (("x", "v"), ("B", "k"), ("C", "q")):
        weight, bias = attention.linear(name)
        mixer.in_proj.weight[rows[section]] = weight.to(mixer.in_proj.weight)
        if bias is not None:
            mixer.in_proj.bias[rows[section]] = bias.to(mixer.in_proj.bias)
    weight, bias = attention.linear("o")
    mixer.out_proj.weight.copy_(weight)
    if bias is not None:
        mixer.out_proj.bias.copy_(bias)


def draw_defaults(mixer: ReplacingMixer, generator: torch.Generator) -> None:
    """Draw gate, dt rows and convolution as PyTorch's defaults do (arXiv 2408.15237's code)."""
    rows, width = sections(mixer), mixer.in_proj.weight.shape[1]
    for section in ("z", "dt"):
        uniform_(mixer.in_proj.weight[rows[section]], width**-0.5, generator)
    for parameter in (mixer.conv1d.weight, present(mixer.conv1d.bias)):
        uniform_(parameter, mixer.sizes.d_conv**-0.5, generator)


def open_gate(mixer: ReplacingMixer) -> dict[str, slice]:
    """Set the gate to 1 and the convolution to 0; returns the rows of in_proj by name."""
    rows = sections(mixer)
    mixer.in_proj.weight[rows["z"]] = 0
    mixer.in_proj.bias[rows["z"]] = UNIT_GATE
    mixer.conv1d.weight.zero_()
    present(mixer.conv1d.bias).zero_()
    return rows


def uniform_(target: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill a tensor in place from [-bound, bound]."""
    draw = torch.rand(target.shape, generator=generator)
    target.copy_((2 * draw - 1) * bound)


def log_uniform_dt(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """dt log-uniform in [0.001, 0.1], at least 1e-4, as Mamba initialises it."""
    low, high = math.log(1e-3), math.log(1e-1)
    draw = torch.rand(shape, generator=generator)
    return (low + draw * (high - low)).exp().clamp(min=1e-4)


def inverse_softplus(y: Tensor) -> Tensor:
    """The x with log(1 + exp(x)) = y."""
    return y + torch.log(-torch.expm1(-y))


def inverse_silu(y: Tensor) -> Tensor:
    """The x >= 0 with x sigmoid(x) = y >= 0, by Newton's method in fp64."""
    target = y.double()
    x = target + 0.5
    for _ in range(60):
        gate = torch.sigmoid(x)
        x = (x - (x * gate - target) / (gate * (1 + x * (1 - gate)))).clamp(min=0)
    return x.to(y.dtype)


def prior_fit(heads: int, head_dim: int, attention: AttentionWeights) -> HeadFit:
    """The fit assumed without data: a running mean of v, with scores, over mixed half-lives."""
    kv_rms = attention.rms("v", head_dim)
    half_life = torch.tensor(PRIOR_HALF_LIVES).repeat(-(-heads // len(PRIOR_HALF_LIVES)))[:heads]
    # sum of the decays over a 512-token context
    decay = 0.5 ** (1 / half_life.double())
    mass = ((1 - decay**512) / (1 - decay)).float()
    constant = PRIOR_MEAN / mass
    rms = PRIOR_RMS * kv_rms.repeat_interleave(heads // len(kv_rms))
    return HeadFit(half_life, constant, PRIOR_SCORE * constant, torch.zeros(heads), rms)
