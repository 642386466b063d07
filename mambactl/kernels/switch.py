"""MAMBACTL_KERNELS, the environment variable that turns implementations of kernels off."""

import os

from mambactl.errors import UsageError

SWITCH = "MAMBACTL_KERNELS"
AUTO, REFERENCE, FORCED = "auto", "reference", "mamba-ssm"


def switch() -> str:
    """Value of MAMBACTL_KERNELS: `REFERENCE`, `FORCED`, or "" where it is unset or `auto`.

    Raises UsageError for another word.
    """
    value = os.environ.get(SWITCH, "").strip().lower()
    value = "" if value == AUTO else value
    if value not in ("", REFERENCE, FORCED):
        raise UsageError(
            f"{SWITCH}={value} is none of {AUTO}, {REFERENCE}, {FORCED}",
            f"unset {SWITCH}, or use one",
        )
    return value


def forced() -> bool:
    """True if calls go to mamba-ssm and causal-conv1d wherever these can serve them."""
    return switch() == FORCED
