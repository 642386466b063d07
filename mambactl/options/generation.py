"""Options of the commands that write text."""

from typing import Literal

from pydantic import Field

from mambactl.options.fields import DataSpecs, Drafts, Rows, StageConfig, Temperature, Tokens

ROW_SUFFIXES = {"jsonl": ".jsonl", "alpaca-eval": ".json", "mt-bench": ".jsonl"}


class SamplingConfig(StageConfig):
    """How tokens are chosen."""

    max_new_tokens: Tokens = Field(default=128, description="tokens after the prompt")
    temperature: Temperature = Field(default=0.0, description="0 is greedy")
    top_k: int = Field(default=0, ge=0, description="0 is off")
    top_p: float = Field(default=1.0, gt=0, le=1, description="1 is off")
    draft: str | None = Field(default=None, description="checkpoint, or ngram")
    k: Drafts = Field(default="auto", description="draft tokens per step; auto is what is fastest")
    batch_size: Rows = Field(default=1, description="prompts decoded together")
    chat: bool = Field(
        default=True, description="wrap prompts in the chat template if there is one"
    )


class PromptConfig(SamplingConfig):
    """What is continued."""

    prompt: str | None = Field(default=None, description="text, or - to read it from stdin")
    prompts: str | None = Field(default=None, description="file: .txt lines, or .jsonl")


class GenerateConfig(PromptConfig):
    """Text from a prompt; with --dataset a file of answers that sft learns from."""

    dataset: DataSpecs = Field(
        default=[],
        description="answer every row's prompt, turns or messages (but for a last answer) into "
        "--out: ID[:config][@split], .jsonl[.gz], .parquet or .txt",
    )
    max_samples: int | None = Field(default=None, ge=1, description="use at most this many rows")
    samples_per_prompt: Rows = Field(default=1, description="answers drawn for each prompt")
    shard: str | None = Field(
        default=None, description="I/N: only the I-th of N parts, from 1/N to N/N"
    )
    format: Literal["jsonl", "alpaca-eval", "mt-bench"] = Field(
        default="jsonl", description="jsonl is what --data reads, the others what their judges read"
    )
    category_temperature: bool = Field(
        default=False,
        description="MT-Bench's own temperature for each category, in place of --temperature",
    )
    generator: str | None = Field(
        default=None,
        description="name of the model in alpaca-eval and mt-bench; default: as in MODEL",
    )
    keep_unfinished: bool | None = Field(
        default=None,
        description="answers cut at --max-new-tokens, and empty ones; default: kept for judges, "
        "left out of jsonl",
    )
    skip_bad_rows: bool = Field(default=False, description="leave out rows that cannot be answered")

    @property
    def ending(self) -> str:
        """The suffix that readers of the format expect."""
        return ROW_SUFFIXES[self.format]


class SpecDecodeConfig(PromptConfig):
    """Speculative decoding measured against plain decoding."""

    check: bool = Field(
        default=False, description="fail unless greedy output equals plain decoding"
    )
