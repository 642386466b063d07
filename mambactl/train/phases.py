"""The phases of a distillation as data: what trains in each, at which rate and for how long."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mambactl.checkpoint.contents import ranges
from mambactl.checkpoint.load import empty_model
from mambactl.errors import UsageError
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.registry import ATTENTION, looks_up, part_of
from mambactl.options import DistillConfig
from mambactl.options.on_policy import STAGE as ON_POLICY
from mambactl.options.phase_steps import phase_steps
from mambactl.train.ledger import Work
from mambactl.train.optimization import mixer_parameters, rest_parameters
from mambactl.train.stepwise import Group, groups, replacement_order, stand_in_misfit

LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+)")
TOPS = {"embed_tokens": "embeddings", "norm": "norms", "lm_head": "head"}


@dataclass(frozen=True)
class PhasePlan:
    """One phase: `layers` are the mixers that train; `waiting` layers run the teacher's attention.

    A rate of 0 freezes, and `freeze_kept` queries and keys of kept attention.
    """

    name: str
    kind: str
    steps: int
    layers: tuple[int, ...]
    mixer_rate: float
    rest_rate: float
    waiting: tuple[int, ...] = ()
    freeze_kept: bool = True

    def parameters(self, model: nn.Module) -> list[tuple[dict[str, nn.Parameter], float]]:
        """Parameters that train with their peak rates, a tied weight once."""
        mixers = {n: p for n, p in mixer_parameters(model).items() if _layer(n) in self.layers}
        rest = rest_parameters(model, self.freeze_kept) if self.rest_rate else {}
        # attention beside the recurrence of a waiting layer does not run
        rest = {n: p for n, p in rest.items() if not self._waits(n)}
        return [(mixers, self.mixer_rate)] + ([(rest, self.rest_rate)] if rest else [])

    def _waits(self, name: str) -> bool:
        found = part_of(name)
        return found is not None and bool(found[1]) and _layer(name) in self.waiting

    def work(self, student: HybridConfig, teacher: HybridConfig, checkpointing: bool) -> Work:
        """Work of one step of the phase."""
        return Work(
            student.with_layers(dict.fromkeys(self.waiting, (ATTENTION, None))),
            teacher,
            self.layers,
            rest=self.rest_rate > 0,
            freeze_kept=self.freeze_kept,
            aligns=self.kind == "align",
            checkpointing=checkpointing,
        )

    def describe(self, model: nn.Module, tokens_per_step: int) -> dict[str, object]:
        """Describe the phase for `--dry-run`: parts that train and that do not, with parameters."""
        trained = self.parameters(model)
        names = {name for members, _ in trained for name in members}
        frozen = {n: p for n, p in model.named_parameters() if n not in names}
        found: dict[str, object] = {
            "name": self.name,
            "steps": self.steps,
            "tokens_at_most": self.steps * tokens_per_step,
            "trained": [
                {**part, "lr": rate} for members, rate in trained for part in parts_of(members)
            ],
            "frozen": parts_of(frozen),
        }
        return found | ({"attention_of_the_teacher": ranges(self.waiting)} if self.waiting else {})


def plan_phases(
    config: DistillConfig,
    student: HybridConfig,
    teacher: HybridConfig,
    ranking: Sequence[int] | None = None,
) -> list[PhasePlan]:
    """Every phase that has steps, in order; raises UsageError for what cannot be done."""
    steps = phase_steps(config)
    replaced = tuple(student.replaced_layers)
    planned: list[PhasePlan] = []
    if "align" in steps:
        _require(student.misfit(teacher), "mixers cannot be aligned")
        planned.append(PhasePlan("align", "align", steps["align"], replaced, config.align_lr, 0.0))
    if "stepwise" in steps:
        _require(stand_in_misfit(student, teacher), "layers cannot be replaced step by step")
        order = replacement_order(student, config.stepwise_order, ranking)
        found = groups(order, student.num_hidden_layers, config.stepwise_groups)
        planned += _stepwise(config, found, steps["stepwise"])
    for name in ("logits", ON_POLICY):
        if name in steps:
            rates = (config.lr, config.rest_lr)
            planned.append(PhasePlan(name, name, steps[name], replaced, *rates))
    return [replace(plan, freeze_kept=config.freeze_kept) for plan in planned]


def shapes_of(config: HybridConfig) -> HybridForCausalLM:
    """The model without memory, tied weights once."""
    model = empty_model(config)
    model.tie_weights()
    return model


def parts_of(parameters: Mapping[str, nn.Parameter]) -> list[dict[str, object]]:
    """Parameters summed by part and layers: `{"part", "layers", "parameters"}`."""
    found: dict[str, tuple[set[int], list[int]]] = {}
    for name, parameter in parameters.items():
        layer = _layer(name)
        members, counts = found.setdefault(_part(name), (set(), []))
        counts.append(parameter.numel())
        if layer is not None:
            members.add(layer)
    return [
        {
            "part": part,
            **({"layers": ranges(members)} if members else {}),
            "parameters": sum(counts),
        }
        for part, (members, counts) in found.items()
    ]


def _layer(name: str) -> int | None:
    """Index of the layer that a parameter is in."""
    match = LAYER.match(name)
    return None if match is None else int(match[1])


def _part(name: str) -> str:
    """Part of the model that a parameter belongs to, as listings call it."""
    match = LAYER.match(name)
    if match is None:
        top = name.removeprefix("model.").partition(".")[0]
        return TOPS.get(top, top)
    if (found := part_of(name)) is not None:
        spec, inherited = found
        part = spec.inherited[inherited] if inherited else spec.label
        return f"queries and keys of {part}" if looks_up(name) else part
    return "norms" if match[2].endswith("layernorm") else match[2]


def _stepwise(config: DistillConfig, found: Sequence[Group], steps: int) -> Iterable[PhasePlan]:
    """Steps dealt to the groups in equal shares."""
    if steps < len(found):
        raise UsageError(
            f"{steps} stepwise steps are too few for {len(found)} groups",
            "raise --stepwise-steps or --max-steps, or give fewer --stepwise-groups",
        )
    shares = [steps // len(found) + (number < steps % len(found)) for number in range(len(found))]
    for number, (group, count) in enumerate(zip(found, shares, strict=True), 1):
        name = f"stepwise-{number}"
        rates = (config.lr, config.stepwise_rest_lr)
        yield PhasePlan(name, "stepwise", count, group.recurrent, *rates, group.waiting)


def _require(problem: str | None, what: str) -> None:
    if problem:
        raise UsageError(f"{what}: {problem}", "use --stages logits")
