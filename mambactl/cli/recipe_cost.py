"""Sums of a recipe before it runs: tokens, hours, memory, disk and downloads.

Hours are those of training on one H200, by operations and the speeds that were measured there
("Training speed" in `recipes/results/by-layer.md`). Memory is that of weights, gradients and
optimiser; activations come on top. What is not known of a model is None, never a guess.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from mambactl import console
from mambactl.checkpoint.decoder_sizes import PUBLISHED, decoder_sizes
from mambactl.checkpoint.hub_names import hub_name
from mambactl.cli.training_needs import (
    MIXERS,
    STORED,
    TRAINED,
    Subject,
    has_guide,
    needs,
    operations,
    phases_of,
    rate,
    trained_share,
)
from mambactl.errors import ModelError
from mambactl.options import ConvertConfig, DpoConfig, RowsConfig, TrainConfig
from mambactl.recipes import REFERENCE, Recipe, Section, list_recipes, substitute
from mambactl.stage_result import Table

# operations a second of two CPU cores, and hours there that a person waits for
CPU_RATE, CPU_HOURS = 1e11, 0.5


@dataclass(frozen=True)
class Cost:
    """Tokens, hours and bytes of one section; None where a size is not known."""

    key: str
    tokens: int = 0
    operations: float | None = 0.0
    hours: float | None = 0.0
    memory: int | None = 0
    disk: int | None = 0
    # to go on from; it is gone when the result is there
    state: int = 0


N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Total:
    """A recipe as a whole: sums, but for memory, of which sections need the most."""

    sections: tuple[Cost, ...]
    models: tuple[str, ...]
    download_bytes: int | None
    data: tuple[str, ...]
    uses_cuda: bool

    @property
    def tokens(self) -> int:
        """Tokens of all training, repeated ones counted again."""
        return sum(each.tokens for each in self.sections)

    @property
    def hours(self) -> float | None:
        """Hours of training on one H200."""
        return _sum(each.hours for each in self.sections)

    @property
    def disk(self) -> int | None:
        """Bytes of models fetched, checkpoints, and the largest state of a run."""
        own = _total([*(each.disk for each in self.sections), self.download_bytes])
        return None if own is None else own + max((e.state for e in self.sections), default=0)

    @property
    def memory(self) -> int | None:
        """Bytes that the largest section holds."""
        known = _known(each.memory for each in self.sections)
        return None if known is None else max(known, default=0)

    @property
    def needs_gpu(self) -> bool | None:
        """True where CPU cores would train for longer than a person waits."""
        operations = _sum(each.operations for each in self.sections)
        if self.uses_cuda or operations is None:
            return True if self.uses_cuda else None
        return operations / CPU_RATE / 3600 > CPU_HOURS

    def as_metrics(self) -> dict[str, object]:
        """Costs as JSON-able numbers."""
        own = ("tokens", "hours", "memory", "disk", "needs_gpu")
        return {name: getattr(self, name) for name in own} | {
            "download_bytes": self.download_bytes,
            "models": list(self.models),
            "data": list(self.data),
        }


def shown_hours(hours: float | None) -> str:
    """Hours for a table."""
    if hours is None:
        return "?"
    if hours == 0:
        return ""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 0.05 else "< 0.1"


def shown_bytes(count: int | None) -> str:
    """GB for a table."""
    if count is None:
        return "?"
    return (
        "" if count == 0 else f"{count / 1e9:,.0f} GB" if count >= 1e10 else f"{count / 1e9:.1f} GB"
    )


def shown_gpu(total: Total) -> str:
    """The GPU that a recipe asks for, by what it has to hold."""
    if total.needs_gpu is False:
        return "none"
    return shown_bytes(total.memory) or "any"


def shipped() -> list[tuple[Recipe, Total]]:
    """Every recipe that comes with the package, and its cost."""
    return [(recipe, cost_of(recipe)) for recipe in list_recipes()]


def listing(found: Sequence[tuple[Recipe, Total]]) -> Table:
    """A row per recipe: GPU memory, hours, disk, variants and description."""
    rows = [
        (
            recipe.name,
            shown_gpu(cost),
            shown_hours(cost.hours),
            shown_bytes(cost.disk),
            _variants(recipe.variants),
            recipe.description,
        )
        for recipe, cost in found
    ]
    return Table("", ("recipe", "GPU", "hours", "disk", "variants", "description"), rows)


def _variants(names: Sequence[str]) -> str:
    """Join names that begin alike: `@50,75 @paper-50,75`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        start, hyphen, rest = name.rpartition("-")
        groups.setdefault(start + hyphen, []).append(rest)
    return " ".join(f"@{start}{','.join(ends)}" for start, ends in groups.items())


@dataclass(frozen=True)
class Start:
    """Model that a section's own came from, and the share of its attention replaced since."""

    origin: str | None = None
    ratio: float = 0.0


