"""Division of the steps of `distill` among its stages."""

from collections.abc import Sequence

from mambactl.errors import UsageError
from mambactl.options.on_policy import STAGE as ON_POLICY
from mambactl.options.training import DistillConfig

ORDER = ("align", "stepwise", "logits", ON_POLICY)


def phase_steps(config: DistillConfig) -> dict[str, int]:
    """Optimiser steps of each stage, `max_steps` together; a stage of none is left out.

    Aligning takes its share if no steps are given. What else is not given is shared equally, and
    the last stage takes what is left; with steps of its own on-policy distillation leaves that to
    the stage before.
    """
    order = list(dict.fromkeys(config.stages))
    if not order:
        raise UsageError("no phase to run", f"give --stages {','.join(ORDER)} or some of them")
    if order != sorted(order, key=ORDER.index):
        raise UsageError(
            f"stages {', '.join(order)} are not in their order", f"it is {', '.join(ORDER)}"
        )
    _require_onpolicy_steps(config, order)
    given: dict[str, int | None] = {
        "align": config.align_steps,
        "stepwise": config.stepwise_steps,
        ON_POLICY: config.onpolicy_steps,
    }
    rest = order[-1]
    if rest == ON_POLICY and config.onpolicy_steps is not None and len(order) > 1:
        rest = order[-2]
    others = [name for name in order if name != rest]
    fixed = {name: count for name in others if (count := given.get(name)) is not None}
    left = config.max_steps - sum(fixed.values())
    if left < 0:
        raise UsageError(
            f"{' and '.join(f'--{name}-steps {count}' for name, count in fixed.items())} is more "
            f"than --max-steps {config.max_steps}",
            "--max-steps counts all stages",
        )
    if "align" in others and "align" not in fixed and config.align_share is not None:
        wanted = max(1, round(config.align_share * config.max_steps)) if config.align_share else 0
        # every other stage has a step, if there are enough
        fixed["align"] = max(0, min(wanted, left - (len(order) - len(fixed) - 1)))
        left -= fixed["align"]
    share = left // (len(order) - len(fixed))
    steps = {name: fixed.get(name, share) for name in others}
    steps[rest] = config.max_steps - sum(steps.values())
    if rest != order[-1] and not steps[rest]:
        raise UsageError(
            f"--onpolicy-steps {config.onpolicy_steps} leave no step of --max-steps "
            f"{config.max_steps} to {rest}",
            "raise --max-steps, or lower --onpolicy-steps",
        )
    return {name: steps[name] for name in order if steps[name]}


def without_steps(config: DistillConfig) -> list[str]:
    """Stages that get no step because there are too few, and not because they are to have none."""
    asked: dict[str, float | None] = {
        "align": config.align_share if config.align_steps is None else config.align_steps,
        "stepwise": config.stepwise_steps,
        ON_POLICY: config.onpolicy_steps,
    }
    steps = phase_steps(config)
    return [name for name in config.stages if name not in steps and asked.get(name) != 0]


def _require_onpolicy_steps(config: DistillConfig, order: Sequence[str]) -> None:
    """Raise UsageError for steps of on-policy distillation that are not a part of the run's."""
    if config.onpolicy_steps is None:
        return
    if ON_POLICY not in order:
        raise UsageError(
            f"--onpolicy-steps are of the stage {ON_POLICY}, which is not asked for",
            f"add it: --stages {','.join([*order, ON_POLICY])}",
        )
    if order == [ON_POLICY] and config.onpolicy_steps != config.max_steps:
        raise UsageError(
            f"{ON_POLICY} is the only stage: all steps are its own",
            "give --max-steps alone, or a stage before it",
        )
