"""A model packed for decode passes, and the tensors of a running batch on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from mambactl.kernels.byte_matrix import Matrix
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.models.block import HybridBlock
from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridForCausalLM, HybridModel
from mambactl.models.packed import (
    AnyPacked,
    LayerState,
    NotSupported,
    Rotations,
    stack,
    state_dtype,
)
from mambactl.models.prompt_ends import PromptEnds
from mambactl.models.session_size import StateSize


@dataclass(frozen=True)
class LayerWeights:
    """One block; without an MLP its three tensors are None, and `behind` without norms there.

    Gains are those of the norms in front of the mixer and of the MLP, None where there are none.
    """

    gain: Tensor | None  # [D]
    mixer: AnyPacked
    mlp_gain: Tensor | None  # [D]
    gate_up: Matrix | None  # [2 I, D]
    down: Matrix | None  # [D, I]
    behind: tuple[Tensor, ...] = ()  # [D], of the norms behind the mixer and the MLP


@dataclass(frozen=True)
class PackedModel:
    """Everything that a decode pass reads, and the modules of the same weights, for prompts."""

    source: HybridModel
    table: Tensor  # [V, D]
    layers: tuple[LayerWeights, ...]
    gain: Tensor  # [D]
    head: Tensor  # [V, D]
    eps: float  # of norms of the stream
    # of embeddings, and of a stream that the model itself has computed
    factor: float
    entrance: float
    rotations: Rotations | None
    # whether replaying tokens would cost a layer as much as storing its state
    stores_every_step: bool


@torch.no_grad()
def pack(model: HybridForCausalLM, positions: int) -> PackedModel:
    """Stack the weights of a model; keys and rotary states get rotations for `positions` positions.

    Raises NotSupported for what the decode kernels do not compute.
    """
    config, inner = model.config, model.model
    if getattr(config, "mlp_bias", False) or config.hidden_act != "silu":
        raise NotSupported("an MLP with biases or another activation than SiLU")
    if model.dtype not in (torch.bfloat16, torch.float32):
        raise NotSupported(f"weights in {model.dtype}")
    rotations = _rotations(model, positions) if config.attends else None
    # the stream of a pass is the model's over the factor of what it adds: products need none then
    unit = config.residual_multiplier
    layers = []
    for block, layer in zip(inner.layers, config.layers, strict=True):
        mixer = layer.spec.pack(block.mixer, config, layer.settings, rotations)
        layers.append(_layer(block, mixer))
    return PackedModel(
        source=inner,
        table=inner.embed_tokens.weight,
        layers=tuple(layers),
        gain=_final_gain(inner),
        head=model.lm_head.weight,
        eps=config.rms_norm_eps / unit**2,
        factor=config.embedding_multiplier / unit,
        entrance=1 / unit,
        rotations=rotations,
        stores_every_step=config.stores_every_step,
    )


def _rotations(model: HybridForCausalLM, positions: int) -> Rotations:
    rotary = model.model.rotary_emb
    at = torch.arange(positions, device=model.device)[None]
    # in the model's precision, as its attention layers use them
    cos, sin = rotary(model.model.embed_tokens.weight[:1, None], at)  # [1, S, P]
    half = cos.shape[-1] // 2
    return Rotations(*(table[0, :, :half].float().contiguous() for table in (cos, sin)))


def _final_gain(inner: HybridModel) -> Tensor:
    """The last norm's weight, over what logits are divided by."""
    weight, factor = inner.norm.weight, inner.norm.factor
    return weight.data if factor == 1 else (weight.float() * factor).to(weight.dtype)


def _layer(block: HybridBlock, mixer: AnyPacked) -> LayerWeights:
    first: Tensor = block.first_norm.weight
    second: Tensor | None = None
    gate_up, down = None, None
    if block.has_mlp:
        gate_up = stack([block.mlp.gate_proj, block.mlp.up_proj]).weight
        down = block.mlp.down_proj.weight
        after = (
            block.post_feedforward_layernorm if block.post_norm else block.post_attention_layernorm
        )
        second = after.weight
    if block.post_norm:
        behind = (first,) if second is None else (first, second)
        return LayerWeights(None, mixer, None, gate_up, down, behind)
    return LayerWeights(first, mixer, second, gate_up, down, ())


