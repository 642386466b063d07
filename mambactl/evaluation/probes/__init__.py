"""Table of the probes that `eval` runs: a row each, in a file of its own.

A new probe is a file with a subclass of `Probe` and a row here. Options, JSON, kept results, tables
of the console, pages, comparisons, cards and bounds follow from it. Loading the table loads no
heavy library: probes import theirs when they measure.
"""

from collections.abc import Callable, Iterable
from copy import copy
from typing import TYPE_CHECKING, cast

from pydantic import create_model

from mambactl.errors import UsageError
from mambactl.evaluation.harness.task_options import TaskNames, TaskOptions, TaskPrompts
from mambactl.evaluation.probes.agreement_probe import AgreementOptions, AgreementProbe
from mambactl.evaluation.probes.fidelity_probe import FidelityProbe
from mambactl.evaluation.probes.layer_probe import LayerOptions, LayerProbe
from mambactl.evaluation.probes.needle_probe import NeedleOptions, NeedleProbe
from mambactl.evaluation.probes.position_probe import PositionOptions, PositionProbe
from mambactl.evaluation.probes.preference_probe import PreferenceOptions, PreferenceProbe
from mambactl.evaluation.probes.probe import AnyProbe
from mambactl.evaluation.probes.recall_probe import RecallOptions, RecallProbe
from mambactl.evaluation.probes.task_probe import TaskProbe
from mambactl.options.evaluation import Certainty, Controls, EvalBase, Outcome, Sizes, Text

_ROWS: tuple[AnyProbe, ...] = (
    FidelityProbe(),
    LayerProbe(),
    TaskProbe(),
    RecallProbe(),
    NeedleProbe(),
    PositionProbe(),
    PreferenceProbe(),
    AgreementProbe(),
)
PROBES: dict[str, AnyProbe] = {probe.name: probe for probe in _ROWS}

# the order of the help: options of a probe that is not named here come before the last ones
HELP = (
    Text,
    PreferenceOptions,
    TaskNames,
    Sizes,
    TaskPrompts,
    AgreementOptions,
    RecallOptions,
    Controls,
    Certainty,
    LayerOptions,
    NeedleOptions,
    PositionOptions,
)


class _Measured(EvalBase):
    """Options of which some ask a probe to measure."""

    @property
    def packages(self) -> list[str]:
        """Modules of the requested probes, and of the page."""
        asked = [probe for probe in PROBES.values() if probe.asked(self)]
        return [*super().packages, *(name for probe in asked for name in probe.packages)]

    def require_coherent(self) -> None:
        """Raise UsageError where nothing is asked for, or options of probes contradict others."""
        super().require_coherent()
        asked = [probe for probe in PROBES.values() if probe.asked(self)]
        changes = cast(Controls, self)
        if (changes.control or changes.ablate) and not any(probe.controlled for probe in asked):
            what = "--control and --ablate measure nothing by themselves"
            raise UsageError(what, "add --data FILE")
        for probe in PROBES.values():
            probe.validate(self)
        if not asked:
            *ways, last = (probe.example for probe in PROBES.values() if probe.example)
            raise UsageError(
                "nothing to measure", f"pass {', '.join(ways)}, {last}, or several of them"
            )


def eval_options(probes: Iterable[AnyProbe]) -> type[EvalBase]:
    """The options of an `eval` with these probes."""
    owned = [part for probe in probes for part in probe.options]
    others = [part for part in HELP if part in owned or part not in _PARTS]
    parts = (*others, *(part for part in owned if part not in HELP), Outcome)
    fields = {
        # a field belongs to one class
        name: (annotation, copy(getattr(part, name)))
        for part in parts
        for name, annotation in part.__annotations__.items()
    }
    about = "Fidelity to a teacher, recall, and task accuracy."
    made: Callable[..., type[EvalBase]] = create_model
    return made("EvalConfig", __base__=_Measured, __doc__=about, __module__=__name__, **fields)


_PARTS = frozenset(part for probe in _ROWS for part in probe.options)
if TYPE_CHECKING:

    class EvalConfig(
        PreferenceOptions,
        AgreementOptions,
        RecallOptions,
        LayerOptions,
        NeedleOptions,
        PositionOptions,
        TaskOptions,
        _Measured,
    ):
        """Options of `eval`, as type checkers see them."""

else:
    EvalConfig = eval_options(_ROWS)


def lower_is_better(name: str) -> bool:
    """True if a smaller value of the metric `name` of some probe is the better one.

    Scores of extracted answers are called METRIC:FILTER.
    """
    metric = name.partition(":")[0]
    known = (each for probe in PROBES.values() for each in probe.metrics)
    return any(each.name == metric and each.better == "lower" for each in known)
