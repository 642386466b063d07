"""What the stages on TRL's trainers share: arguments, progress, metrics, stopping and resuming."""

import json
import math
import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from mambactl import console
from mambactl.errors import CheckError
from mambactl.ranks import is_main
from mambactl.recipe import TrainConfig
from mambactl.train.distributed import from_main, largest
from mambactl.train.interrupt import StopRequest
from mambactl.train.loop import PhaseReport
from mambactl.train.run_folder import RunFolder


def trainer_arguments(
    config: TrainConfig,
    folder: RunFolder,
    rate: float,
    device: torch.device,
    amp: torch.dtype | None,
) -> dict[str, Any]:
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
        "gradient_checkpointing": config.grad_checkpointing,
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
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
        "data_seed": config.seed,
    }


def follow(trainer: Trainer, name: str, folder: RunFolder) -> PhaseReport:
    """Train from the folder's newest checkpoint, if any, to the end; tokens include padding.

    SIGINT and SIGTERM save a checkpoint first. Raises CheckError when the loss is not finite.
    """
    started = time.perf_counter()
    checkpoint = from_main(folder.trainer_checkpoint() if is_main() else None)
    folder.truncate_log(_steps_of(checkpoint) if checkpoint else 0)
    trainer.remove_callback(PrinterCallback)
    disable_progress_bar()
    with StopRequest() as stop, console.progress(name, trainer.args.max_steps) as bar:
        trainer.add_callback(_Watch(name, folder, stop, bar))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stop.deliver()
    lines = from_main(folder.lines() if is_main() else None)
    return PhaseReport(
        name,
        steps=lines[-1]["step"],
        first_loss=lines[0]["loss"],
        last_loss=lines[-1]["loss"],
        tokens=lines[-1]["tokens"],
        seconds=time.perf_counter() - started,
    )


class _Watch(TrainerCallback):
    """Progress, metrics.jsonl and the answer to a stop request."""

    def __init__(self, name: str, folder: RunFolder, stop: StopRequest, bar: console.Task):
        self.name, self.folder, self.stop, self.bar = name, folder, stop, bar

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.advance(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
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
        self.folder.log(entry | {k: v for k, v in found.items() if k not in skipped})
        self.bar.advance(1, f"loss {entry['loss']:.4f}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # a signal may reach the processes in different steps, but all must take the last one
        signum = largest(self.stop.signum or 0, args.device)
        if signum:
            self.stop.signum = signum
            control.should_save = control.should_training_stop = True


def _steps_of(checkpoint: Any) -> int:
    return json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["global_step"]
