"""Closed-form fit of new mixers on a few thousand tokens: no gradient, one layer at a time.

Two streams of hidden states run through the layers together: the teacher's, and the student's
with every layer before already fitted. Each new mixer sees the student's stream and aims at what
the teacher's attention put out in its own. Per query head, the half-life comes from a grid and
constant, score and skip from least squares (`mambactl.models.init.HeadFit`); then out_proj is
refitted by ridge regression towards the teacher's o_proj, with a strength chosen on held-out rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambactl.data.pack import Batch
from mambactl.kernels import reference as kernels
from mambactl.models.hybrid import HybridBlock, HybridModel
from mambactl.models.init import NO_DECAY, AttentionWeights, HeadFit, apply_fit
from mambactl.models.mixers.context import StepContext
from mambactl.models.mixers.mamba2 import Mamba2Mixer

HALF_LIVES = (0.7, 1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0, 256.0, NO_DECAY)
RIDGE = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# the head fit has four numbers a head: this many tokens settle them
HEAD_FIT_TOKENS = 4096
HELD_OUT = 0.15


@dataclass(frozen=True)
class LayerFit:
    """Squared error of the mixer's output on held-out rows over the variance of the target."""

    before_refit: float
    after_refit: float
    half_lives: list[float]
    ridge: float | None


class Streams:
    """Hidden states of teacher and student for a list of batches, advanced layer by layer."""

    def __init__(self, model: HybridModel, embedding: Tensor, batches: Sequence[Batch]):
        self.batches = batches
        self.teacher = [nn.functional.embedding(b.input_ids, embedding) for b in batches]
        self.student = list(self.teacher)
        self.contexts = [
            model.context(hidden, b.position_ids, seq_idx=b.seq_idx)
            for hidden, b in zip(self.teacher, batches, strict=True)
        ]

    @torch.no_grad()
    def advance(self, teacher: HybridBlock, student: HybridBlock, fit: bool) -> LayerFit | None:
        """Run one layer in both streams, fitting the student's mixer first if asked."""
        heads, targets = [], []
        for i, context in enumerate(self.contexts):
            self.teacher[i], inner, mixed = _observe(teacher, self.teacher[i], context)
            heads.append(inner)
            targets.append(mixed)
        report = None
        if fit:
            inputs = [student.input_layernorm(hidden) for hidden in self.student]
            masks = [batch.valid for batch in self.batches]
            problem = Problem(inputs, self.contexts, masks, heads, targets)
            report = fit_mixer(student.mixer, attention_weights(teacher), problem)
        for i, context in enumerate(self.contexts):
            self.student[i] = student(self.student[i], context, None)
        return report


@dataclass(frozen=True)
class Problem:
    """What a mixer sees [B, T, D] and should do: head outputs [B, T, H P], mixer output [B, T, D]."""

    inputs: list[Tensor]
    contexts: list[StepContext]
    masks: list[Tensor]
    heads: list[Tensor]
    targets: list[Tensor]


def attention_weights(block: HybridBlock) -> AttentionWeights:
    """The projections of an attention block."""
    mixer = block.mixer
    parts = {name: getattr(mixer, f"{name}_proj") for name in "qkvo"}
    biases = {name: part.bias for name, part in parts.items() if part.bias is not None}
    weights = {name: part.weight for name, part in parts.items()}
    return AttentionWeights(**weights, norm=block.input_layernorm.weight, biases=biases)


