"""`recipe plan`: what a recipe would take on GPUs of a size, and options that make it fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from mambactl.checkpoint.decoder_sizes import decoder_sizes
from mambactl.cli.recipe_cost import (
    Start,
    cost_of,
    guide_of,
    shown_bytes,
    shown_hours,
    started,
    tokens_of,
)
from mambactl.cli.training_needs import Needs, Subject, needs, rate
from mambactl.errors import UsageError
from mambactl.metrics import STEP_RATE
from mambactl.options import (
    DistillConfig,
    DpoConfig,
    SftConfig,
    SpreadConfig,
    TrainConfig,
)
from mambactl.recipes import Recipe, Section
from mambactl.stage_result import Table

# of a GPU's memory, what CUDA and gaps between tensors leave
USABLE = 0.95
# numbers of GPUs that are tried where fewer do not hold a section
MORE_GPUS = (2, 4, 8, 16, 32, 64, 128)
# in the order of the table
PARTS = (
    *("weights", "gradients", "optimizer", "teacher", "casts", "gathered"),
    *("activations", "logits", "other"),
)


@dataclass(frozen=True)
class Gpus:
    """Number of GPUs that a recipe would run on, and bytes of memory of each."""

    count: int
    memory: float

    def hold(self, found: Sequence[Needs]) -> bool:
        """True if the memory of each is enough for every phase."""
        return all(phase.total <= USABLE * self.memory for phase in found)


@dataclass(frozen=True)
class Remedy:
    """An option that saves memory: how it is typed, and the configuration with it, if any.

    `changes`: the result is another one with it.
    """

    flag: Callable[[TrainConfig], str]
    apply: Callable[[TrainConfig], TrainConfig | None]
    changes: bool = False


@dataclass(frozen=True)
class Planned:
    """One training section: its phases as it would run, and options that make it fit.

    `sharded`: its GPUs share the weights. `remedies` is None where nothing makes it fit, and empty
    where it fits as it is; `enough` is a number of GPUs that hold it with options that change no
    result, where it needs more than it has.
    """

    key: str
    gpus: int
    sharded: bool
    phases: dict[str, Needs]
    tokens: int
    steps: int
    tokens_per_second: dict[str, float]
    remedies: tuple[str, ...] | None
    fitting: int | None
    enough: int | None

    def seconds(self, phase: str) -> float:
        """Time of a phase."""
        share = self.tokens * self.phases[phase].steps / self.steps
        return share / self.tokens_per_second[phase]

    def name(self, phase: str) -> str:
        """Name of the section, and of its phase where it has several kinds."""
        return f"{self.key} {phase}".strip()


def plan_of(recipe: Recipe, gpus: Gpus) -> tuple[list[Planned], list[str]]:
    """Every training section, and those of models whose sizes are not known."""
    found, unknown = [], []
    for section, start in started(recipe):
        if not isinstance(section.config, TrainConfig):
            continue
        planned = _planned(section, section.config, start, gpus)
        if planned is None:
            unknown.append(section.key)
        else:
            found.append(planned)
    return found, unknown


def _planned(section: Section, config: TrainConfig, start: Start, gpus: Gpus) -> Planned | None:
    sizes = decoder_sizes(start.origin)
    guide = guide_of(config, sizes and sizes.parameters)
    if sizes is None or guide is None:
        return None
    count = gpus.count if isinstance(config, SpreadConfig) else 1

    def of(options: TrainConfig, count: int) -> tuple[bool, dict[str, Needs]]:
        asked = guide_of(options, sizes.parameters)
        subject = Subject(sizes, start.ratio, guide if asked is None else asked)
        return _spread(options, subject, Gpus(count, gpus.memory))

    def remedies_for(
        count: int, among: Sequence[Remedy]
    ) -> tuple[tuple[str, ...] | None, int | None]:
        return _remedies(config, lambda options: list(of(options, count)[1].values()), gpus, among)

    sharded, phases = of(config, count)
    remedies, fitting = remedies_for(count, HARMLESS)
    enough = None
    if remedies is None:
        if _can_share(config):
            more = (each for each in MORE_GPUS if each > count)
            holds = (each for each in more if remedies_for(each, HARMLESS)[0] is not None)
            enough = next(holds, None)
        remedies, fitting = remedies_for(count, REMEDIES)
    # a token of every GPU at a time
    speeds = {
        phase: count * rate(sizes.parameters) / each.operations for phase, each in phases.items()
    }
    return Planned(
        section.key,
        gpus=count,
        sharded=sharded,
        phases=phases,
        tokens=tokens_of(config),
        steps=config.max_steps,
        tokens_per_second=speeds,
        remedies=remedies,
        fitting=fitting,
        enough=enough,
    )


def _spread(config: TrainConfig, subject: Subject, gpus: Gpus) -> tuple[bool, dict[str, Needs]]:
    """Decide if GPUs share the weights; needs of every phase then."""
    whole = needs(config, subject, gpus.count, shards=False)
    asked = getattr(config, "shard", None)
    if gpus.count == 1 or asked is False or not _can_share(config):
        return False, whole
    if asked is None and gpus.hold(list(whole.values())):
        return False, whole
    return True, needs(config, subject, gpus.count, shards=True)


def _can_share(config: TrainConfig) -> bool:
    """True if the processes of a stage can share the weights, as the stage itself decides."""
    if not isinstance(config, SpreadConfig):
        return False
    try:
        config.require_splittable()
    except UsageError:
        return False
    return True


def _remedies(
    config: TrainConfig,
    of: Callable[[TrainConfig], list[Needs]],
    gpus: Gpus,
    among: Sequence[Remedy],
) -> tuple[tuple[str, ...] | None, int | None]:
    """The fewest options `among` some with which a section fits, and the bytes it takes with them.

    None where nothing makes it fit.
    """
    for number in range(len(among) + 1):
        for chosen in combinations(among, number):
            flags, changed = [], config
            for remedy in chosen:
                flags.append(remedy.flag(changed))
                other = remedy.apply(changed)
                if other is None:
                    break
                changed = other
            else:
                found = of(changed)
                if gpus.hold(found):
                    return tuple(flags), max(phase.total for phase in found)
    return None, None


def _checkpointed(config: TrainConfig) -> TrainConfig | None:
    if config.grad_checkpointing:
        return None
    return config.model_copy(update={"grad_checkpointing": True})


def _smaller(config: TrainConfig) -> TrainConfig | None:
    """The same rows a step, one at a time."""
    if config.batch_size == 1:
        return None
    accumulated = config.batch_size * config.grad_accum
    return config.model_copy(update={"batch_size": 1, "grad_accum": accumulated})


def _smaller_flag(config: TrainConfig) -> str:
    return f"--batch-size 1 --grad-accum {config.batch_size * config.grad_accum}"


def _sharded(config: TrainConfig) -> TrainConfig | None:
    if getattr(config, "shard", None) or not _can_share(config):
        return None
    return config.model_copy(update={"shard": True})


def _without_teacher(config: TrainConfig) -> TrainConfig | None:
    if isinstance(config, DpoConfig) and not config.precompute_reference:
        return config.model_copy(update={"precompute_reference": True})
    if isinstance(config, SftConfig) and config.kl_weight and not config.teacher_cache:
        return config.model_copy(update={"teacher_cache": "CACHE"})
    return None


def _less_trained(config: TrainConfig) -> TrainConfig | None:
    if isinstance(config, DistillConfig) and config.rest_lr:
        return config.model_copy(update={"rest_lr": 0.0})
    if isinstance(config, SftConfig) and not config.lora:
        return config.model_copy(update={"lora": 16})
    return None


# those that change no result come first
REMEDIES = (
    Remedy(lambda _: "--shard", _sharded),
    Remedy(lambda _: "--grad-checkpointing", _checkpointed),
    Remedy(_smaller_flag, _smaller),
    Remedy(
        lambda config: (
            "--precompute-reference" if isinstance(config, DpoConfig) else "--teacher-cache CACHE"
        ),
        _without_teacher,
    ),
    Remedy(
        lambda config: "--lora 16" if isinstance(config, SftConfig) else "--rest-lr 0",
        _less_trained,
        changes=True,
    ),
)
HARMLESS = tuple(remedy for remedy in REMEDIES if not remedy.changes)


def table_of(recipe: Recipe, planned: Sequence[Planned], gpus: Gpus) -> Table:
    """A row for every phase: bytes on each GPU by use, tokens a second and hours."""
    used = [part for part in PARTS if any(_uses(each, part) for each in planned)]
    rows = [
        (
            each.name(phase),
            *(_gb(found.memory.get(part, 0)) for part in used),
            _gb(found.total),
            "yes" if gpus.hold([found]) else "no",
            f"{each.tokens_per_second[phase]:,.0f}",
            shown_hours(each.seconds(phase) / 3600),
        )
        for each in planned
        for phase, found in each.phases.items()
    ]
    title = (
        f"{recipe.name} on {gpus.count} x {gpus.memory / 1e9:g} GB: GB on each GPU, predicted, "
        "not measured; speeds of H200s"
    )
    columns = ("section", *used, "together", "fits", "tokens/s", "hours")
    return Table(title, columns, rows, True)


def _uses(planned: Planned, part: str) -> bool:
    return any(found.memory.get(part) for found in planned.phases.values())


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f}" if count else ""


def remarks(
    recipe: Recipe, planned: Sequence[Planned], unknown: Sequence[str], gpus: Gpus
) -> Iterator[str]:
    """Sentences about what does not fit, how the rows are counted, and the disk."""
    for each in planned:
        most = max(found.total for found in each.phases.values())
        if each.sharded:
            yield f"{each.key}: its {each.gpus} GPUs share the weights (FSDP2)"
        if each.remedies is None:
            yield (
                f"{each.key} does not fit: {most / 1e9:,.1f} GB, and no option makes it fit "
                f"{gpus.memory / 1e9:g} GB; "
                + (f"try --gpus {each.enough}" if each.enough else "it needs larger GPUs")
            )
        elif each.remedies:
            taken = f"{' '.join(each.remedies)} it takes {(each.fitting or 0) / 1e9:,.1f} GB"
            more = f"try --gpus {each.enough}, or with less that trains, " if each.enough else ""
            yield f"{each.key} does not fit: {most / 1e9:,.1f} GB; {more}with {taken}"
        if each.gpus < gpus.count:
            yield f"{each.key} runs on one GPU"
    for key in unknown:
        yield f"{key}: the shape of its model is not known here, and it is not on this disk"
    if gpus.count > 1:
        yield (
            "speeds grow with the GPUs as if none waited for another, which is the most they can; "
            f"hours are those of the recipe's own tokens: a step has {gpus.count} times the "
            "rows, so divide --grad-accum or --max-steps by as much"
        )
    if not planned and not unknown:
        yield f"nothing in {recipe.name} trains"
    elif cost_of(recipe).needs_gpu is False:
        yield f"{recipe.name} is made for a CPU and needs no GPU; what is planned is a run on GPUs"
    if disk := shown_bytes(cost_of(recipe).disk):
        yield f"disk for all checkpoints and one state: {disk}"


def as_metrics(
    recipe: Recipe, planned: Sequence[Planned], unknown: Sequence[str], gpus: Gpus
) -> dict[str, object]:
    """The plan as JSON-able data; sizes are bytes on each GPU."""
    return {
        "recipe": recipe.name,
        "gpus": gpus.count,
        "memory": gpus.memory,
        "predicted": True,
        "sections": [
            {
                "section": each.key,
                "gpus": each.gpus,
                "sharded": each.sharded,
                "fits": each.remedies == (),
                "options": None if each.remedies is None else list(each.remedies),
                "bytes_with_options": each.fitting,
                "gpus_that_hold_it": each.enough,
                "phases": [
                    {
                        "phase": phase or each.key,
                        "bytes": {**found.memory, "total": found.total},
                        STEP_RATE.name: round(each.tokens_per_second[phase]),
                        "hours": each.seconds(phase) / 3600,
                    }
                    for phase, found in each.phases.items()
                ],
            }
            for each in planned
        ],
        "unknown": list(unknown),
        "hours": sum(each.seconds(phase) for each in planned for phase in each.phases) / 3600,
        "disk": cost_of(recipe).disk,
    }
