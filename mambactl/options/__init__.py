"""The options of every command, one validated and frozen class each.

Field names equal flag names with `_` for `-`. Unknown keys are errors. `mambactl.commands` says
which class belongs to which command; here are those that several modules import.
"""

from mambactl.options.conversion import ConvertConfig
from mambactl.options.drafting import DraftConfig
from mambactl.options.exporting import ExportConfig
from mambactl.options.fields import CommandConfig, StageConfig, split_weight
from mambactl.options.generation import (
    PREFIX_CACHE_GB,
    ROW_SUFFIXES,
    ChatConfig,
    GenerateConfig,
    PromptConfig,
    SamplingConfig,
    ServeConfig,
    SharedPromptConfig,
    SpecDecodeConfig,
    TokenConfig,
)
from mambactl.options.launching import DeviceMapConfig, LaunchConfig
from mambactl.options.measurement import BenchConfig
from mambactl.options.row_options import MixedRowsConfig, RowsConfig
from mambactl.options.training import (
    AdaptedConfig,
    DistillConfig,
    DpoConfig,
    HeldOutConfig,
    SftConfig,
    SpreadConfig,
    StepsConfig,
    TeacherCacheConfig,
    TrackedConfig,
    TrainConfig,
)

__all__ = [
    "PREFIX_CACHE_GB",
    "ROW_SUFFIXES",
    "AdaptedConfig",
    "BenchConfig",
    "ChatConfig",
    "CommandConfig",
    "ConvertConfig",
    "DeviceMapConfig",
    "DistillConfig",
    "DpoConfig",
    "DraftConfig",
    "ExportConfig",
    "GenerateConfig",
    "HeldOutConfig",
    "LaunchConfig",
    "MixedRowsConfig",
    "PromptConfig",
    "RowsConfig",
    "SamplingConfig",
    "ServeConfig",
    "SftConfig",
    "SharedPromptConfig",
    "SpecDecodeConfig",
    "SpreadConfig",
    "StageConfig",
    "StepsConfig",
    "TeacherCacheConfig",
    "TokenConfig",
    "TrackedConfig",
    "TrainConfig",
    "split_weight",
]
