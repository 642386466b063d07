"""Listeners to a run's steps: lines on stderr, and trackers for the hand-written loop."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mambactl import console
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.json_values import AnyObject
from mambactl.options import StepsConfig, TrackedConfig
from mambactl.ranks import is_main

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "mambactl"
# the variables by which trackers are told where their files go
FOLDERS = {
    "tensorboard": "TENSORBOARD_LOGGING_DIR",
    "wandb": "WANDB_DIR",
    "trackio": "TRACKIO_DIR",
}
# names of a ledger's numbers where trackers of transformers' trainers show them
SHOWN = {"lr": "learning_rate", "gradient_norm": "grad_norm"}
HELD_OUT = ("kl", "agreement", "perplexity_ratio", "ce", "eval_tokens")


class Listener(Protocol):
    """Listener to every line of metrics.jsonl."""

    def __call__(self, line: AnyObject) -> None:
        """Receive the line of one step."""
        ...


def follow_steps(config: StepsConfig, folder: RunFolder) -> None:
    """Report the progress of the run every few steps, if asked."""
    if config.log_every:
        folder.listeners.append(StepLines(config.log_every))


class StepLines:
    """Loss, learning rate and gradient norm on stderr, at regular steps of a phase."""

    def __init__(self, every: int):
        self.every = every

    def __call__(self, line: AnyObject) -> None:
        """Print the line of a step that is a multiple of the interval."""
        if "loss" not in line or line["step"] % self.every:
            return
        norm = line.get("gradient_norm", line.get("grad_norm"))
        console.log(
            f"{line['phase']} step {line['step']}: loss {line['loss']:.4f}, lr {line['lr']:.3g}"
            + ("" if norm is None else f", gradient norm {norm:.3g}")
        )


def send_files(asked: Sequence[str], folder: RunFolder) -> None:
    """Send files of trackers to `OUT.logs`, unless their environment variables say otherwise."""
    if not asked:
        return
    with console.failure_warned(folder.logs):
        folder.logs.mkdir(parents=True, exist_ok=True)
    for name, variable in FOLDERS.items():
        if name in asked:
            os.environ.setdefault(variable, str(folder.logs.absolute()))
    os.environ.setdefault("WANDB_PROJECT", PROJECT)


def track(config: TrackedConfig, folder: RunFolder) -> None:
    """Let the trackers that are asked for hear of a loop of our own, through Accelerate's classes.

    The first failure of a tracker is a warning, after which it is left alone.
    """
    send_files(config.log_to, folder)
    if is_main():
        folder.listeners += [Tracked(name, folder) for name in config.log_to]


class Tracked:
    """One tracker; steps of all phases are counted on, as it takes one curve of each name."""

    def __init__(self, name: str, folder: RunFolder):
        self.name, self.folder = name, folder
        self.tracker: GeneralTracker | None = None
        self.failed = False
        self.phase, self.before, self.last = "", 0, 0

    def __call__(self, line: AnyObject) -> None:
        """Send a line's numbers."""
        if self.failed:
            return
        try:
            self._send(line)
        except Exception as error:  # whatever a tracker and its network bring
            self.failed = True
            console.warn_unwritten(f"{self.folder.logs} ({self.name})", error)

    def _send(self, line: AnyObject) -> None:
        if self.tracker is None:
            self.tracker = self._started()
        if line["phase"] != self.phase:
            self.phase, self.before = line["phase"], self.before + self.last
        self.last = line["step"]
        values = {
            f"eval/{key}" if key in HELD_OUT else f"train/{SHOWN.get(key, key)}": value
            for key, value in line.items()
            if isinstance(value, int | float) and key != "step"
        }
        self.tracker.log(values, step=self.before + self.last)

    def _started(self) -> "GeneralTracker":
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # its decorators ask which process this is
        PartialState()
        run = self.folder.out.name
        kind = LOGGER_TYPE_TO_CLASS[self.name]
        if kind.requires_logging_directory:
            tracker = kind(run, os.environ[FOLDERS[self.name]])
        else:
            tracker = kind(os.environ["WANDB_PROJECT"], name=run)
        tracker.start()
        return tracker
