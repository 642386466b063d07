"""One validated, frozen configuration per stage; recipes are YAML files made of them.

Field names equal flag names with `_` for `-`. Unknown keys are errors. `recipes.py`
reads the files.
"""

from mambactl.options.conversion import ConvertConfig
from mambactl.options.fields import StageConfig, split_weight
from mambactl.options.generation import (
    GenerateConfig,
    PromptConfig,
    SamplingConfig,
    SpecDecodeConfig,
)
from mambactl.options.measurement import BenchConfig
from mambactl.options.training import (
    AdaptedConfig,
    DistillConfig,
    DpoConfig,
    HeldOutConfig,
    MixedRowsConfig,
    RowsConfig,
    SftConfig,
    ShardConfig,
    SpreadConfig,
    TeacherCacheConfig,
    TrackedConfig,
    TrainConfig,
)

__all__ = [
    "MODEL_WRITERS",
    "ROW_SUFFIXES",
    "ROW_WRITER",
    "WRITERS",
    "AdaptedConfig",
    "BenchConfig",
    "ConvertConfig",
    "DistillConfig",
    "DpoConfig",
    "GenerateConfig",
    "HeldOutConfig",
    "MixedRowsConfig",
    "PromptConfig",
    "RowsConfig",
    "SamplingConfig",
    "SftConfig",
    "ShardConfig",
    "SpecDecodeConfig",
    "SpreadConfig",
    "StageConfig",
    "TeacherCacheConfig",
    "TrackedConfig",
    "TrainConfig",
    "split_weight",
]

MODEL_WRITERS = ("convert", "distill", "sft", "dpo")
WRITERS = (*MODEL_WRITERS, "teacher-cache")
# what `generate` writes only with --dataset is a file of rows, no checkpoint
ROW_WRITER = "generate"
ROW_SUFFIXES = {"jsonl": ".jsonl", "alpaca-eval": ".json", "mt-bench": ".jsonl"}
