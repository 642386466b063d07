"""Progressive replacement: layers become recurrent in groups, easy ones first.

arXiv 2408.15237 replaces layers step by step; until a layer is reached, the block runs the
teacher's attention. That module is borrowed, not copied: `StandIns` puts it in the place of the
mixer and takes it out again.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from mambactl.errors import UsageError
from mambactl.models.block import HybridBlock
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.registry import ATTENTION

# shares of all layers replaced in the models of the paper, and before the first of them
SHARES = (0.25, 0.5, 0.75, 0.875, 1.0)
# what attention needs from the model around it
SHARED = ("head_dim", "rope_parameters", "sliding_window")


class Group(NamedTuple):
    """One step: `recurrent` layers so far, of which `new` joined now; the rest `waiting`."""

    recurrent: tuple[int, ...]
    new: tuple[int, ...]
    waiting: tuple[int, ...]


def groups(order: Sequence[int], layers: int, shares: Sequence[float] | None = None) -> list[Group]:
    """Groups of the replaced layers in `order`, of `layers` in all; the last takes what is left.

    A share says how many of all layers are recurrent after its group. Raises UsageError unless
    shares ascend.
    """
    wanted = list(SHARES if shares is None else shares)
    if wanted != sorted(set(wanted)):
        raise UsageError(
            f"stepwise groups {', '.join(f'{share:g}' for share in wanted)} do not ascend",
            "each is the share of all layers replaced so far: --stepwise-groups 0.25,0.5",
        )
    ends = [min(len(order), round(share * layers)) for share in wanted]
    ends = sorted({end for end in ends if end > 0} | {len(order)})
    starts = [0, *ends[:-1]]
    return [
        Group(tuple(sorted(order[:end])), tuple(order[start:end]), tuple(sorted(order[end:])))
        for start, end in zip(starts, ends, strict=True)
    ]


def replacement_order(
    config: HybridConfig, asked: Sequence[int] | None, ranking: Sequence[int] | None
) -> list[int]:
    """Replaced layers, easy ones first: as asked, else as ranked, else from the first layer on.

    `ranking` may name other layers too. Raises UsageError when `asked` is not exactly the replaced.
    """
    replaced = config.replaced_layers
    if asked is not None:
        if sorted(asked) != replaced:
            raise UsageError(
                f"--stepwise-order must name each replaced layer once: {_listed(replaced)}",
                f"it names {_listed(asked)}",
            )
        return list(asked)
    ranked = [index for index in ranking or () if index in replaced]
    return ranked + [index for index in replaced if index not in ranked]


def stand_in_misfit(student: HybridConfig, teacher: HybridConfig) -> str | None:
    """Why the teacher's attention cannot run inside the student's blocks, or None."""
    if problem := student.misfit(teacher):
        return problem
    for field in SHARED:
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            return f"the teacher's {field} is {theirs}, the student's {ours}"
    return None


class StandIns:
    """While entered, the student's `layers` run the teacher's attention in place of their mixer.

    The mixers stay where they are, with their values; parameters of the teacher never train.
    """

    def __init__(
        self, student: HybridForCausalLM, teacher: HybridForCausalLM, layers: Sequence[int]
    ):
        self.student, self.teacher, self.layers = student, teacher, tuple(layers)
        self._before: list[tuple[HybridBlock, str]] = []
        self._mixers: list[str] = []

    def __enter__(self) -> None:
        # the model builds its mask from the list: packed documents need one where attention runs
        self._mixers = self.student.config.mixers
        self.student.config.mixers = [
            ATTENTION.name if index in self.layers else name
            for index, name in enumerate(self._mixers)
        ]
        for index in self.layers:
            block = self.student.model.layers[index]
            self._before.append((block, block.mixer_name))
            setattr(block, ATTENTION.attribute, self.teacher.model.layers[index].mixer)
            block.mixer_name = ATTENTION.attribute

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for block, name in self._before:
            delattr(block, ATTENTION.attribute)
            block.mixer_name = name
        self._before = []
        self.student.config.mixers = self._mixers


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
