"""Options of `eval` that several of its probes read; those of one probe are in its file.

Groups of options are plain classes, of which one class of options is made: a class for each group
would take a fifth of the time in which the help appears.
"""

from typing import ClassVar, Literal

from pydantic import Field

from mambactl.options.fields import (
    BatchSize,
    Branches,
    DataSpecs,
    Names,
    StoredWeights,
    Tokens,
)
from mambactl.options.launching import DeviceMapConfig, Processes


class EvalBase(DeviceMapConfig):
    """Options that every `eval` has, whatever its probes are."""

    on_card: ClassVar[bool] = True

    dtype: Literal[  # pyright: ignore[reportIncompatibleVariableOverride]
        "auto", "float32", "bfloat16", "float16", "float64"
    ] = Field(
        default="auto",
        description="weights in memory; auto is bfloat16 on capable GPUs, else float32; float64 "
        "(on a CPU) scores alike in any batch",
    )
    weights: StoredWeights = Field(
        default="auto",
        description="fp8 or int8 measure MODEL with the weights that decoding would read then",
    )
    nproc: Processes = Field(
        default=None, ge=1, description="processes, one per GPU, that share what is measured"
    )


class Text:
    """The other model, and text that both read."""

    teacher: str | None = Field(default=None, description="default: where the lineage started")
    data: DataSpecs = Field(default=[], description="text or messages for fidelity")


class Sizes:
    """Amount of text that is read, in all and at a time."""

    limit: int | None = Field(
        default=None, ge=1, description="rows per task / documents per data set"
    )
    max_length: Tokens = Field(default=512, ge=16, description="tokens per row of --data")
    batch_size: BatchSize = Field(
        default="auto", description="rows per forward pass; auto fills passes of tasks by tokens"
    )


class Controls:
    """Changes to the models that are measured beside them."""

    control: Literal["window"] | None = Field(
        default=None, description="compare with the teacher under a window in the replaced layers"
    )
    control_window: int = Field(default=64, ge=1, description="tokens that window sees")
    control_sinks: int = Field(default=4, ge=0, description="first tokens that it sees as well")
    ablate: Branches = Field(
        default=[], description="also measure with these branches putting out zero"
    )


class Certainty:
    """A second student, and how sure a difference is."""

    against: str | None = Field(
        default=None,
        description="another student: paired test of the difference on the same documents",
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="share that an interval holds")
    bootstrap: int = Field(
        default=1000, ge=0, description="draws of documents behind intervals and tests; 0: none"
    )
    save_samples: bool = Field(default=False, description="keep numbers per document, and answers")


class Outcome:
    """Bounds on the results, and the page that shows them."""

    fail_under: Names = Field(default=[], description="METRIC=VALUE; exit 7 when below")
    report: str | None = Field(default=None, description="also put it all on this page (HTML)")


class EvalOptions(Text, Sizes, Controls, Certainty, Outcome):
    """All options that no single probe owns."""

    seed: int
    device: str
    trust_remote_code: bool


def rows_per_pass(config: Sizes) -> int:
    """Rows per forward pass where they cannot be filled by tokens."""
    return 4 if config.batch_size == "auto" else config.batch_size
