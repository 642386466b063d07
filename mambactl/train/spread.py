"""TRL's trainers over several processes: data parallel, or with FSDP2 that splits the weights."""

from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

from mambactl.errors import UsageError
from mambactl.present import of_kind
from mambactl.ranks import sharded
from mambactl.train.optimization import schedule


class SpreadTrainer(Trainer):
    """First base of a trainer, for FSDP2 that computes the same as one process would.

    Matrices multiply in the autocast type, as on one GPU, so parameters travel in fp32 and none is
    rounded on its way: A_log, D and dt_bias act in fp32. Accelerate shards on GPUs alone; here a
    CPU takes the same path.

    `older`: an earlier version began the run, which goes on with the schedule of then.
    """

    older = False

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator and fit its sharding."""
        super().create_accelerator_and_postprocess()
        if not sharded():
            return
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        state = self.accelerator.state
        plugin = getattr(state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise UsageError("FSDP 1 loses parameters that are tied", "set fsdp_version: 2")
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
        self.is_fsdp_enabled = True

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of our own loop: transformers' starts at 0, where a step changes nothing."""
        if self.older:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or of_kind(torch.optim.Optimizer, self.optimizer),
                lambda step: schedule(step, num_training_steps, warmup),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Autocast of the loss, which Accelerate leaves to the policy of FSDP2."""
        if not (sharded() and self.args.bf16):
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)
