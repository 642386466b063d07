"""Options of `bench`."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from mambactl.options.fields import (
    BatchSizes,
    Compile,
    Drafts,
    Lengths,
    Names,
    StageConfig,
    Tokens,
)


class BenchConfig(StageConfig):
    """Prefill and decode speed."""

    without_model: ClassVar[Mapping[str, str]] = {"synthetic": "--synthetic NAME"}

    input_len: Lengths = Field(default=[128], min_length=1, description="context lengths")
    output_len: Tokens = Field(default=32, description="tokens decoded per measurement")
    batch_size: BatchSizes = Field(default=[1], min_length=1, description="rows decoded together")
    warmup: int = Field(default=1, ge=0, description="unmeasured rounds")
    iters: int = Field(default=3, ge=1, description="measured rounds")
    draft: str | None = Field(
        default=None, description="decode with it too: checkpoint, ngram or shape"
    )
    k: Drafts = Field(default="auto", description="draft tokens per step; auto is what is fastest")
    baseline: str | None = Field(
        default=None, description="second model; `teacher` is the lineage's"
    )
    min_speedup: float | None = Field(
        default=None, description="exit 7 when decode speed-up is below"
    )
    report: str | None = Field(default=None, description="also put it all on this page (HTML)")
    synthetic: Names = Field(default=[], description="no MODEL: random weights of published shapes")
    acceptance: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="share of a synthetic draft's tokens that the target keeps",
    )
    training: bool = Field(
        default=False,
        description="time steps of mixer alignment and of logits distillation instead",
    )
    train_rest: bool = Field(
        default=True, description="--training: in the logits step, not only mixers"
    )
    compile: Compile = Field(
        default="auto", description="--training: compile blocks, as distill does"
    )
    capture: bool = Field(
        default=False, description="--training: replay each step as one CUDA graph"
    )
