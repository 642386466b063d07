"""Every error a user can meet: what is wrong, a hint of what to do, and one exit code.

The codes are part of the command-line contract and never change meaning.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes, documented in the README and frozen by a test."""

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


class MambactlError(Exception):
    """Base of all expected failures; `hint` says what to do, often a command to run."""

    code = ExitCode.BUG

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
