"""A training run: its options, its placement, its student and its teacher."""

from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.checkpoint.teacher import teacher_of
from mambactl.checkpoint.vocabulary import model_config, require_same_tokens, without_padding
from mambactl.data.recall_documents import require_recall_length
from mambactl.errors import UsageError
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.registry import looks_up
from mambactl.models.transformers_names import recompute_activations
from mambactl.options import DraftConfig, MixedRowsConfig, SpreadConfig
from mambactl.options.training import TeacherCacheConfig, TrainConfig
from mambactl.present import of_kind
from mambactl.ranks import placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Job:
    """One training run: `dtype` is what matrices multiply in, weights that train are fp32."""

    stage: str
    config: TrainConfig | TeacherCacheConfig | DraftConfig
    source: str
    device: torch.device
    dtype: torch.dtype
    # what chat templates take for today
    day: date | None = None

    @classmethod
    def of(
        cls, stage: str, config: TrainConfig | TeacherCacheConfig | DraftConfig, source: str
    ) -> "Job":
        """Place a run; raises UsageError for a type that cannot be trained in, or short rows."""
        device, dtype = placement(config)
        if dtype == torch.float16:
            raise UsageError("float16 gradients underflow", "use --dtype bfloat16 or float32")
        job = cls(stage, config, source, device, dtype)
        if job.recall_share:
            require_recall_length(config.max_length)
        return job

    @property
    def amp(self) -> torch.dtype | None:
        """The mixed-precision type, None for plain fp32."""
        return None if self.dtype == torch.float32 else self.dtype

    def student(self, dtype: torch.dtype | None = torch.float32) -> HybridForCausalLM:
        """The model that trains; None keeps the type it is stored in."""
        model = load_model(self.source, self.device, dtype)
        # trainers save it with their state, where transformers refuses what published files hold
        # (a temperature without do_sample); the result keeps the file that the source has
        ids = {name: getattr(model.generation_config, name) for name in TOKEN_IDS}
        model.generation_config = GenerationConfig(**ids)
        config = of_kind(TrainConfig, self.config)
        if config.grad_checkpointing:
            recompute_activations(model)
        if config.freeze_kept:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not looks_up(name))
        return model

    def teacher(self, foreign: bool = False) -> HybridForCausalLM:
        """The frozen teacher; raises ModelError when its vocabulary is another one.

        With `foreign` it may be code of its own, which has logits but none of our layers.
        """
        spec = self.teacher_spec
        trusted = foreign and self.config.trust_remote_code
        self.require_vocabulary_of(spec, foreign, padded=not trusted)
        model = load_model(spec, self.device, self.dtype, trusted).requires_grad_(False)
        # the KL is over the tokens that both have
        return model if trusted else without_padding(model, model_config(self.source).vocab_size)

    def require_vocabulary_of(
        self, teacher: str, foreign: bool = False, padded: bool = False
    ) -> None:
        """Raise ModelError unless teacher and student share every token.

        A teacher that may be `padded` may have more.
        """
        require_same_tokens(
            self.source,
            teacher,
            "teacher",
            "give a --teacher of the same family",
            trust_remote_code=foreign and self.config.trust_remote_code,
            padded=padded,
        )

    @cached_property
    def teacher_spec(self) -> str:
        """The teacher that is asked for, else the model the lineage started from."""
        trusted = self.config.trust_remote_code
        return teacher_of(self.source, self.config.teacher, "--teacher", trusted)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer the student carries."""
        return load_tokenizer(self.source)

    @property
    def budget(self) -> int | None:
        """The most tokens that the run can see; None where its epochs decide."""
        return None if self.examples is None else self.examples * self.config.max_length

    @property
    def examples(self) -> int | None:
        """Rows that the run takes, counted again when it comes back to one; None for epochs."""
        return None if self.config.epochs else self.config.max_steps * self.global_batch

    @property
    def processes(self) -> int:
        """Number of processes that train together."""
        return self.config.processes if isinstance(self.config, SpreadConfig) else 1

    @property
    def global_batch(self) -> int:
        """Rows of one optimiser step, of all processes."""
        return self.config.batch_size * self.config.grad_accum * self.processes

    @property
    def recall_share(self) -> float:
        """Share of the tokens that generated recall documents are."""
        return self.config.recall_share if isinstance(self.config, MixedRowsConfig) else 0.0

    @property
    def recall_budget(self) -> int | None:
        """The most tokens of recall documents that the run can see; None where epochs decide."""
        return None if self.budget is None else round(self.recall_share * self.budget)
