"""Options of the commands that write text."""

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from mambactl.errors import UsageError
from mambactl.options.fields import (
    WEIGHTS_HELP,
    BatchSize,
    DataSpecs,
    Drafts,
    Rows,
    StageConfig,
    StoredWeights,
    Temperature,
    Tokens,
)
from mambactl.options.launching import DeviceMapConfig, Processes

SHARD = re.compile(r"(\d{1,9})/(\d{1,9})")
ROW_SUFFIXES = {"jsonl": ".jsonl", "alpaca-eval": ".json", "mt-bench": ".jsonl"}
PREFIX_CACHE_GB = 10.0


def require_model_draft(ngram: bool, draft: object) -> None:
    """Raise UsageError for n-grams beside no other draft."""
    if ngram and draft in (None, "ngram"):
        raise UsageError(
            "--ngram goes beside a draft that is a checkpoint",
            "give --draft MODEL, or --draft ngram alone",
        )


class TokenConfig(StageConfig):
    """Options for the choice of tokens."""

    max_new_tokens: Tokens = Field(default=128, description="tokens after the prompt")
    ignore_eos: bool = Field(default=False, description="go on behind tokens that end a text")
    temperature: Temperature = Field(default=0.0, description="0 is greedy")
    top_k: int = Field(default=0, ge=0, description="0 is off")
    top_p: float = Field(default=1.0, gt=0, le=1, description="1 is off")
    draft: str | None = Field(default=None, description="checkpoint, or ngram")
    ngram: bool = Field(
        default=False, description="beside a draft, copy where the text repeats itself"
    )
    k: Drafts = Field(default="auto", description="draft tokens per step; auto is what is fastest")
    weights: StoredWeights = Field(default="auto", description=WEIGHTS_HELP)

    def require_coherent(self) -> None:
        """Raise UsageError for n-grams beside no other draft."""
        super().require_coherent()
        require_model_draft(self.ngram, self.draft)


class SamplingConfig(TokenConfig):
    """Options for decoding prompts."""

    batch_size: Rows = Field(default=1, description="prompts decoded together")
    chat: bool = Field(
        default=True, description="wrap prompts in the chat template if there is one"
    )


class PromptConfig(SamplingConfig):
    """Prompt options: the text to be continued."""

    prompt: str | None = Field(default=None, description="text, or - to read it from stdin")
    prompts: str | None = Field(
        default=None, description="file: .txt lines, .jsonl, or what --data takes"
    )

    def require_coherent(self) -> None:
        """Raise UsageError for two sources of prompts, and for an empty prompt."""
        super().require_coherent()
        if self.prompt is not None and self.prompts is not None:
            raise UsageError(
                "a prompt and a file of prompts exclude each other", "give one of them"
            )
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError("the prompt is empty", "give some text with -p")


class ChatConfig(TokenConfig):
    """Talk to a model in the terminal."""

    max_new_tokens: Tokens = Field(default=1024, description="tokens of an answer")
    system: str | None = Field(default=None, description="text of the system message")

    def require_coherent(self) -> None:
        """Raise UsageError for a system message without text."""
        super().require_coherent()
        if self.system is not None and not self.system.strip():
            raise UsageError("the system message is empty", "give some text with --system")


class ServeConfig(StageConfig):
    """Serve the OpenAI API (its key: MAMBACTL_API_KEY)."""

    placement_options: ClassVar[frozenset[str]] = StageConfig.placement_options | {"host", "port"}

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen at")
    port: int = Field(default=8000, ge=0, le=65535, description="0 is any that is free")
    name: str | None = Field(
        default=None, min_length=1, description="what clients call the model; default: as in MODEL"
    )
    draft: str | None = Field(default=None, description="checkpoint, or ngram")
    k: int = Field(default=4, ge=1, le=32, description="draft tokens per step")
    weights: StoredWeights = Field(default="auto", description=WEIGHTS_HELP)
    ignore_eos: bool = Field(
        default=False, description="go on behind tokens that end a text, to measure"
    )
    batch_size: BatchSize = Field(
        default="auto", description="rows that are written at once; auto: 8 on a CPU, 32 on a GPU"
    )
    max_length: Tokens | None = Field(
        default=None,
        description="tokens of a prompt and its answer; default: what the model was made for, at "
        "most 2048 on a CPU and 8192 on a GPU",
    )
    keep_gb: float = Field(
        default=1.0, ge=0, description="GB for what the models hold after earlier prompts"
    )
    max_queue: int = Field(
        default=256, ge=0, description="requests that may wait for a row; more are refused (429)"
    )
    max_body: float = Field(default=4.0, gt=0, description="MB of a request (else 413)")
    read_timeout: float = Field(
        default=20.0, gt=0, description="seconds in which a request has to arrive (else 408)"
    )
    grace: float = Field(
        default=30.0, ge=0, description="seconds for running answers after SIGTERM"
    )


