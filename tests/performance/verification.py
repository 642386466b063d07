"""The cost to the target of reading a whole draft, against reading one token."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mambactl.decode.backend import REFERENCE_K, K, why_not
from mambactl.decode.gpu.session import Session
from mambactl.decode.gpu.state import PackedModel, pack
from mambactl.errors import ModelError, ResourceError
from mambactl.kernels.decode.reference.verdict import Field, plan_stores
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.packed import NotSupported, Segment
from mambactl.models.session_size import SessionSize
from mambactl.speed.subject import Grid, Numbers, Subject, sweep
from tests.performance.graphs import capture, median_seconds

NUMBERS = ("verify_k", "verify_seconds", "pass_seconds", "verify_ratio")


def require_kernels(device: torch.device) -> None:
    """Raise ResourceError where the decode kernels do not run."""
    if reason := why_not(device):
        raise ResourceError(
            f"this measurement needs the GPU's decode kernels, which are off: {reason}",
            "mambactl doctor --deep",
        )


def verify(subject: Subject, k: K, grid: Grid, points: Sequence[Numbers]) -> list[Numbers]:
    """The points with `verify_ratio` added: the time of a pass over k + 1 tokens that first replays
    k accepted ones, over that of plain decoding's pass over one; head and argmax included.
    """
    drafts = REFERENCE_K if k == "auto" else k

    def measure(length: int, rows: int, advance: Callable[[], None]) -> Numbers:
        return _measure(subject, grid.mean_context(length), rows, drafts, grid.seed)

    found = sweep(subject, grid, NUMBERS, measure)
    return [point | numbers for point, numbers in zip(points, found, strict=True)]


def supported(model: HybridForCausalLM, positions: int) -> PackedModel:
    """`decode.gpu.state.pack`, with what the kernels do not compute as a ModelError."""
    try:
        return pack(model, positions)
    except NotSupported as error:
        raise ModelError(
            f"the decode kernels do not support {error}", hint="try --dtype bfloat16"
        ) from None


@torch.no_grad()
def _measure(subject: Subject, context: int, rows: int, k: int, seed: int) -> Numbers:
    from mambactl.kernels.decode.triton.ops import TritonOps

    ops = TritonOps.for_model(subject.model)
    capacity = SessionSize.holding(rows, context, k).capacity
    weights = supported(subject.model, capacity)
    # kept here: a graph does not keep the memory it works on
    sessions = [
        stand(weights, ops, rows, capacity, context, drafts, replayed, seed)
        for drafts, replayed in ((k, k), (0, 0))
    ]
    seconds = median_seconds([capture(lambda s=session: read(s)) for session in sessions])
    return dict(zip(NUMBERS, (k, *seconds, seconds[0] / seconds[1]), strict=True))


def stand(
    weights: PackedModel,
    ops: Any,
    rows: int,
    capacity: int,
    context: int,
    k: int,
    replayed: int,
    seed: int = 0,
) -> Session:
    """A session whose rows hold `context` random tokens, the last `replayed` not in the states."""
    session = Session(weights, None, ops, SessionSize(rows, capacity, k))
    generator = torch.Generator(session.device).manual_seed(seed)
    for held in session.target.tensors():
        held.normal_(0, 0.5, generator=generator)
    batch = session.batch
    batch.feed.random_(len(weights.table), generator=generator)
    batch.field(Field.ACTIVE).fill_(1)
    batch.field(Field.LENGTH).fill_(context)
    batch.field(Field.BASE).fill_(max(context - replayed, 0))
    plan_stores(batch.progress, **session.limits)
    return session


def read(session: Session) -> None:
    """One pass of the target over the pending token and k drafts, its best tokens in the batch."""
    batch, step, T = session.batch, session.step, session.k + 1
    segment = Segment(
        batch.field(Field.LENGTH), batch.field(Field.ACTIVE), batch.field(Field.BASE),
        batch.field(Field.NEXT), T=T,
    )  # fmt: skip
    stream = step.target.run(batch.feed[:, 1 : 1 + T], segment)
    step.target.best(stream, T, False, batch.best[: segment.rows], step.target_head)
