"""Options of `convert`."""

from typing import Literal

from pydantic import Field

from mambactl.options.fields import DataSpecs, HeadNames, Integers, MixerName, StageConfig

# the window of replaced heads beside kept ones, where none is asked for
HEAD_WINDOW = 64


class ConvertConfig(StageConfig):
    """Attention layers become Mamba mixers; nothing else changes."""

    ratio: float = Field(
        default=0.5, ge=0, le=1, description="share of attention replaced: of layers or KV heads"
    )
    by: Literal["layer", "head"] = Field(
        default="layer",
        description="replace whole layers, or KV heads (by Mamba-2 and a window of 64 tokens)",
    )
    keep_attention: Integers | None = Field(default=None, description="layers that stay attention")
    keep_heads: HeadNames | None = Field(
        default=None,
        description="KV heads that stay attention, as LAYER.HEAD: 18.2,8.0 (--by head)",
    )
    select: Literal["uniform", "kl", "recall"] = Field(
        default="uniform",
        description="how they are chosen: by rule, or measured on text and recall",
    )
    select_data: DataSpecs = Field(
        default=[], description="text to choose them on; default: held-out rows of --calibrate"
    )
    select_tokens: int = Field(
        default=1024, ge=64, description="tokens of text a choice is measured on"
    )
    select_recall: int = Field(
        default=1024, ge=64, description="tokens per recall row (--select recall)"
    )
    kv_budget: int | None = Field(
        default=None, ge=0, description="bytes of keys and values per token, in place of --ratio"
    )
    mixers_from: str | None = Field(
        default=None, description="take the mixers from this converted and aligned checkpoint"
    )
    mixer: MixerName = Field(default="mamba2", description="what replaces attention")
    window: int | None = Field(
        default=None, ge=1, description="keep attention to the last W tokens beside each new mixer"
    )
    sinks: int | None = Field(
        default=None, ge=0, description="first tokens that the window sees as well; default: 4"
    )
    rotary: bool = Field(
        default=False,
        description="B and C of new mixers turn with the position, as keys and queries do",
    )
    init: Literal["calibrated", "reference"] = Field(
        default="calibrated", description="reference is the paper's Algorithm 1"
    )
    calibrate: DataSpecs = Field(
        default=[], description="text for the closed-form fit (calibrated init)"
    )
    calibrate_tokens: int = Field(default=10240, ge=512, description="tokens the fit may use")
    max_length: int = Field(default=512, ge=16, description="tokens per calibration row")
    max_shard_gb: float = Field(
        default=5.0, gt=0, description="largest file of a folder, in 10^9 bytes"
    )

    @property
    def window_size(self) -> int:
        """Tokens of the window beside each new mixer, 0 without one."""
        return self.window or (HEAD_WINDOW if self.by == "head" else 0)
