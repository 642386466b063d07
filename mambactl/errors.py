"""Every error a user can meet: what is wrong, a hint of what to do, and one exit code.

The codes are part of the command-line contract and never change meaning.
"""

from collections.abc import Mapping
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes, frozen by a test; `EXIT_CODES` says when each is returned."""

    DONE = 0
    BUG = 1
    USAGE = 2
    MODEL = 3
    UPSTREAM = 4
    OUTPUT = 5
    RESOURCE = 6
    CHECK = 7
    INTERRUPTED = 130
    TERMINATED = 143


# for the reference of the command line
EXIT_CODES = {
    ExitCode.DONE: "success; the line on stdout is valid",
    ExitCode.BUG: "a bug, reported with a traceback",
    ExitCode.USAGE: "usage error: a wrong argument, recipe or data set",
    ExitCode.MODEL: "the input model is missing, incomplete, not supported or refused by the hub",
    ExitCode.UPSTREAM: "nothing arrived on stdin because the previous stage failed",
    ExitCode.OUTPUT: "the output exists or is partial: use `--resume` or `--force`",
    ExitCode.RESOURCE: "the machine cannot do it: memory, disk, device, a missing package or a "
    "version outside the supported range; for `push` also the network, the token or the hub",
    ExitCode.CHECK: "a requested check failed (`--fail-under`, `--check`, `--min-speedup`), "
    "`bench` decoded a wrong token, or a training loss is not finite or stayed far above its best",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C), after saving a state that can be resumed",
    ExitCode.TERMINATED: "terminated (SIGTERM), after saving a state that can be resumed",
}


class MambactlError(Exception):
    """Base of all expected failures; `hint` says what to do, often a command to run.

    `made` is what was made before and would be lost, for the error object of `--json`.
    """

    code = ExitCode.BUG
    made: Mapping[str, object] = {}

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class UsageError(MambactlError):
    """A wrong argument, recipe or data set."""

    code = ExitCode.USAGE


class ModelError(MambactlError):
    """The input model cannot be used: missing, incomplete, mismatched or not supported."""

    code = ExitCode.MODEL


class UpstreamError(MambactlError):
    """Nothing arrived on stdin because the stage before failed."""

    code = ExitCode.UPSTREAM


class OutputError(MambactlError):
    """The output exists or is partial."""

    code = ExitCode.OUTPUT


class ResourceError(MambactlError):
    """The machine or its network cannot do it: memory, disk, GPU, a missing package, the hub."""

    code = ExitCode.RESOURCE


class CheckError(MambactlError):
    """A check failed: one that was asked for, or the training loss is no longer finite."""

    code = ExitCode.CHECK