@dataclass
class Scratch:
    """Rows of one pass; nothing in it outlives the pass."""

    hidden: Tensor  # [M, D]
    scaled: Tensor  # [M, D]
    squares: Tensor  # flat
    wide: Tensor  # flat: queries, or the gate of a recurrence
    mixed: Tensor  # flat: inputs of a mixer's output projection
    inner: Tensor  # flat: activations of an MLP, or of the attention beside a mixer
    branch: Tensor | None  # [M, D], what a norm behind a mixer or an MLP reads
    partial: Tensor  # flat fp32
    counter: Tensor  # flat int32, zero between launches


@dataclass
class ModelState:
    """Caches of every layer for sequences of up to `capacity` tokens."""

    layers: list[LayerState]
    scratch: Scratch
    capacity: int

    def tensors(self) -> list[Tensor]:
        """Every tensor that outlives a pass."""
        return [tensor for layer in self.layers for tensor in layer.tensors()]

    def rows(self, rows: slice, splits: int) -> "ModelState":
        """The state of some sequences, in the same memory, with the scratch of all."""
        layers = [layer.rows(rows, splits) for layer in self.layers]
        return ModelState(layers, self.scratch, self.capacity)

    def lend(self, cache: HybridCache, weights: PackedModel) -> None:
        """Let a cache of as many rows write keys and values of all tokens here."""
        for state, held, layer in zip(self.layers, cache.layers, weights.layers, strict=True):
            layer.mixer.lend(state, held)

    def load(self, cache: HybridCache, weights: PackedModel, rows: Tensor | None = None) -> None:
        """Take over the rest of what reading the prompts left.

        Into the first rows, or everything, from a cache that nothing was lent to, into `rows` [B].
        """
        ends = PromptEnds(cache.lengths, rows)
        for state, held, layer in zip(self.layers, cache.layers, weights.layers, strict=True):
            layer.mixer.load(state, held, ends)


def make_state(
    weights: PackedModel,
    ops: DecodeOps,
    size: StateSize,
    longest: int,
    fewer: Sequence[int] = (),
) -> ModelState:
    """Empty state for passes of up to `longest` tokens per sequence.

    `fewer`: of how many of the sequences there are passes too.
    """
    layers = [layer.mixer.new_state(weights.table, size) for layer in weights.layers]
    sizes = [size, *(replace(size, batch=rows) for rows in fewer)]
    return ModelState(layers, _scratch(weights, ops, sizes, longest), size.capacity)


def _scratch(
    weights: PackedModel, ops: DecodeOps, sizes: Sequence[StateSize], longest: int
) -> Scratch:
    like, rows = weights.table, sizes[0].batch * longest
    width = like.shape[1]
    mixers = [layer.mixer for layer in weights.layers]
    inner = max(
        [mixer.activations for mixer in mixers]
        + [0 if layer.down is None else layer.down.shape[1] for layer in weights.layers]
    )
    partial, counter = 0, 0
    attentions = [mixer.attention for mixer in mixers if mixer.attention is not None]
    for m, size in product(attentions, sizes):
        need = ops.scratch(
            size.batch * longest,
            size.batch,
            m.kv_heads,
            m.heads // m.kv_heads,
            m.width,
            size.splits,
        )
        partial, counter = max(partial, need[0]), max(counter, need[1])
    counts = [size.batch * tokens for size in sizes for tokens in range(1, longest + 1)]
    pieces = max(ops.square_pieces(m, width) * m for m in counts)
    flat = torch.float32
    return Scratch(
        hidden=like.new_zeros(rows, width),
        scaled=like.new_zeros(rows, width),
        squares=like.new_zeros(pieces, dtype=state_dtype(like)),
        wide=like.new_zeros(rows * inner),
        mixed=like.new_zeros(rows * inner),
        inner=like.new_zeros(rows * inner),
        branch=like.new_zeros(rows, width) if weights.layers[0].behind else None,
        partial=like.new_zeros(max(partial, 1), dtype=flat),
        counter=like.new_zeros(max(counter, 1), dtype=torch.int32),
    )
