"""Bounds on what an input may cost: beyond them a file is refused in a sentence.

The table "Limits" of `mambactl docs promises` shows the same rows; a test compares both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """The most of something: `most` in the unit that `unit` names."""

    most: int
    unit: str
    of: str

    def __str__(self) -> str:
        if self.unit != "bytes":
            return f"{self.most:,} {self.unit}"
        return f"{self.most // MIB} MiB" if self.most >= MIB else f"{self.most // KIB} KiB"


KIB = 1 << 10
MIB = 1 << 20

TEMPLATE_SECONDS = Bound(5, "seconds of CPU time", "rendering one row with a chat template")
TEMPLATE_BYTES = Bound(16 * MIB, "bytes", "what a chat template makes of one row")
HEADER_BYTES = Bound(64 * MIB, "bytes", "the header of a safetensors file")
TENSORS = Bound(100_000, "tensors", "a checkpoint")
LAYERS = Bound(1024, "layers", "a model")
WIDTH = Bound(1 << 18, "numbers", "any width of a model, in heads, channels or states")
VOCABULARY = Bound(1 << 22, "tokens", "a vocabulary")
PICKLE_BYTES = Bound(16 * MIB, "bytes", "the names and shapes in a pickled checkpoint")
GGUF_ITEMS = Bound(2_000_000, "values", "the metadata of a GGUF")
NESTING = Bound(100, "levels", "a JSON text")
LINE_BYTES = Bound(64 * MIB, "bytes", "a line or .txt document of data, after decompression")
JSON_ROWS_BYTES = Bound(2048 * MIB, "bytes", "a .json file of data, after decompression")
EMPTY_LINES = Bound(1_000_000, "empty lines", "the gap between two rows")
ROW_GROUP_BYTES = Bound(2048 * MIB, "bytes", "a row group of a Parquet file, after decompression")
TEXT_GROWTH = Bound(100_000, "times its length", "what a tokenizer.json makes of a text")
TEXT_BYTES = Bound(64 * MIB, "bytes", "a JSON or template file")
YAML_BYTES = Bound(256 * KIB, "bytes", "a recipe, or a YAML file of tasks")
YAML_VALUES = Bound(100_000, "values", "a recipe, or a YAML file of tasks, aliases counted")
ROW_TOKENS = Bound(1 << 24, "tokens", "a row, a prompt or what is generated")
BATCH_ROWS = Bound(1 << 16, "rows", "a batch")
NEEDLE_TOKENS = Bound(1_000_000, "tokens", "a needle test")

# in the order of the document's table
BOUNDS = (
    TEMPLATE_SECONDS,
    TEMPLATE_BYTES,
    HEADER_BYTES,
    TENSORS,
    LAYERS,
    WIDTH,
    VOCABULARY,
    PICKLE_BYTES,
    GGUF_ITEMS,
    NESTING,
    LINE_BYTES,
    JSON_ROWS_BYTES,
    EMPTY_LINES,
    ROW_GROUP_BYTES,
    TEXT_BYTES,
    TEXT_GROWTH,
    YAML_BYTES,
    YAML_VALUES,
    ROW_TOKENS,
    BATCH_ROWS,
    NEEDLE_TOKENS,
)
