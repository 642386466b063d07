"""Options of `export`."""

from typing import ClassVar, Literal

from pydantic import Field

from mambactl.files import GGUF_SUFFIX
from mambactl.options.fields import StageConfig


class ExportConfig(StageConfig):
    """Write a checkpoint for another program."""

    # forms that are one file, and how its name ends
    endings: ClassVar[dict[str, str]] = {"gguf": GGUF_SUFFIX}

    to: Literal["transformers", "gguf", "mamba-ssm", "mambainllama"] = Field(
        default="transformers",
        description="vLLM and SGLang read that of transformers, llama.cpp reads gguf",
    )
    layout: Literal["hf", "fused"] = Field(
        default="hf", description="of mambainllama: fused joins the projections of a layer"
    )
    check: bool = Field(
        default=True, description="read the result and compare logits and text on a few prompts"
    )
    max_shard_gb: float = Field(
        default=5.0, gt=0, description="largest file of safetensors, in 10^9 bytes"
    )
    dtype: Literal[  # pyright: ignore[reportIncompatibleVariableOverride]
        "auto", "float32", "bfloat16", "float16", "q8_0"
    ] = Field(default="auto", description="of the weights; auto is that of MODEL, q8_0 is for gguf")

    @property
    def ending(self) -> str:
        """The end of the default name of what is written."""
        return self.endings.get(self.to, "")