def started(recipe: Recipe) -> Iterator[tuple[Section, Start]]:
    """Every section, with what its model came from."""
    outputs = {section.key: f"${{{section.key}}}" for section in recipe.sections}
    # by the section that wrote it
    starts: dict[str, Start] = {}
    source: str | None = None
    for section in recipe.sections:
        named = substitute(section.model, outputs) or source
        start = starts.get(named, Start(named)) if named else Start()
        if isinstance(section.config, ConvertConfig):
            start = replace(start, ratio=section.config.ratio)
        if section.command.writes == "model":
            source = outputs[section.key]
            starts[source] = start
        yield section, start


def cost_of(recipe: Recipe, sections: Sequence[Section] = ()) -> Total:
    """Add up a recipe, or some of its sections."""
    costs, models, data = [], {}, {}
    for section, start in started(recipe):
        config = section.config
        if sections and section not in sections:
            continue
        costs.append(_cost(section, start))
        others = [spec for _, spec in config.other_models]
        # the name of a shape is no model to fetch
        named = start.origin if section.command.reads_model else None
        for spec in filter(None, (named, *others)):
            if hub_name(spec):
                models[hub_name(spec)] = None
        data |= dict.fromkeys(spec for spec in config.named_data if _is_fetched(spec))
    cuda = any(str(section.config.device).startswith("cuda") for section in recipe.sections)
    sizes = [PUBLISHED.get(name) for name in models]
    download = _total(None if size is None else STORED * size.parameters for size in sizes)
    return Total(tuple(costs), tuple(models), download, tuple(data), cuda)


def show_cost(total: Total) -> None:
    """Print what the sections take, and what is fetched for them."""
    rows = [
        (
            each.key,
            f"{each.tokens:,}" if each.tokens else "",
            shown_hours(each.hours),
            shown_bytes(each.memory),
            shown_bytes(each.disk),
        )
        for each in total.sections
    ]
    sums = (shown_hours(total.hours), shown_bytes(total.memory), shown_bytes(total.disk))
    rows.append(("together", f"{total.tokens:,}", *sums))
    columns = ("section", "tokens", "hours", "memory", "disk")
    console.table("on one H200, estimated", columns, rows)
    for what, names, size in (
        ("models", total.models, f" ({shown_bytes(total.download_bytes)})"),
        ("data", total.data, ""),
    ):
        if names:
            console.log(
                f"fetched where the cache does not hold them: {what}{size}: {', '.join(names)}"
            )


def parameters_of(spec: str | None) -> int | None:
    """Parameters of a model: published, or counted in headers on this disk."""
    name = hub_name(spec)
    if name in PUBLISHED:
        return PUBLISHED[name].parameters
    if spec is None or not Path(spec).expanduser().exists():
        return None
    from mambactl.checkpoint.contents import describe

    try:
        return describe(spec)["parameters"]
    except ModelError:
        return None


def _is_fetched(data: str) -> bool:
    """True for a data set that is neither on this disk nor written by another section."""
    return not (os.path.exists(data) or REFERENCE.search(data))


def _cost(section: Section, start: Start) -> Cost:
    config, size = section.config, parameters_of(start.origin)
    written = section.command.writes == "model"
    stored = None if size is None else STORED * size
    disk = stored if written else 0
    if not isinstance(config, TrainConfig):
        return Cost(section.key, memory=stored if section.needs_model else 0, disk=disk)
    tokens = tokens_of(config)
    guide = guide_of(config, size)
    if size is None or guide is None:
        return Cost(section.key, tokens, None, None, None, None)
    sizes = decoder_sizes(start.origin)
    mixers = size * MIXERS if sizes is None else start.ratio * sizes.layers * sizes.mixer
    total = sum(
        tokens * steps / config.max_steps * operations(config, phase, size, guide, mixers)
        for phase, steps in phases_of(config).items()
    )
    trained = round(size * trained_share(config))
    memory = STORED * (size - trained) + TRAINED * trained + STORED * guide
    if sizes is not None:
        phases = needs(config, Subject(sizes, start.ratio, guide), 1, shards=False)
        memory = max(each.total for each in phases.values())
    hours = total / rate(size) / 3600
    return Cost(section.key, tokens, total, hours, memory, disk, TRAINED * trained)


def tokens_of(config: RowsConfig) -> int:
    """Tokens of all rows that a section takes, of every process."""
    processes = getattr(config, "processes", 1)
    rows = config.max_steps * config.batch_size * config.grad_accum * processes
    # a preference is two rows
    return rows * config.max_length * (2 if isinstance(config, DpoConfig) else 1)


def guide_of(config: TrainConfig, size: int | None) -> int | None:
    """Parameters of the teacher or reference in memory; None where they are not known."""
    if not has_guide(config):
        return 0
    return parameters_of(config.teacher) if config.teacher else size


def _known(parts: Iterable[N | None]) -> list[N] | None:
    """List the numbers; return None if any of them is unknown."""
    found = list(parts)
    known = [part for part in found if part is not None]
    return known if len(known) == len(found) else None


def _sum(parts: Iterable[float | None]) -> float | None:
    known = _known(parts)
    return None if known is None else sum(known)


def _total(parts: Iterable[int | None]) -> int | None:
    known = _known(parts)
    return None if known is None else sum(known)
