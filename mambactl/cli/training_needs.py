"""Memory and speed of training by sizes alone, before anything is fetched or made.

A prediction. Its constants come from steps that were timed on one H200: "Training speed" in
`recipes/results/by-layer.md`, and the runs beside it. `distill --dry-run` measures more closely, on
the device and with the model at hand.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mambactl.checkpoint.decoder_sizes import DecoderSizes
from mambactl.options import DistillConfig, DpoConfig, SftConfig, TrainConfig
from mambactl.options.on_policy import STAGE as ON_POLICY
from mambactl.options.phase_steps import phase_steps

# parameters and operations a second of training, measured on one H200
SMALL, LARGE = (1.35e8, 2.7e14), (8.0e9, 5.6e14)
# bytes of a parameter: in bfloat16; in fp32; its gradient; both moments of AdamW
STORED, MASTER, GRADIENT, MOMENTS = 2, 4, 4, 8
# all that a parameter takes which trains
TRAINED = MASTER + GRADIENT + MOMENTS
# share of a Llama's parameters in its attention, about which new mixers have
MIXERS = 1 / 6
# share of the parameters that adapters have
ADAPTERS = 0.02
# numbers kept for the backward pass per token and layer, in widths of the MLP and of the model: of
# a layer that trains, one that only passes gradients on, and one whose mixer is aligned
KEPT_TRAINED, KEPT_FROZEN, KEPT_ALIGNED = (3, 10), (2, 9), (3, 5)
# logits of a chunk and the tensors of them alive together; bytes of logits' gradients that are kept
# until the head's gradient is computed
CHUNK, CHUNK_TENSORS, LOGITS_KEPT = 1 << 26, 5, 1 << 31
# bytes of kernels' workspaces, and of what is neither weight nor activation
OTHER = 600_000_000


@dataclass(frozen=True)
class Needs:
    """One phase of training: bytes on each GPU by use, and operations of a token."""

    memory: Mapping[str, int]
    operations: float
    steps: int

    @property
    def total(self) -> int:
        """Bytes on each GPU."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Subject:
    """A student, which is a decoder with `ratio` of its attention replaced, and its teacher."""

    sizes: DecoderSizes
    ratio: float
    # parameters of the teacher or reference in memory, 0 without one
    guide: int

    @property
    def mixers(self) -> int:
        """Parameters of the new mixers."""
        return round(self.ratio * self.sizes.layers * self.sizes.mixer)

    @property
    def parameters(self) -> int:
        """Parameters of the student, whose windows and kept heads are the teacher's attention."""
        return self.sizes.parameters + self.mixers

    def trained(self, config: TrainConfig, phase: str | None = None) -> int:
        """Parameters that train in a phase, or in any."""
        if isinstance(config, DistillConfig):
            return self.parameters if _trains_rest(config, phase) else self.mixers
        return round(self.parameters * trained_share(config))


def phases_of(config: TrainConfig) -> dict[str, int]:
    """Steps of each phase of a stage."""
    if isinstance(config, DistillConfig):
        return phase_steps(config)
    return {"": config.max_steps}


def needs(config: TrainConfig, subject: Subject, gpus: int, shards: bool) -> dict[str, Needs]:
    """Bytes and operations of every phase, where weights are split over `gpus` if one `shards`."""
    return {
        phase: Needs(
            _split(_memory(config, subject, phase, shards), subject, gpus if shards else 1),
            operations(config, phase, subject.sizes.parameters, subject.guide, subject.mixers),
            steps,
        )
        for phase, steps in phases_of(config).items()
    }


def _memory(config: TrainConfig, subject: Subject, phase: str, shards: bool) -> dict[str, int]:
    """Bytes of a phase where one GPU holds everything; weights that are split are nobody else's."""
    trained, any_trained = subject.trained(config, phase), subject.trained(config)
    frozen = subject.parameters - any_trained
    if isinstance(config, DistillConfig) and subject.guide and not shards:
        # the teacher's own tensors
        frozen = 0
    writes = phase == ON_POLICY
    cast = subject.sizes.mixer if phase == "align" else trained
    return {
        "weights": MASTER * any_trained + STORED * (frozen + writes * subject.parameters),
        "gradients": GRADIENT * trained,
        "optimizer": MOMENTS * trained,
        "teacher": STORED * subject.guide,
        "casts": STORED * cast,
        "activations": _activations(config, subject, phase),
        "logits": 0 if phase == "align" else _logits(config, subject, phase),
        "other": OTHER,
    }


