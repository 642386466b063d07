"""Which of several processes of one run this is, as torchrun and `accelerate launch` tell it."""

import os

# a folder where the processes that `--nproc` started leave word of how they failed
REPORTS = "_MAMBACTL_REPORTS"
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def launched() -> bool:
    """Whether this process was started as one of a run's processes."""
    return all(os.environ.get(name, "").isdecimal() for name in _NAMES)


def processes() -> int:
    """How many processes the run has, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    """This process's number among them."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """This process's number on its machine, which is the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def is_main() -> bool:
    """Whether this process writes, prints and answers for the others."""
    return rank() == 0


def sharded() -> bool:
    """Whether weights, gradients and optimiser state are split over the processes."""
    return launched() and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
