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
            In a rotary mixer q and k are turned, but for the constant channel's pair.

A window of attention beside the mixer gets the attention's own projections; without data the
calibrated mixer then puts out zero, and only its out_proj is in the way of learning more.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambactl.models.mixers.mamba1 import Mamba1Mixer
from mambactl.models.mixers.mamba2 import Mamba2Mixer
from mambactl.models.mixers.windowed import Mamba2WindowMixer, WindowAttention

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


@dataclass(frozen=True)
class AttentionWeights:
    """One attention layer: projections [rows, D], o [D, H P], biases or None, norm weight [D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    norm: Tensor
    biases: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class HeadFit:
    """Decayed linear attention of every query head, all [H].

    half_life in tokens, constant c, score a (of q.k / sqrt(P)), skip d, and the rms of the
    resulting head output.
    """

    half_life: Tensor
    constant: Tensor
    score: Tensor
    skip: Tensor
    rms: Tensor


def initialise(
    mixer: nn.Module, attention: AttentionWeights, method: str, generator: torch.Generator
) -> None:
    """Fill a mixer in place; `method` is reference or calibrated (with the prior)."""
    with torch.no_grad():
        _copy_projections(mixer, attention)
        windowed = isinstance(mixer, Mamba2WindowMixer)
        if windowed:
            _copy_attention(mixer.window, attention)
        if method == "reference":
            _reference(mixer, generator)
        else:
            _neutral(mixer)
            apply_fit(mixer, attention, prior_fit(mixer, attention))
            if windowed:
                mixer.out_proj.weight.zero_()
                mixer.out_proj.bias.zero_()


def _copy_attention(window: WindowAttention, attention: AttentionWeights) -> None:
    for name in "qkvo":
        projection = getattr(window, f"{name}_proj")
        projection.weight.copy_(getattr(attention, name))
        if projection.bias is not None:
            projection.bias.copy_(attention.biases[name])


def _sections(mixer: nn.Module) -> dict[str, slice]:
    """Rows of in_proj by name."""
    names = ("z", "x", "B", "C", "dt")
    slices, start = {}, 0
    for name, rows in zip(names, mixer.sizes.in_rows, strict=True):
        slices[name] = slice(start, start + rows)
        start += rows
    return slices


def _copy_projections(mixer: nn.Module, attention: AttentionWeights) -> None:
    rows = _sections(mixer)
    for section, name in (("x", "v"), ("B", "k"), ("C", "q")):
        mixer.in_proj.weight[rows[section]] = getattr(attention, name).to(mixer.in_proj.weight)
    mixer.out_proj.weight.copy_(attention.o)
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias.zero_()
        mixer.out_proj.bias.zero_()
    for section, name in (("x", "v"), ("B", "k"), ("C", "q")):
        if attention.biases and name in attention.biases:
            mixer.in_proj.bias[rows[section]] = attention.biases[name].to(mixer.in_proj.bias)
    if attention.biases and "o" in attention.biases:
        mixer.out_proj.bias.copy_(attention.biases["o"])


def _reference(mixer: nn.Module, generator: torch.Generator) -> None:
    """Random parts as PyTorch's and Mamba's defaults; arXiv 2408.15237's public code."""
    rows, width = _sections(mixer), mixer.in_proj.weight.shape[1]
    for section in ("z", "dt"):
        _uniform(mixer.in_proj.weight[rows[section]], width**-0.5, generator)
    for parameter in (mixer.conv1d.weight, mixer.conv1d.bias):
        _uniform(parameter, mixer.sizes.d_conv**-0.5, generator)
    if isinstance(mixer, Mamba2Mixer):
        mixer.dt_bias.copy_(_inverse_softplus(_log_uniform_dt(mixer.dt_bias.shape, generator)))
        heads = torch.rand(mixer.A_log.shape, generator=generator)
        mixer.A_log.copy_((1 + 15 * heads).log())
        mixer.norm.weight.fill_(1)
    else:
        _uniform(mixer.dt_proj.weight, mixer.sizes.dt_rank**-0.5, generator)
        dt = _log_uniform_dt(mixer.dt_proj.bias.shape, generator)
        # the public Mamba-1 layer adds this bias twice; folding keeps its effective step
        mixer.dt_proj.bias.copy_(2 * _inverse_softplus(dt))
        steps = torch.arange(1, mixer.sizes.d_state + 1, dtype=torch.float32)
        mixer.A_log.copy_(steps.log().expand_as(mixer.A_log))
    mixer.D.fill_(1)


def _uniform(target: Tensor, bound: float, generator: torch.Generator) -> None:
    draw = torch.rand(target.shape, generator=generator)
    target.copy_((2 * draw - 1) * bound)


def _log_uniform_dt(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """dt log-uniform in [0.001, 0.1], at least 1e-4, as Mamba initialises it."""
    low, high = math.log(1e-3), math.log(1e-1)
    draw = torch.rand(shape, generator=generator)
    return (low + draw * (high - low)).exp().clamp(min=1e-4)


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))


def inverse_silu(y: Tensor) -> Tensor:
    """The x >= 0 with x sigmoid(x) = y >= 0, by Newton's method in fp64."""
    target = y.double()
    x = target + 0.5
    for _ in range(60):
        gate = torch.sigmoid(x)
        x = (x - (x * gate - target) / (gate * (1 + x * (1 - gate)))).clamp(min=0)
    return x.to(y.dtype)