class SharedPromptConfig(PromptConfig):
    """Prompts to continue, and the folder of stored prefixes."""

    placement_options: ClassVar[frozenset[str]] = StageConfig.placement_options | {
        "prefix_cache",
        "prefix_cache_gb",
    }
    written: ClassVar[frozenset[str]] = StageConfig.written | {"prefix_cache"}

    prefix_cache: str | None = Field(
        default=None,
        min_length=1,
        pattern="^[^\\x00]*$",
        description="folder that keeps what the model holds after the beginnings of prompts, for "
        "later processes",
    )
    prefix_cache_gb: float = Field(
        default=PREFIX_CACHE_GB,
        gt=0,
        description="GB that --prefix-cache may take; what was used longest ago goes first",
    )

    def require_folder_for_size(self) -> None:
        """Raise UsageError for the size of a folder without the folder."""
        if self.prefix_cache is None and self.prefix_cache_gb != PREFIX_CACHE_GB:
            hint = "drop it, or name a folder"
            raise UsageError("--prefix-cache-gb goes with --prefix-cache", hint)


class GenerateConfig(SharedPromptConfig, DeviceMapConfig):
    """Text from a prompt, or a file of answers (--dataset)."""

    # batches are formed before they are dealt to processes, so their number decides no answer
    placement_options: ClassVar[frozenset[str]] = (
        SharedPromptConfig.placement_options | DeviceMapConfig.placement_options
    )
    later: ClassVar[Mapping[str, object]] = {"weights": "auto", "ngram": False}

    dataset: DataSpecs = Field(
        default=[],
        description="answer every row's prompt, turns or messages (but for a last answer) into "
        "--out; what --data takes, a .txt file with a prompt per line",
    )
    max_samples: int | None = Field(default=None, ge=1, description="use at most this many rows")
    samples_per_prompt: Rows = Field(default=1, description="answers drawn for each prompt")
    shard: str | None = Field(
        default=None, description="I/N: only the I-th of N parts, from 1/N to N/N"
    )
    nproc: Processes = Field(
        default=None, ge=1, description="processes, one per GPU, that answer the batches of a set"
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

    @property
    def part(self) -> tuple[int, int]:
        """Index of the answered part and the number of parts; UsageError if invalid."""
        given = self.shard or "1/1"
        match = SHARD.fullmatch(given)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--shard {given} is no part", "three parts are 1/3, 2/3 and 3/3")
        return int(match[1]), int(match[2])

    def require_coherent(self) -> None:
        """Raise UsageError for options of another way of asking, and for answers all the same."""
        self.require_folder_for_size()
        if not self.dataset:
            self._require_plain()
            super().require_coherent()
            if self.prompt is None and self.prompts is None:
                way = 'give -p "some text", -p - to read stdin, or --prompts FILE'
                raise UsageError("no prompt", way)
            return
        DeviceMapConfig.require_coherent(self)
        if self.ngram:
            # rows of a batch switch together, so that an answer would depend on the others
            raise UsageError("--ngram and --dataset exclude each other", "drop --ngram")
        if self.prompt is not None or self.prompts is not None:
            raise UsageError("--dataset and a prompt exclude each other", "give one of them")
        if self.category_temperature and self.temperature > 0:
            raise UsageError(
                "--temperature and --category-temperature exclude each other", "drop one"
            )
        if self.samples_per_prompt > 1 and not (self.temperature or self.category_temperature):
            raise UsageError(
                f"{self.samples_per_prompt} greedy answers to a prompt are all the same",
                "give --temperature 0.7, say",
            )
        _ = self.part

    def _require_plain(self) -> None:
        either = SharedPromptConfig.model_fields.keys() | {"device_map", "max_memory"}
        for name in GenerateConfig.model_fields.keys() - either:
            if getattr(self, name) != GenerateConfig.model_fields[name].default:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} goes with --dataset", f"drop {flag}, or name a data set")


class SpecDecodeConfig(PromptConfig):
    """Speculative decoding beside plain decoding."""

    check: bool = Field(
        default=False, description="fail unless greedy output equals plain decoding"
    )

    def require_coherent(self) -> None:
        """Raise UsageError without a draft, and for a comparison of drawn tokens."""
        super().require_coherent()
        if self.draft is None:
            raise UsageError("no draft", hint="give --draft MODEL, or --draft ngram")
        if self.check and self.temperature > 0:
            raise UsageError(
                "--check compares greedy tokens, but the temperature is above 0",
                hint="drop --check or --temperature",
            )
