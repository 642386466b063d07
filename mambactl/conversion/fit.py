"""Closed-form fit of new mixers on a few thousand tokens: no gradient, one layer at a time.

Two streams of hidden states run through the layers together: the teacher's, and the student's
with every layer before already fitted. Each new mixer sees the student's stream and aims at what
the teacher's attention put out in its own. Per query head, the half-life comes from a grid and
constant, score and skip from least squares (`mambactl.models.mixers.spec.HeadFit`); then
out_proj is refitted by ridge regression towards the teacher's o_proj, with a strength chosen on
held-out rows.
A mixer beside a window of attention aims at what the window does not give.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mambactl.data.pack import Batch
from mambactl.models.block import HybridBlock
from mambactl.models.hybrid import HybridModel
from mambactl.models.mixers.attention import weights_of
from mambactl.models.mixers.from_attention import NO_DECAY
from mambactl.models.mixers.spec import AnySpec, AttentionWeights, HeadFit, Mixer, StepContext

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
    """Hidden states of teacher and student for a list of batches, advanced layer by layer.

    `model` is the teacher's, of which only masks and positions are used.
    """

    def __init__(self, model: HybridModel, embedding: Tensor, batches: Sequence[Batch]):
        self.batches = batches
        factor = model.config.embedding_multiplier
        self.teacher = [
            nn.functional.embedding(b.input_ids, embedding).float() * factor for b in batches
        ]
        self.student = list(self.teacher)
        self.contexts = [
            model.context(hidden, b.position_ids, seq_idx=b.seq_idx)
            for hidden, b in zip(self.teacher, batches, strict=True)
        ]

    @torch.no_grad()
    def expected_input(self, block: HybridBlock) -> Tensor:
        """The rms [D] of the channels that the next mixer reads, measured where no norm says it."""
        if not block.post_norm:
            return block.expected_input()
        rows = [hidden[b.valid] for hidden, b in zip(self.student, self.batches, strict=True)]
        return torch.cat(rows).square().mean(0).sqrt()

    @torch.no_grad()
    def keep(self, block: HybridBlock) -> None:
        """Run a layer that both have."""
        for i, context in enumerate(self.contexts):
            # up to the first replaced layer the streams are one
            same = self.student[i] is self.teacher[i]
            self.teacher[i] = block(self.teacher[i], context, None)
            self.student[i] = self.teacher[i] if same else block(self.student[i], context, None)

    @torch.no_grad()
    def replace(self, teacher: HybridBlock, student: HybridBlock, spec: AnySpec) -> LayerFit:
        """Fit the student's mixer, then run the layer in both streams."""
        heads, targets = [], []
        for i, context in enumerate(self.contexts):
            self.teacher[i], inner, mixed = _observe(teacher, self.teacher[i], context)
            heads.append(inner)
            targets.append(mixed)
        inputs = [student.entering(hidden) for hidden in self.student]
        masks = [batch.valid for batch in self.batches]
        problem = Problem(inputs, self.contexts, masks, heads, targets)
        weights = weights_of(teacher.attention, self.expected_input(teacher))
        problem = _beyond_window(spec, student.replacing, weights, problem)
        spec.start_fit(student.mixer, weights)
        report = fit_mixer(spec, student.replacing, weights, problem)
        for i, context in enumerate(self.contexts):
            self.student[i] = student(self.student[i], context, None)
        return report


@dataclass(frozen=True)
class Problem:
    """Inputs of a mixer [B, T, D] and its targets: heads [B, T, H P] and output [B, T, D]."""

    inputs: list[Tensor]
    contexts: list[StepContext]
    masks: list[Tensor]
    heads: list[Tensor]
    targets: list[Tensor]


def _beyond_window(
    spec: AnySpec, mixer: Mixer, attention: AttentionWeights, problem: Problem
) -> Problem:
    """The problem with the output of attention beside the recurrence taken off."""
    heads, targets = [], []
    for i, context in enumerate(problem.contexts):
        near = spec.beside(mixer, problem.inputs[i], context)
        if near is None:
            return problem
        heads.append(spec.recurrent_heads(mixer, problem.heads[i] - near))
        projected = nn.functional.linear(near, *attention.linear("o"))
        targets.append(problem.targets[i] - projected)
    return replace(problem, heads=heads, targets=targets)


