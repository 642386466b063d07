"""Shared parts of the stages on TRL's trainers: arguments, progress, metrics, stop and resume."""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from mambactl import console
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.errors import CheckError, ResourceError
from mambactl.json_values import JsonObject
from mambactl.models.transformers_names import CHECKPOINTING
from mambactl.options import TrackedConfig, TrainConfig
from mambactl.present import present
from mambactl.ranks import from_main, is_main, largest
from mambactl.train.interrupt import StopRequest
from mambactl.train.ledger import Evaluation, PhaseReport
from mambactl.train.run_lines import PROJECT, send_files
from mambactl.train.sharding import regather

# what transformers' callbacks take for a tracker, where that is not the package of its name
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
# held-out measurements that a report keeps
MEASURED = ("kl", "agreement", "perplexity_ratio", "ce")


def trainer_arguments(
    config: TrainConfig,
    folder: RunFolder,
    rate: float,
    device: torch.device,
    amp: torch.dtype | None,
) -> JsonObject:
    """Keyword arguments that SFTConfig and DPOConfig have in common."""
    return {
        "output_dir": str(folder.trainer),
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.grad_accum,
        "max_length": config.max_length,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(config.warmup, config.max_steps // 2),
        # every parameter has a gradient: nothing to look for
        "ddp_find_unused_parameters": False,
        "max_grad_norm": config.grad_clip,
        CHECKPOINTING: config.grad_checkpointing,
        "bf16": amp == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "save_strategy": "steps",
        "save_steps": config.save_every,
        "save_total_limit": 1,
        "logging_steps": 1,
        # the filter would show the last good loss in place of a nan
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "all",
        **reporting(config, folder),
        "disable_tqdm": True,
        "seed": config.seed,
        "data_seed": config.seed,
    }


def require_trackers(config: TrainConfig) -> None:
    """Raise ResourceError where a package that `--log-to` names is missing."""
    for name in config.log_to if isinstance(config, TrackedConfig) else []:
        if not any(find_spec(package) for package in PACKAGES.get(name, (name,))):
            raise ResourceError(
                f"--log-to {name} needs {name}, which is missing", f"pip install {name}"
            )


def reporting(config: TrainConfig, folder: RunFolder) -> JsonObject:
    """Arguments of a trainer that say where its curves go besides metrics.jsonl.

    Files go to `OUT.logs`, unless the environment variables of a tracker say otherwise.
    """
    asked = config.log_to if isinstance(config, TrackedConfig) else []
    send_files(asked, folder)
    where = {"project": PROJECT, "run_name": folder.out.name}
    return {"report_to": list(asked) or "none", **where}


def follow(
    trainer: Trainer, name: str, folder: RunFolder, evaluation: Evaluation | None = None
) -> PhaseReport:
    """Train from the folder's newest checkpoint, if any, to the end; tokens include padding.

    `evaluation` is measured before the first step, every so many steps and after the last one.
    SIGINT and SIGTERM save a checkpoint first. Raises CheckError when the loss is not finite.
    """
    started = time.perf_counter()
    checkpoint = from_main(folder.trainer_checkpoint() if is_main() else None)
    if checkpoint and is_main():
        folder.require_intact(checkpoint)
    kept = _lines_until(folder, _steps_of(checkpoint)) if checkpoint and is_main() else 0
    folder.truncate_log(kept)
    trainer.remove_callback(PrinterCallback)
    disable_progress_bar()
    for callback in trainer.callback_handler.callbacks:
        if type(callback) in INTEGRATION_TO_CALLBACK.values():
            _tolerate(callback, folder)
    with StopRequest() as stop, console.progress(name, trainer.args.max_steps) as bar:
        trainer.add_callback(_Watch(name, folder, stop, bar, trainer, evaluation))
        with suppress(_AllStepsTaken):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stop.deliver()
    lines = present(from_main(folder.read_log() if is_main() else None))
    lines = [line for line in lines if "loss" in line]
    measured = {key: value for key, value in lines[-1].items() if key in MEASURED}
    return PhaseReport(
        name,
        steps=lines[-1]["step"],
        first_loss=lines[0]["loss"],
        last_loss=lines[-1]["loss"],
        tokens=lines[-1]["tokens"],
        seconds=time.perf_counter() - started,
        **measured,
    )


def _tolerate(tracker: TrainerCallback, folder: RunFolder) -> None:
    """Make the first failure of a tracker a warning, after which it is left alone."""
    failed: list[Exception] = []

    def tolerant(event: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if failed:
                return None
            try:
                return event(*args, **kwargs)
            except Exception as error:
                failed.append(error)
                name = type(tracker).__name__.removesuffix("Callback")
                console.warn_unwritten(f"{folder.logs} ({name})", error)

        return call

    for name in dir(TrainerCallback):
        if name.startswith("on_"):
            setattr(tracker, name, tolerant(getattr(tracker, name)))


class _AllStepsTaken(Exception):
    """A resumed run is trained to its end already: transformers would take another step."""


class _Watch(TrainerCallback):
    """Progress, metrics.jsonl, held-out text and the answer to a stop request."""

    def __init__(
        self,
        name: str,
        folder: RunFolder,
        stop: StopRequest,
        bar: console.Task,
        trainer: Trainer,
        evaluation: Evaluation | None,
    ):
        self.name, self.folder, self.stop, self.bar = name, folder, stop, bar
        self.trainer, self.evaluation = trainer, evaluation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.bar.advance(state.global_step)
        if state.global_step >= state.max_steps:
            raise _AllStepsTaken
        if state.global_step == 0 and self.evaluation is not None:
            self.folder.log({"phase": self.name, "step": 0, "tokens": 0} | self._measure())

    def on_log(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: JsonObject,
        **_: object,
    ) -> None:
        if "loss" not in logs:
            return
        found = {key: float(value) for key, value in logs.items()}
        if not math.isfinite(found["loss"]):
            raise CheckError(
                f"the loss became {found['loss']} at step {state.global_step} of {self.name}",
                "lower --lr or raise --warmup, and start again with --force",
            )
        entry = {"phase": self.name, "step": state.global_step, "loss": found.pop("loss")}
        # `num_tokens` of TRL counts one row of a batch and starts again after a resume
        entry |= {"lr": found.pop("learning_rate"), "tokens": state.num_input_tokens_seen}
        skipped = ("num_tokens", "num_input_tokens_seen", "epoch")
        entry |= {k: v for k, v in found.items() if k not in skipped}
        if self._evaluates(state.global_step, args.max_steps):
            entry |= self._measure()
        self.folder.log(entry)
        self.bar.advance(1, f"loss {entry['loss']:.4f}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.stop.unsaved = True
        # a signal may reach the processes in different steps, but all must take the last one
        signum = largest(self.stop.signum or 0, args.device)
        if signum:
            self.stop.signum = signum
            control.should_save = control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.stop.unsaved = False

    def _evaluates(self, step: int, steps: int) -> bool:
        if self.evaluation is None:
            return False
        return step == steps or step % self.evaluation.every == 0

    def _measure(self) -> JsonObject:
        """Held-out metrics, which go to the trackers too."""
        model = present(self.trainer.model)
        model.eval()
        found = present(self.evaluation).measure()
        regather(model)
        # still in eval mode: the trainer's own means of a step are being written
        self.trainer.log({f"eval_{key}": value for key, value in found.items()})
        model.train()
        return found


def _lines_until(folder: RunFolder, step: int) -> int:
    """Number of log lines of steps up to `step`."""
    return sum(line["step"] <= step for line in folder.read_log())


def _steps_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["global_step"]
