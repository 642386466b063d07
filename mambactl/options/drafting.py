"""Options of the command that makes a draft of a model."""

from typing import Literal

from pydantic import Field

from mambactl.errors import UsageError
from mambactl.options.fields import DataSpecs, Schedule, Temperature, Tokens
from mambactl.options.on_policy import STAGE as ON_POLICY
from mambactl.options.training import DistillConfig, StepsConfig


class DraftConfig(StepsConfig):
    """Train a draft on a model's own text, for speculative decoding."""

    kind: Literal["head", "model"] = Field(
        default="head",
        description="head: one layer that reads the target's last stream, for mambactl alone; "
        "model: a checkpoint of some of its layers",
    )
    layers: int = Field(default=4, ge=1, description="layers of a draft model, evenly spread")
    vocabulary: int = Field(
        default=24576,
        ge=1,
        description="tokens a head can draft: those the target writes most often",
    )
    unroll: int = Field(
        default=5, ge=1, le=16, description="drafts in a row that the training of a head follows"
    )
    text: Literal["target", "data"] = Field(
        default="target",
        description="target: it answers the prompts of data; data: as generate --dataset wrote it",
    )
    answer_tokens: Tokens = Field(default=256, description="most new tokens of an answer")
    answer_temperature: Temperature = Field(
        default=1.0, description="temperature of the target's answers; 0 is greedy"
    )
    answer_uses: int = Field(
        default=4, ge=1, description="steps that learn from each batch that the target writes"
    )
    lr: float = Field(default=1e-3, gt=0, description="learning rate")
    output_lr: float = Field(
        default=0.0,
        ge=0,
        description="learning rate of a head's output; 0: it stays the target's rows",
    )
    schedule: Schedule = "cosine"
    kl_weight: float = Field(
        default=1.0, ge=0, description="weight of the KL to the target's logits"
    )
    ce_weight: float = Field(
        default=0.1, ge=0, description="weight of the cross entropy on the text"
    )

    eval_data: DataSpecs = Field(
        default=[], description="data for measuring drafts; default: a twentieth of the data"
    )
    eval_every: int = Field(default=100, ge=1, description="steps between measurements of drafts")
    eval_tokens: int = Field(default=4096, ge=64, description="tokens on which drafts are measured")

    @property
    def teacher(self) -> None:
        """Always None: the target is MODEL, and a name of its own would be a second one."""
        return None

    @property
    def own_output(self) -> bool:
        """True if a head has rows of its own in the place of the target's."""
        return self.output_lr > 0

    def require_coherent(self) -> None:
        """Raise UsageError for a loss of nothing, and for text that has no epochs or no room."""
        super().require_coherent()
        if not self.ce_weight and not self.kl_weight:
            raise UsageError("--ce-weight and --kl-weight are both 0", "give one of them a weight")
        other = {"head": "layers", "model": "vocabulary"}[self.kind]
        if getattr(self, other) != type(self).model_fields[other].default:
            raise UsageError(
                f"--{other} is not for a draft {self.kind}", "drop it, or give another --kind"
            )
        if self.text == "target" and self.epochs is not None:
            raise UsageError(
                "--epochs count text that is there, and the target writes its own",
                "give --max-steps, or --text data",
            )
        if self.text == "target" and self.answer_tokens >= self.max_length:
            raise UsageError(
                f"answers of up to {self.answer_tokens} tokens leave no room for a prompt in rows "
                f"of {self.max_length}",
                "lower --answer-tokens, or raise --max-length",
            )

    def require_vocabulary(self, size: int) -> None:
        """Raise UsageError for a head of more tokens than its target's `size`."""
        usual = type(self).model_fields["vocabulary"].default
        if self.kind == "head" and size < self.vocabulary != usual:
            raise UsageError(
                f"--vocabulary {self.vocabulary} is more than the {size:,} tokens of the target",
                f"give {size} or less",
            )

    def of_the_loop(self) -> DistillConfig:
        """The same options as the training loop and its feeds call them."""
        names = DistillConfig.model_fields.keys() & DraftConfig.model_fields.keys()
        shared = {name: getattr(self, name) for name in names}
        return DistillConfig(
            **shared,
            stages=[ON_POLICY] if self.text == "target" else ["logits"],
            compile=False,
            onpolicy_tokens=self.answer_tokens,
            onpolicy_temperature=self.answer_temperature,
        )