def _observe(
    block: HybridBlock, hidden: Tensor, context: StepContext
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's output, its heads before o_proj [B, T, H P] and its mixer's output [B, T, D]."""
    seen: dict[str, Tensor] = {}

    def remember(_: nn.Module, arguments: tuple, output: Tensor) -> None:
        seen.update(inner=arguments[0], mixed=output)

    handle = block.mixer.o_proj.register_forward_hook(remember)
    try:
        return block(hidden, context, None), seen["inner"], seen["mixed"]
    finally:
        handle.remove()


def fit_mixer(mixer: nn.Module, attention: AttentionWeights, problem: Problem) -> LayerFit:
    """Fit a neutral mixer (see `mambactl.models.init`) in place and report its error."""
    fit = fit_heads(mixer, attention, problem)
    apply_fit(mixer, attention, fit)
    features = [
        mixer.features(hidden, context)
        for hidden, context in zip(problem.inputs, problem.contexts, strict=True)
    ]
    if isinstance(mixer, Mamba2Mixer):
        _rescale_heads(mixer, features, problem)
    before, after, ridge = _refit_output(mixer, features, problem)
    half_lives = [round(value, 1) for value in fit.half_life.tolist()]
    return LayerFit(before, after, half_lives, ridge)


def fit_heads(mixer: nn.Module, attention: AttentionWeights, problem: Problem) -> HeadFit:
    """Per head the half-life, constant, score and skip of least squared error to the teacher."""
    best: dict[str, Tensor] = {}
    used, tokens = 0, 0
    while used < len(problem.inputs) and tokens < HEAD_FIT_TOKENS:
        tokens += int(problem.masks[used].sum())
        used += 1
    for half_life in HALF_LIVES:
        gram, moment = 0.0, 0.0
        for i in range(used):
            basis = _basis(mixer, attention, problem.inputs[i], problem.contexts[i], half_life)
            basis = basis[problem.masks[i]]  # [tokens, H, P, R]
            wanted = problem.heads[i][problem.masks[i]].view(basis.shape[:3]).to(basis.dtype)
            gram = gram + torch.einsum("thpr,thps->hrs", basis, basis).double()
            moment = moment + torch.einsum("thpr,thp->hr", basis, wanted).double()
        damped = gram + torch.diag_embed(1e-4 * gram.diagonal(dim1=1, dim2=2) + 1e-12)
        weights = torch.linalg.solve(damped, moment[..., None])[..., 0]  # [H, R]
        fitted = torch.einsum("hr,hrs,hs->h", weights, gram, weights)
        error = fitted - 2 * (weights * moment).sum(1)  # [H], up to a constant
        found = {"error": error, "weights": weights, "energy": fitted}
        found["half_life"] = torch.full_like(error, half_life)
        better = error < best["error"] if best else torch.ones_like(error, dtype=torch.bool)
        for name, value in found.items():
            chosen = better.view(-1, *[1] * (value.ndim - 1))
            best[name] = torch.where(chosen, value, best[name]) if name in best else value
    samples = sum(int(problem.masks[i].sum()) for i in range(used)) * wanted.shape[2]
    skip, score, *constant = best["weights"].float().unbind(1)
    return HeadFit(
        half_life=best["half_life"].float(),
        constant=constant[0] if constant else torch.zeros_like(score),
        score=score,
        skip=skip,
        rms=(best["energy"] / samples).clamp(min=1e-12).sqrt().float(),
    )


def _basis(
    mixer: nn.Module,
    attention: AttentionWeights,
    hidden: Tensor,
    context: StepContext,
    half_life: float,
) -> Tensor:
    """What a head can mix [B, T, H, P, R]: its v, the scored and (Mamba-2) the plain running sum."""
    if isinstance(mixer, Mamba2Mixer):
        return _basis_mamba2(mixer, attention, hidden, context, half_life)
    heads = attention.q.shape[0] // mixer.sizes.repeat_width
    values = {"half_life": half_life, "constant": 0.0, "score": 1.0, "skip": 0.0, "rms": 1.0}
    apply_fit(mixer, attention, HeadFit(**{k: torch.full((heads,), v) for k, v in values.items()}))
    scored = mixer.features(hidden, context)  # [B, T, Ch]
    v = nn.functional.linear(hidden, attention.v)
    repeat = heads * mixer.sizes.repeat_width // v.shape[-1]
    v = v.unflatten(-1, (-1, mixer.sizes.repeat_width)).repeat_interleave(repeat, -2)
    return torch.stack([v, scored.view_as(v).to(v.dtype)], -1)


def _basis_mamba2(
    mixer: Mamba2Mixer,
    attention: AttentionWeights,
    hidden: Tensor,
    context: StepContext,
    half_life: float,
) -> Tensor:
    s = mixer.sizes
    q, k, v = (
        nn.functional.linear(hidden, weight).unflatten(-1, (-1, s.head_dim))
        for weight in (attention.q, attention.k, attention.v)
    )  # [B, T, heads, P]
    q = q / math.sqrt(s.head_dim)
    # the mixer holds channel 0 of B and C constant
    q = torch.cat([torch.zeros_like(q[..., :1]), q[..., 1:]], -1)
    v = v.repeat_interleave(s.n_heads // s.x_heads, 2)  # [B, T, H, P]
    dt = torch.ones(v.shape[:3], dtype=v.dtype)
    A = torch.full((s.n_heads,), -math.log(2) / half_life)
    ones = torch.ones(*v.shape[:2], 1, 1, dtype=v.dtype)
    scored, _ = kernels.ssd(v, dt, A, k, q, seq_idx=context.seq_idx)
    plain, _ = kernels.ssd(v, dt, A, ones, ones, seq_idx=context.seq_idx)
    return torch.stack([v, scored, plain], -1)


def _rescale_heads(mixer: Mamba2Mixer, features: list[Tensor], problem: Problem) -> None:
    """Give each head's norm weight the scale of least squared error, in features as well."""
    heads = mixer.sizes.n_heads
    dot, energy = 0.0, 0.0
    for feature, wanted, mask in zip(features, problem.heads, problem.masks, strict=True):
        feature = feature[mask].unflatten(-1, (heads, -1))  # [tokens, H, P]
        wanted = wanted[mask].to(feature.dtype).unflatten(-1, (heads, -1))
        dot = dot + (feature * wanted).sum((0, 2))
        energy = energy + feature.pow(2).sum((0, 2))
    scale = (dot / energy.clamp(min=1e-12)).repeat_interleave(mixer.sizes.head_dim)
    mixer.norm.weight.mul_(scale)
    for feature in features:
        feature.mul_(scale)


def _refit_output(
    mixer: nn.Module, features: list[Tensor], problem: Problem
) -> tuple[float, float, float | None]:
    """Ridge towards the present out_proj; returns held-out error before, after, and the strength."""
    feature = torch.cat([f[m] for f, m in zip(features, problem.masks, strict=True)]).float()
    target = torch.cat(
        [t[m] for t, m in zip(problem.targets, problem.masks, strict=True)]
    ).float()  # [tokens, D]
    if mixer.out_proj.bias is not None:
        feature = nn.functional.pad(feature, (0, 1), value=1.0)  # [tokens, F + 1]
    residual = target - mixer.out_proj(feature[:, : mixer.out_proj.in_features])
    split = int(len(target) * (1 - HELD_OUT))
    spread = (target[split:] - target[:split].mean(0)).pow(2).sum().clamp(min=1e-12)
    before = float(residual[split:].pow(2).sum() / spread)
    gram, moment = _normal(feature[:split], residual[:split])
    errors = {
        strength: float(
            (residual[split:] - feature[split:] @ _ridge(gram, moment, strength)).pow(2).sum()
            / spread
        )
        for strength in RIDGE
    }
    strength = min(errors, key=errors.__getitem__)
    if not errors[strength] < before:
        return before, before, None
    more_gram, more_moment = _normal(feature[split:], residual[split:])
    update = _ridge(gram + more_gram, moment + more_moment, strength)  # [F (+ 1), D]
    if mixer.out_proj.bias is not None:
        mixer.out_proj.bias.add_(update[-1])
        update = update[:-1]
    mixer.out_proj.weight.add_(update.T)
    return before, errors[strength], strength


def _normal(feature: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return (feature.T @ feature).double(), (feature.T @ residual).double()


def _ridge(gram: Tensor, moment: Tensor, strength: float) -> Tensor:
    damping = strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + damping, moment).float()
