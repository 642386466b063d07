"""TRL's DPO trainer over several processes."""

from typing import Any

from torch import nn
from trl import DPOTrainer

from mambactl.train.spread import SpreadTrainer, shard_frozen


class PreferenceTrainer(SpreadTrainer, DPOTrainer):
    """DPO against a reference that is split wherever the policy is."""

    def __init__(self, model: nn.Module, ref_model: nn.Module, *args: Any, **kwargs: Any):
        # TRL would split it as one piece, which needs all of it at once
        shard_frozen(ref_model)
        super().__init__(model, ref_model, *args, **kwargs)