def _neutral(mixer: nn.Module) -> None:
    """Gate 1, no dependence of dt on the input; convolution taps follow in `apply_fit`."""
    rows = _sections(mixer)
    mixer.in_proj.weight[rows["z"]] = 0
    mixer.in_proj.bias[rows["z"]] = UNIT_GATE
    mixer.conv1d.weight.zero_()
    mixer.conv1d.bias.zero_()
    if isinstance(mixer, Mamba2Mixer):
        mixer.in_proj.weight[rows["dt"]] = 0
        mixer.norm.weight.fill_(1)
    else:
        # the low-rank input must not vanish together with dt_proj, or neither could learn
        bound = mixer.in_proj.weight.shape[1] ** -0.5
        _uniform(mixer.in_proj.weight[rows["dt"]], bound, torch.Generator().manual_seed(0))
        mixer.dt_proj.weight.zero_()


def projection_rms(weight: Tensor, norm: Tensor, head_dim: int) -> Tensor:
    """Expected rms per head [rows / head_dim] of weight @ u for a normed u of unit variance."""
    energy = (weight.float() * norm.float()).pow(2).sum(1)  # [rows]
    return energy.view(-1, head_dim).mean(1).sqrt().clamp(min=1e-6)


def prior_fit(mixer: nn.Module, attention: AttentionWeights) -> HeadFit:
    """What to assume without data: a running mean of v, with scores, over mixed half-lives."""
    heads, head_dim = _head_shape(mixer, attention)
    kv_rms = projection_rms(attention.v, attention.norm, head_dim)
    half_life = torch.tensor(PRIOR_HALF_LIVES).repeat(-(-heads // len(PRIOR_HALF_LIVES)))[:heads]
    # sum of the decays over a 512-token context
    decay = 0.5 ** (1 / half_life.double())
    mass = ((1 - decay**512) / (1 - decay)).float()
    constant = PRIOR_MEAN / mass
    rms = PRIOR_RMS * kv_rms.repeat_interleave(heads // len(kv_rms))
    return HeadFit(half_life, constant, PRIOR_SCORE * constant, torch.zeros(heads), rms)


def _head_shape(mixer: nn.Module, attention: AttentionWeights) -> tuple[int, int]:
    if isinstance(mixer, Mamba2Mixer):
        return mixer.sizes.n_heads, mixer.sizes.head_dim
    # a Mamba-1 mixer that repeats whole heads; the reference pairing has no head structure
    head_dim = mixer.sizes.repeat_width
    return attention.q.shape[0] // head_dim, head_dim


def apply_fit(mixer: nn.Module, attention: AttentionWeights, fit: HeadFit) -> None:
    """Write a fit into taps, dt, decay, skip and norm weight of a neutral mixer."""
    with torch.no_grad():
        if isinstance(mixer, Mamba2Mixer):
            _apply_mamba2(mixer, attention, fit)
        else:
            _apply_mamba1(mixer, attention, fit)


def _apply_mamba2(mixer: Mamba2Mixer, attention: AttentionWeights, fit: HeadFit) -> None:
    s = mixer.sizes
    repeat = s.n_heads // s.x_heads
    taps = {
        name: LINEAR_RANGE / projection_rms(getattr(attention, name), attention.norm, s.head_dim)
        for name in ("q", "k", "v")
    }
    # SiLU(t x) ~ t x / 2, so each tap counts half
    x_gain = (taps["v"] / 2).repeat_interleave(repeat)  # [H]
    pair_gain = taps["q"] / 2 * (taps["k"] / 2).repeat_interleave(repeat) * math.sqrt(s.head_dim)
    # one sign per head makes its constant positive, as SiLU needs; the norm weight undoes it
    sign = torch.where(fit.constant < 0, -1.0, 1.0)
    kappa = sign * NORM_RANGE * math.sqrt(s.norm_eps) / fit.rms.clamp(min=1e-8)
    wanted = kappa * fit.score / x_gain
    dt = (wanted.abs() / pair_gain).clamp(1e-4, 10)
    score_tap = wanted / (dt * pair_gain) * taps["q"]  # [H], may be negative
    constant = kappa * fit.constant / (x_gain * dt)

    weight, bias = mixer.conv1d.weight[:, 0, -1], mixer.conv1d.bias  # [Ch]
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
        shift[:, 0] = inverse_silu(held)
        weight[part], bias[part] = tap.flatten(), shift.flatten()
    mixer.dt_bias.copy_(_inverse_softplus(dt))
    mixer.A_log.copy_((math.log(2) / (fit.half_life * dt)).log())
    mixer.D.copy_(kappa * fit.skip / x_gain)
    scale = sign * fit.rms / NORM_RANGE * math.sqrt(1 + NORM_RANGE**2)
    mixer.norm.weight.copy_(scale.repeat_interleave(s.head_dim))


def _apply_mamba1(mixer: Mamba1Mixer, attention: AttentionWeights, fit: HeadFit) -> None:
    heads, head_dim = _head_shape(mixer, attention)
    repeat = heads // (mixer.sizes.x_dim // head_dim)
    # fp32 x needs no norm behind it, so taps carry only the linear range
    tap = LINEAR_RANGE / projection_rms(attention.v, attention.norm, head_dim)
    tap = tap.repeat_interleave(repeat)  # [H]
    mixer.conv1d.weight[:, 0, -1] = tap.repeat_interleave(head_dim)
    # B and C see no SiLU; d_state of head_dim products stand for the whole score
    gain = tap / 2 * math.sqrt(head_dim)
    dt = (fit.score / gain).clamp(1e-5, 10)
    mixer.dt_proj.bias.copy_(_inverse_softplus(dt).repeat_interleave(head_dim))
    rate = (math.log(2) / (fit.half_life * dt)).log().repeat_interleave(head_dim)
    mixer.A_log.copy_(rate[:, None].expand_as(mixer.A_log))
    mixer.D.copy_((fit.skip / (tap / 2)).repeat_interleave(head_dim))