def _split(memory: dict[str, int], subject: Subject, parts: int) -> dict[str, int]:
    """Bytes of one of several GPUs, with the layers that it has whole for a moment."""
    if parts == 1:
        return memory
    sizes = subject.sizes
    layer = sizes.block + sizes.mixer
    # the layer at work, the next one on its way, and the head
    gathered = MASTER * (2 * layer + sizes.embedding) + STORED * layer
    split = ("weights", "gradients", "optimizer", "teacher")
    divided = {name: -(-count // parts) for name, count in memory.items() if name in split}
    return memory | divided | {"casts": 0, "gathered": gathered}


def _activations(config: TrainConfig, subject: Subject, phase: str) -> int:
    sizes, tokens = subject.sizes, _batch_tokens(config)
    if phase == "align":
        # layers are aligned one by one
        return STORED * tokens * _kept(sizes, KEPT_ALIGNED)
    # adapters pass gradients through weights that do not train
    trains = subject.trained(config, phase) > subject.parameters / 2
    layer = _kept(sizes, KEPT_TRAINED if trains else KEPT_FROZEN)
    if config.grad_checkpointing:
        return STORED * tokens * (sizes.layers * sizes.hidden + 2 * layer)
    return STORED * tokens * sizes.layers * layer


def _kept(sizes: DecoderSizes, widths: tuple[int, int]) -> int:
    return widths[0] * sizes.intermediate + widths[1] * sizes.hidden


def _logits(config: TrainConfig, subject: Subject, phase: str) -> int:
    elements = _batch_tokens(config) * subject.sizes.vocabulary
    chunk = CHUNK_TENSORS * MASTER * min(CHUNK, elements)
    if subject.trained(config, phase) < subject.parameters:
        return chunk
    return chunk + GRADIENT * subject.sizes.embedding + min(LOGITS_KEPT, STORED * elements)


def _batch_tokens(config: TrainConfig) -> int:
    # a preference is two rows
    return config.batch_size * config.max_length * (2 if isinstance(config, DpoConfig) else 1)


def _trains_rest(config: DistillConfig, phase: str | None) -> bool:
    named = phase_steps(config) if phase is None else (phase,)
    rests = config.rest_lr > 0 and bool({"logits", ON_POLICY} & {*named})
    return rests or (config.stepwise_rest_lr > 0 and "stepwise" in named)


def trained_share(config: TrainConfig) -> float:
    """Share of a model's parameters that train in any phase, where its mixers are not counted."""
    if isinstance(config, DistillConfig):
        return 1.0 if _trains_rest(config, None) else MIXERS
    return ADAPTERS if getattr(config, "lora", None) else 1.0


def has_guide(config: TrainConfig) -> bool:
    """True if a teacher or reference is in memory while a stage trains."""
    if isinstance(config, SftConfig):
        return config.kl_weight > 0 and not config.teacher_cache
    # asked once, then freed
    return not (isinstance(config, DpoConfig) and config.precompute_reference)


def operations(config: TrainConfig, phase: str, size: int, guide: int, mixers: float) -> float:
    """Operations of a token: two a parameter forward, four backward; `guide` is the teacher's."""
    if phase == "align":
        # mixers learn from states of the teacher, which need no gradient
        return 2 * guide + 5 * mixers
    whole = 2 * guide + 6 * size + 2 * size * config.grad_checkpointing
    if isinstance(config, DpoConfig):
        return whole + 2 * size * config.precompute_reference
    if isinstance(config, DistillConfig):
        return whole - 2 * size * (not _trains_rest(config, phase))
    return whole


def rate(size: int) -> float:
    """Operations a second for a model of a size, between the two that were measured."""
    low, high = (math.log(parameters) for parameters, _ in (SMALL, LARGE))
    part = min(1.0, max(0.0, (math.log(size) - low) / (high - low)))
    return SMALL[1] ** (1 - part) * LARGE[1] ** part
