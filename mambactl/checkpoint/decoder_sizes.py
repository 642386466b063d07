"""Widths and counts of a decoder that decide what training it takes; torch is not needed."""

from dataclasses import dataclass
from pathlib import Path

from mambactl.checkpoint.config_fields import DecoderFields, read_fields
from mambactl.checkpoint.hub_names import hub_name
from mambactl.checkpoint.opening import open_checkpoint
from mambactl.errors import ModelError


@dataclass(frozen=True)
class DecoderSizes:
    """A Llama of attention alone; `heads` of queries, `kv_heads` of keys, of `head_dim` numbers."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def attention(self) -> int:
        """Parameters of the attention of one layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def block(self) -> int:
        """Parameters of one layer."""
        return self.attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head is the embedding."""
        ends = self.embedding * (1 if self.tied else 2) + self.hidden
        return self.layers * self.block + ends

    @property
    def mixer(self) -> int:
        """Parameters of a Mamba-2 mixer that replaces one layer's attention, but for vectors.

        B, x and C have the sizes of keys, values and queries, z that of the output
        (arXiv 2408.15237).
        """
        inner, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = 2 * inner + 2 * shared + self.heads
        return self.hidden * rows + inner * self.hidden


# published models, for estimates before one is fetched
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B-Instruct": DecoderSizes(32, 4096, 14336, 32, 8, 128, 128_256),
    "meta-llama/Llama-3.1-8B-Instruct": DecoderSizes(32, 4096, 14336, 32, 8, 128, 128_256),
    "meta-llama/Llama-3.1-70B-Instruct": DecoderSizes(80, 8192, 28672, 64, 8, 128, 128_256),
    "meta-llama/Llama-3.2-3B-Instruct": DecoderSizes(28, 3072, 8192, 24, 8, 128, 128_256, True),
    "meta-llama/Llama-3.2-1B-Instruct": DecoderSizes(16, 2048, 8192, 32, 8, 64, 128_256, True),
    "HuggingFaceH4/zephyr-7b-beta": DecoderSizes(32, 4096, 14336, 32, 8, 128, 32_000),
    "HuggingFaceTB/SmolLM2-135M-Instruct": DecoderSizes(30, 576, 1536, 9, 3, 64, 49_152, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": DecoderSizes(32, 960, 2560, 15, 5, 64, 49_152, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": DecoderSizes(24, 2048, 8192, 32, 32, 64, 49_152, True),
}


def decoder_sizes(spec: str | None) -> DecoderSizes | None:
    """Sizes of a model: published, or read from its configuration on this disk; None for others."""
    name = hub_name(spec)
    if name in PUBLISHED:
        return PUBLISHED[name]
    if spec is None or not Path(spec).expanduser().exists():
        return None
    try:
        with open_checkpoint(spec) as reader:
            found = read_fields(DecoderFields, reader.config, reader.path)
    except ModelError:
        return None
    numbers = (
        found.num_hidden_layers,
        found.hidden_size,
        found.intermediate_size,
        found.num_attention_heads,
        found.num_key_value_heads or found.num_attention_heads,
        found.head_dim or (found.hidden_size or 0) // (found.num_attention_heads or 1),
        found.vocab_size,
    )
    known = [number for number in numbers if number]
    if len(known) < len(numbers):
        return None
    return DecoderSizes(*known, tied=bool(found.tie_word_embeddings))
