"""Options of `bench`, and of the synthetic models to measure with."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from mambactl.errors import UsageError
from mambactl.options.fields import (
    WEIGHTS_HELP,
    BatchSizes,
    Compile,
    Drafts,
    Lengths,
    Names,
    StageConfig,
    StoredWeights,
    Tokens,
)

# the baseline that is no checkpoint: a Llama of the model's shape in transformers' own generate
TRANSFORMERS = "transformers"
# the draft of a synthetic model that is a head of random weights
HEAD = "head"


class BenchConfig(StageConfig):
    """Prefill and decode speed."""

    without_model: ClassVar[Mapping[str, str]] = {"synthetic": "--synthetic NAME"}
    no_models: ClassVar[frozenset[str]] = StageConfig.no_models | {"teacher", TRANSFORMERS}

    input_len: Lengths = Field(default=[128], min_length=1, description="context lengths")
    output_len: Tokens = Field(default=32, description="tokens decoded per measurement")
    batch_size: BatchSizes = Field(default=[1], min_length=1, description="rows decoded together")
    warmup: int = Field(default=1, ge=0, description="unmeasured rounds")
    iters: int = Field(default=3, ge=1, description="measured rounds")
    repeats: int = Field(
        default=1, ge=1, description="measure every point so often, with a new engine each time"
    )
    same_prompt: bool = Field(
        default=False,
        description="all rows have one prompt, read once: decoding behind long contexts alone",
    )
    draft: str | None = Field(
        default=None,
        description="decode with it too: checkpoint, ngram, or beside --synthetic a shape or head",
    )
    k: Drafts = Field(default="auto", description="draft tokens per step; auto is what is fastest")
    weights: StoredWeights = Field(default="auto", description=WEIGHTS_HELP)
    baseline: str | None = Field(
        default=None,
        description="second model; `teacher` is the lineage's, `transformers` a Llama of this "
        "shape in transformers' own generate",
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

    @property
    def other_models(self) -> list[tuple[str, str]]:
        """Options that name a model beside MODEL; a synthetic draft is none."""
        synthetic = {("draft", self.draft)} if not self.needs_model else set()
        return [each for each in super().other_models if each not in synthetic]

    @property
    def draft_shapes(self) -> list[str]:
        """Name of the draft, if it is a synthetic model."""
        named = self.draft is None or self.draft in {HEAD, *self.no_models}
        return [] if named or self.needs_model else [str(self.draft)]

    @property
    def shapes(self) -> list[str]:
        """Synthetic models, a draft among them."""
        return [*self.synthetic, *self.draft_shapes]

    def require_coherent(self) -> None:
        """Raise UsageError for a training that is measured against something else than itself."""
        if self.training and self.draft:
            raise UsageError("--training goes without --draft", "drop it")
        if self.training and self.same_prompt:
            raise UsageError("--same-prompt is for decoding, not for --training", "drop it")
        if self.training and self.weights != "auto":
            raise UsageError("--weights is for decoding, not for --training", "drop it")
        if self.training and self.baseline not in (None, "teacher"):
            raise UsageError(
                f"a hybrid is trained beside its own teacher, not {self.baseline}",
                "give --baseline teacher",
            )
        if self.training and self.baseline and not self.train_rest:
            raise UsageError("a teacher has no mixers to train alone", "drop --no-train-rest")
        if self.min_speedup is not None and self.baseline is None:
            raise UsageError(
                "--min-speedup needs something to be faster than",
                hint="pass --baseline teacher, or --baseline MODEL",
            )
        if not self.needs_model and self.baseline not in (None, TRANSFORMERS):
            raise UsageError(
                "--baseline compares checkpoints",
                f"compare shapes with --synthetic NAME,NAME, or with --baseline {TRANSFORMERS}",
            )


class SyntheticConfig(StageConfig):
    """Write random weights of a published shape as a checkpoint."""

    max_shard_gb: float = Field(
        default=5.0, gt=0, description="largest file of a folder, in 10^9 bytes"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the weights; auto is bfloat16"
    )
