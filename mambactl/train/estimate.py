"""Cost of a distillation: bytes from shapes, seconds from operations and a short probe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mambactl.json_values import JsonObject
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.registry import is_new
from mambactl.options import DistillConfig
from mambactl.options.on_policy import STAGE as ON_POLICY
from mambactl.present import of_kind
from mambactl.train.compiled import compiles
from mambactl.train.job import Job
from mambactl.train.ledger import Work
from mambactl.train.losses import CHUNK_ELEMENTS
from mambactl.train.phases import PhasePlan, shapes_of
from mambactl.train.step_timing import Measured, Setup, probe
from mambactl.train.writing_cost import writing_bytes, writing_seconds

MASTER, GRADIENT, MOMENTS = 4, 4, 8
# fp32 tensors of one chunk of logits that are alive together: logits, log p, gradient, log q, q
CHUNK_TENSORS = 5


@dataclass(frozen=True)
class Estimate:
    """Cost of one phase: seconds of its steps without compilation, and bytes by use."""

    seconds: float
    memory: Mapping[str, int]
    flops_per_second: float
    probed_on: str

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes alive at a time."""
        return sum(self.memory.values())

    def as_metrics(self) -> JsonObject:
        """JSON-able form, to be compared with the measured cost."""
        return {
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
            "memory": dict(self.memory),
            "flops_per_second": round(self.flops_per_second),
            "probed_on": self.probed_on,
        }

    @staticmethod
    def of_all(phases: Mapping[str, "Estimate"]) -> JsonObject:
        """The whole run: phases follow each other."""
        return {
            "seconds": round(sum(phase.seconds for phase in phases.values()), 3),
            "peak_bytes": max(phase.peak_bytes for phase in phases.values()),
        }


def estimate(
    job: Job, student: HybridConfig, teacher: HybridConfig, plans: Sequence[PhasePlan]
) -> dict[str, Estimate]:
    """Estimate every phase by name, from a probe on the job's device."""
    config = of_kind(DistillConfig, job.config)
    rows, length = config.batch_size, config.max_length
    works = [plan.work(student, teacher, config.grad_checkpointing) for plan in plans]
    compiling = compiles(config.compile, job.device)
    setup = Setup(job.device, job.dtype, job.amp, compiling, config.capture)
    measured = probe(works, setup, rows, length)
    model, guide = shapes_of(student), shapes_of(teacher)
    cuda = job.device.type == "cuda"
    # what a recorded step keeps stays reserved
    recordings = config.recordings if config.capture and cuda else 1
    where = torch.cuda.get_device_name(job.device) if cuda else str(job.device)
    found = {}
    for plan, work in zip(plans, works, strict=True):
        trained = sum(p.numel() for members, _ in plan.parameters(model) for p in members.values())
        batch = sum(
            rows * length * count / measured.rates[kind]
            for kind, count in _rated(work, length, measured).items()
        )
        step = batch * config.grad_accum + trained * measured.seconds_per_parameter
        memory = training_bytes(model, trained) | {
            "teacher": sum(p.numel() for p in guide.parameters()) * job.dtype.itemsize,
            "activations": _activations(work, measured, rows * length, job.dtype.itemsize)
            * recordings,
            "casts": _casts(model, work, job.amp),
        }
        if not work.aligns:
            memory["head"] = _head_bytes(student, plan, job)
        rate = work.flops(rows, length) * config.grad_accum / step
        if plan.kind == ON_POLICY:
            memory |= writing_bytes(job, config, student, model)
            step += config.grad_accum * writing_seconds(job, config, student, model, rate)
        found[plan.name] = Estimate(step * plan.steps, memory, rate, where)
    return found


def training_bytes(model: HybridForCausalLM, trained: int) -> dict[str, int]:
    """Bytes of fp32 weights, and of gradients and both AdamW moments of what trains."""
    return {
        "weights": MASTER * sum(p.numel() for p in model.parameters()),
        "gradients": GRADIENT * trained,
        "moments": MOMENTS * trained,
    }


def _rated(work: Work, length: int, measured: Measured) -> dict[tuple[str, str], float]:
    """Operations per token, repeated passes counted with the rate of a student's own mixer."""
    found: dict[tuple[str, str], float] = {}
    for (what, how), count in work.pieces(length).items():
        known = how
        if how == "repeat":
            known = "infer" if (what, "infer") in measured.rates else "train"
        found[what, known] = found.get((what, known), 0.0) + count
    return found


def _activations(work: Work, measured: Measured, tokens: int, itemsize: int) -> int:
    """Bytes of activations kept for backward, and those of the largest layer once more."""
    if work.aligns:
        return round(2 * tokens * max(measured.kept[n, "align"] for n in _names(work, work.layers)))
    layers = range(len(work.student.mixers))
    kept = [measured.kept[name, "train"] for name in _names(work, layers)]
    if work.checkpointing:
        # of each layer only the hidden state that entered it
        return round(tokens * (len(kept) * work.student.hidden_size * itemsize + 2 * max(kept)))
    return round(tokens * (sum(kept) + max(kept)))


def _names(work: Work, layers: Sequence[int]) -> list[str]:
    kinds = work.student.kinds
    return [kinds[index] for index in layers]


def _casts(model: HybridForCausalLM, work: Work, amp: torch.dtype | None) -> int:
    """Copies of matrices in the mixed-precision type, which a backward pass reads again."""
    if amp is None:
        return 0
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
    if work.aligns:
        # one mixer at a time, and autocast keeps its copies until the pass is over
        matrices = {name: count for name, count in matrices.items() if is_new(name)}
    return amp.itemsize * sum(matrices.values())


def _head_bytes(student: HybridConfig, plan: PhasePlan, job: Job) -> int:
    """One chunk of logits and, where the head trains, its gradient beside the collected one."""
    elements = CHUNK_ELEMENTS.get(job.device.type, CHUNK_ELEMENTS["cuda"])
    tokens = job.config.batch_size * job.config.max_length
    chunk = min(elements, tokens * student.vocab_size)
    weight = student.vocab_size * student.hidden_size if plan.rest_rate else 0
    return CHUNK_TENSORS * MASTER * chunk + GRADIENT * weight
