"""Steps and epochs of a run, once its rows are counted."""

from dataclasses import replace
from math import ceil

from mambactl import console
from mambactl.data.mixture import shares
from mambactl.train.job import Job

ROWS = "rows"


def with_steps(job: Job, rows: int, name: str = ROWS) -> Job:
    """The run with the steps that its epochs are; says how often it sees each of its rows.

    In a mixture by weight the rows hold the epochs already.
    """
    config = job.config
    if config.epochs is not None:
        passes = 1 if shares(config.data) else config.epochs
        steps = max(1, ceil(passes * rows / job.global_batch))
        job = replace(job, config=config.model_copy(update={"max_steps": steps, "epochs": None}))
    steps, batch = job.config.max_steps, job.global_batch
    if config.epochs is not None and shares(config.data):
        seen = f"{config.epochs:g} epochs of the smallest set for its share"
    else:
        seen = f"{_times(steps * batch / rows)} epochs"
    kind = "packed rows" if name == ROWS and config.packing else name
    are = "steps" if steps > 1 else "step"
    console.log(f"{steps:,} {are} of {batch} {kind}: {seen}, of {rows:,} {kind}")
    if batch > rows:
        console.warn(
            f"a step of {batch} {kind} is larger than the data, which has {rows}: it holds each "
            f"{_times(batch / rows)} times; lower --batch-size or --grad-accum, or give more data"
        )
    return job


def _times(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