def _observe(
    block: HybridBlock, hidden: Tensor, context: StepContext
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's output, its heads before o_proj [B, T, H P] and its mixer's output [B, T, D]."""
    seen: dict[str, Tensor] = {}

    def remember(_: nn.Module, arguments: tuple, output: Tensor) -> None:
        seen.update(inner=arguments[0], mixed=output)

    handle = block.attention.o_proj.register_forward_hook(remember)
    try:
        return block(hidden, context, None), seen["inner"], seen["mixed"]
    finally:
        handle.remove()


def fit_mixer(
    spec: AnySpec, mixer: Mixer, attention: AttentionWeights, problem: Problem
) -> LayerFit:
    """Fit a mixer that `spec.initialise` has filled, in place, and report its error."""
    half_lives: list[float] = []
    if spec.fits_heads:
        fit = fit_heads(spec, mixer, attention, problem)
        spec.apply_fit(mixer, attention, fit)
        half_lives = [round(value, 1) for value in fit.half_life.tolist()]
    features = [
        mixer.features(hidden, context)
        for hidden, context in zip(problem.inputs, problem.contexts, strict=True)
    ]
    if spec.rescales_heads:
        _rescale_heads(spec, mixer, len(half_lives), features, problem)
    before, after, ridge = _refit_output(mixer, features, problem)
    return LayerFit(before, after, half_lives, ridge)


def fit_heads(
    spec: AnySpec, mixer: Mixer, attention: AttentionWeights, problem: Problem
) -> HeadFit:
    """Per head the half-life, constant, score and skip of least squared error to the teacher."""
    gram, moment, samples = _head_sums(spec, mixer, attention, problem)
    weights = _solve_heads(gram, moment)  # [half-lives, H, R]
    if weights.shape[-1] == 2:
        # Mamba-1 has no negative score: such a head makes do with its skip
        alone = torch.stack(
            [moment[..., 0] / gram[..., 0, 0], torch.zeros_like(moment[..., 0])], -1
        )
        weights = torch.where(weights[..., 1:] < 0, alone, weights)
    energy = torch.einsum("lhr,lhrs,lhs->lh", weights, gram, weights)
    # squared error up to a constant
    best = (energy - 2 * (weights * moment).sum(-1)).argmin(0)  # [H]
    every = torch.arange(len(best))
    skip, score, *constant = weights[best, every].float().unbind(1)
    return HeadFit(
        half_life=torch.tensor(HALF_LIVES)[best],
        constant=constant[0] if constant else torch.zeros_like(score),
        score=score,
        skip=skip,
        rms=(energy[best, every] / samples).clamp(min=1e-12).sqrt().float(),
    )


def _head_sums(
    spec: AnySpec, mixer: Mixer, attention: AttentionWeights, problem: Problem
) -> tuple[Tensor, Tensor, int]:
    """Normal equations [half-lives, H, R, R] and [half-lives, H, R], and the samples in them."""
    sums: dict[float, Tensor] = {}
    tokens = samples = fresh = 0
    for i, mask in enumerate(problem.masks):
        if tokens >= HEAD_FIT_TOKENS:
            break
        basis = spec.basis(mixer, attention, problem.inputs[i], problem.contexts[i])
        for half_life in HALF_LIVES:
            parts = basis(half_life)
            wanted = problem.heads[i].view(parts[0].shape)
            rows = torch.stack([part[mask] for part in (*parts, wanted)])  # [R + 1, tokens, H, P]
            rows = rows.permute(2, 0, 1, 3).flatten(2)
            product = (rows @ rows.mT).double()
            sums[half_life] = sums[half_life] + product if half_life in sums else product
            # of every half-life alike
            fresh = rows.shape[-1]
        tokens += int(mask.sum())
        samples += fresh
    whole = torch.stack([sums[half_life] for half_life in HALF_LIVES])
    return whole[..., :-1, :-1], whole[..., :-1, -1], samples


def _solve_heads(gram: Tensor, moment: Tensor) -> Tensor:
    damped = gram + torch.diag_embed(1e-4 * gram.diagonal(dim1=-2, dim2=-1) + 1e-12)
    return torch.linalg.solve(damped, moment[..., None])[..., 0]


def _rescale_heads(
    spec: AnySpec, mixer: Mixer, heads: int, features: list[Tensor], problem: Problem
) -> None:
    """Give each head the scale of least squared error, in features as well."""
    dot, energy = (torch.zeros(heads, device=features[0].device) for _ in range(2))
    for feature, wanted, mask in zip(features, problem.heads, problem.masks, strict=True):
        feature = feature[mask].unflatten(-1, (heads, -1))  # [tokens, H, P]
        wanted = wanted[mask].to(feature.dtype).unflatten(-1, (heads, -1))
        dot = dot + (feature * wanted).sum((0, 2))
        energy = energy + feature.pow(2).sum((0, 2))
    scale = dot / energy.clamp(min=1e-12)
    spec.rescale(mixer, scale)
    wide = scale.repeat_interleave(features[0].shape[-1] // heads)
    for feature in features:
        feature.mul_(wide)


def _refit_output(
    mixer: Mixer, features: list[Tensor], problem: Problem
) -> tuple[float, float, float | None]:
    """Ridge towards the present out_proj: held-out error before and after, and the strength."""
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
