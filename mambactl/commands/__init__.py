"""The commands, one file each; importing this package loads no heavy library."""

from mambactl.evaluation.probes import EvalConfig
from mambactl.options import (
    BenchConfig,
    ConvertConfig,
    DistillConfig,
    DpoConfig,
    GenerateConfig,
    SftConfig,
    SpecDecodeConfig,
    StageConfig,
    TeacherCacheConfig,
)

STAGES: dict[str, type[StageConfig]] = {
    "convert": ConvertConfig,
    "teacher-cache": TeacherCacheConfig,
    "distill": DistillConfig,
    "sft": SftConfig,
    "dpo": DpoConfig,
    "eval": EvalConfig,
    "spec-decode": SpecDecodeConfig,
    "generate": GenerateConfig,
    "bench": BenchConfig,
}
