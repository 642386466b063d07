"""Division of the steps of `distill` among its stages."""

from mambactl.errors import UsageError
from mambactl.options.training import DistillConfig

ORDER = ("align", "stepwise", "logits")


def phase_steps(config: DistillConfig) -> dict[str, int]:
    """Optimiser steps of each stage, `max_steps` together; a stage of none is left out.

    Aligning takes its share if no steps are given. What else is not given is shared equally, and
    the last stage takes what is left.
    """
    order = list(dict.fromkeys(config.stages))
    if not order:
        raise UsageError("no phase to run", f"give --stages {','.join(ORDER)} or some of them")
    if order != sorted(order, key=ORDER.index):
        raise UsageError(
            f"stages {', '.join(order)} are not in their order", f"it is {', '.join(ORDER)}"
        )
    given: dict[str, int | None] = {"align": config.align_steps, "stepwise": config.stepwise_steps}
    fixed = {n: steps for n in order[:-1] if (steps := given[n]) is not None}
    left = config.max_steps - sum(fixed.values())
    if left < 0:
        raise UsageError(
            f"{' and '.join(f'{name}_steps {count}' for name, count in fixed.items())} is more "
            f"than max_steps {config.max_steps}",
            "max_steps counts all stages",
        )
    if "align" in order[:-1] and "align" not in fixed and config.align_share is not None:
        wanted = max(1, round(config.align_share * config.max_steps)) if config.align_share else 0
        # every other stage has a step, if there are enough
        fixed["align"] = max(0, min(wanted, left - (len(order) - len(fixed) - 1)))
        left -= fixed["align"]
    share = left // (len(order) - len(fixed))
    steps = {name: fixed.get(name, share) for name in order[:-1]}
    steps[order[-1]] = config.max_steps - sum(steps.values())
    return {name: count for name, count in steps.items() if count}
