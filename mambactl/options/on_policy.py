"""Options of on-policy distillation, the last stage of `distill`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from mambactl.errors import UsageError
from mambactl.options.fields import StageConfig, Temperature, Tokens

# the stage, as `stages` and the lines of metrics.jsonl call it
STAGE = "onpolicy"


class OnPolicyConfig(StageConfig):
    """Options for the rows that the student writes and the teacher scores."""

    later: ClassVar[Mapping[str, object]] = {
        "onpolicy_steps": None,
        "onpolicy_share": 1.0,
        "onpolicy_tokens": 256,
        "onpolicy_temperature": 1.0,
        "onpolicy_divergence": "reverse",
    }

    onpolicy_steps: int | None = Field(
        default=None,
        ge=0,
        description="of --max-steps, for text that the student writes; default: an equal share",
    )
    onpolicy_share: float = Field(
        default=1.0, gt=0, le=1, description="share of the rows that the student writes"
    )
    onpolicy_tokens: Tokens = Field(default=256, description="most new tokens of an answer")
    onpolicy_temperature: Temperature = Field(
        default=1.0, description="temperature of what the student writes; 0 is greedy"
    )
    onpolicy_divergence: Literal["forward", "reverse", "jsd"] = Field(
        default="reverse",
        description="divergence while onpolicy; reverse is KL(student || teacher)",
    )

    def rows_written(self, batch_size: int) -> int:
        """Rows of a batch that the student writes, one at least."""
        return max(1, round(self.onpolicy_share * batch_size))

    def require_room(self, max_length: int) -> None:
        """Raise UsageError where an answer leaves no token of a row to its prompt."""
        if self.onpolicy_tokens >= max_length:
            raise UsageError(
                f"answers of up to {self.onpolicy_tokens} tokens leave no room for a prompt in "
                f"rows of {max_length}",
                "lower --onpolicy-tokens, or raise --max-length",
            )
