"""Options for the rows of tokens that stages see."""

from pydantic import Field

from mambactl.errors import UsageError
from mambactl.options.fields import DataSpecs, Rows, StageConfig, Tokens


class RowsConfig(StageConfig):
    """Options for the rows of tokens that a stage sees."""

    data: DataSpecs = Field(
        default=[],
        description="file (.jsonl, .json, .csv, .parquet, .txt), 'PATTERN', FOLDER[@split] or "
        "ID[:config][@split]; DATA=0.7 weighs it",
    )
    max_steps: int = Field(default=200, ge=1, description="optimiser steps")
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="how often the data is seen, in place of --max-steps; in a mixture by weight, "
        "the set that is the smallest for its share",
    )
    batch_size: Rows = Field(default=8, description="rows per step, of each process")
    grad_accum: int = Field(default=1, ge=1, description="batches per optimiser step")
    max_length: Tokens = Field(default=512, ge=16, description="tokens per row")
    max_samples: int | None = Field(
        default=None, ge=1, description="use at most this many documents"
    )
    packing: bool = Field(default=True, description="fill rows with several documents")
    skip_bad_rows: bool = Field(
        default=False, description="go on without rows that cannot be learned"
    )

    @property
    def needs_answers(self) -> bool:
        """True if rows are learned, which a prompt alone cannot be."""
        return True

    def require_coherent(self) -> None:
        """Raise UsageError for two lengths of one run."""
        super().require_coherent()
        if self.epochs is not None and "max_steps" in self.model_fields_set:
            raise UsageError(
                "--epochs and --max-steps both say how long a run is",
                "drop one of them, also where a recipe gives it",
            )


class TextRowsConfig(RowsConfig):
    """Rows of text, whose end says nothing unless they are whole."""

    append_eos: bool = Field(
        default=False,
        description="end `text` rows with the end token: without it they teach no end",
    )


class MixedRowsConfig(TextRowsConfig):
    """Rows of text with generated documents among them."""

    recall_share: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="of the tokens: generated key-value, MQAR and copy documents",
    )
