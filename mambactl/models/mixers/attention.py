"""Grouped-query attention with rotary positions, as in Llama and Mistral."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mambactl.kernels import dispatch
from mambactl.kernels import reference as kernels
from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.kernels.reference import attention_weights
from mambactl.models.cache import AttentionCache, WindowedCache
from mambactl.models.mixers.modules import is_its_weight
from mambactl.models.mixers.sizes import AttentionSizes
from mambactl.models.mixers.spec import (
    AttentionWeights,
    DecoderConfig,
    MixerCost,
    MixerSpec,
    StepContext,
)
from mambactl.models.packed import (
    AttentionState,
    PassContext,
    Projection,
    Residual,
    Rotations,
    Segment,
    stack,
)
from mambactl.models.prompt_ends import PromptEnds
from mambactl.models.session_size import StateSize
from mambactl.present import present

# submodules that decide where attention looks
LOOKUP = ("q_proj", "k_proj", "q_norm", "k_norm")


class RMSNorm(LlamaRMSNorm):
    """x / sqrt(mean(x^2) + eps) times a weight, rounded where Llama's is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return dispatch.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class AttentionHeads(nn.Module):
    """Projections of an attention, and its queries, keys and values by heads.

    All heads of the model, or `kv_heads` of its KV heads with the query heads that share them;
    where other heads stand beside these, `output_bias` says who has the bias of their sum.
    """

    def __init__(
        self,
        config: DecoderConfig,
        kv_heads: int | None = None,
        output_bias: bool = True,
        rotated: bool = True,
    ):
        super().__init__()
        self.head_dim, self.rotated = config.head_dim, rotated
        self.query_factor = config.query_factor
        self.dropout = config.attention_dropout or 0.0
        width, biased = config.hidden_size, config.attention_bias
        bias = {n: biased if isinstance(biased, bool) else n in biased for n in "qkvo"}
        bias["o"] = bias["o"] and output_bias
        kv_heads = config.num_key_value_heads if kv_heads is None else kv_heads
        shared = kv_heads * config.head_dim
        inner = shared * (config.num_attention_heads // config.num_key_value_heads)
        self.q_proj = nn.Linear(width, inner, bias=bias["q"])
        self.k_proj = nn.Linear(width, shared, bias=bias["k"])
        self.v_proj = nn.Linear(width, shared, bias=bias["v"])
        self.o_proj = nn.Linear(inner, width, bias=bias["o"])
        # norms of all heads of a projection together, or of each
        self.joint_norm = config.qk_norm == "all"
        widths = [inner, shared] if self.joint_norm else [self.head_dim] * 2
        norms = [RMSNorm(width, config.rms_norm_eps) for width in widths if config.qk_norm]
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if norms:
            self.q_norm, self.k_norm = norms

    @property
    def head_norms(self) -> tuple[RMSNorm, ...]:
        """Norms of queries and of keys, or none."""
        return tuple(norm for norm in (self.q_norm, self.k_norm) if norm is not None)

    @property
    def dropped(self) -> float:
        """Dropout rate of the attention weights, 0 outside of training."""
        return self.dropout if self.training else 0.0

    def _heads(self, hidden: Tensor, context: StepContext, whole: bool) -> tuple[Tensor, ...]:
        """Queries and keys, normed and rotated, and values [B, H or Hk, T, P]."""
        projected = self._project(hidden, whole)
        if self.joint_norm:
            projected = [*self._normed_jointly(projected[:2], context), projected[2]]
        *parts, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in projected)
        if self.head_norms and not self.joint_norm:
            parts = [norm(t) for norm, t in zip(self.head_norms, parts, strict=True)]
        if self.rotated:
            cos, sin = (t.unsqueeze(1) for t in context.angles)  # [B, 1, T, P]
            # under autocast the rotation is fp32
            parts = [dispatch.rotated(t, cos, sin).to(v.dtype) for t in parts]
        if len(parts) == 1:
            heads = v.shape[1]
            parts = parts[0].split([parts[0].shape[1] - heads, heads], 1)
        q, k = parts
        return q if self.query_factor == 1 else q * self.query_factor, k, v

    def _normed_jointly(self, raw: Sequence[Tensor], context: StepContext) -> list[Tensor]:
        """Queries and keys [B, T, H P] under norms of all heads.

        The context says how large those are that stand beside these.
        """
        norms = self.head_norms
        if context.head_squares is None:
            return [norm(t) for norm, t in zip(norms, raw, strict=True)]
        return [
            kernels.norm_by(t, mean, norm.weight, norm.variance_epsilon)
            for t, norm, mean in zip(raw, norms, context.head_squares, strict=True)
        ]

    def head_squares(self, hidden: Tensor) -> Tensor:
        """Sums of squares [2, B, T, 1] of queries and of keys before their norms."""
        raw = (self.q_proj(hidden), self.k_proj(hidden))
        kind = kernels.state_dtype(hidden)
        return torch.stack([t.to(kind).square().sum(-1, keepdim=True) for t in raw])

    def _project(self, hidden: Tensor, whole: bool) -> tuple[Tensor, ...]:
        """Queries, keys and values; with `whole` queries and keys next to each other.

        All are one product then, which a whole row fills better.
        """
        parts = self.q_proj, self.k_proj, self.v_proj
        plain = not self.head_norms and all(is_its_weight(part) for part in parts)
        if not whole or not plain or len({part.bias is None for part in parts}) > 1:
            return tuple(part(hidden) for part in parts)
        if self.v_proj.weight.requires_grad and not self.q_proj.weight.requires_grad:
            # a gradient of all rows would be made for those of v
            return _joint(hidden, parts[:2]), self.v_proj(hidden)
        rows = [self.q_proj.out_features + self.k_proj.out_features, self.v_proj.out_features]
        return _joint(hidden, parts).split(rows, -1)


class AttentionMixer(AttentionHeads):
    """softmax(q k^T / sqrt(P)) v over the keys the context's mask allows."""

    def forward(self, hidden: Tensor, context: StepContext, cache: AttentionCache | None) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        return self.o_proj(self.features(hidden, context, cache))

    def features(
        self, hidden: Tensor, context: StepContext, cache: AttentionCache | None = None
    ) -> Tensor:
        """The input of o_proj [B, T, H P]."""
        q, k, v = self._heads(hidden, context, whole=cache is None)
        if cache is not None:
            positions = None if context.level else context.positions
            k, v = cache.update(k, v, positions, context.slots)  # [B, Hk, S, P]
        if context.maps is not None:
            weights = context.maps.keep(attention_weights(q, k, context.mask, context.spans))
            weights = F.dropout(weights, self.dropped)
            y = weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            return y.transpose(1, 2).flatten(2)
        y = dispatch.attention(q, k, v, context.mask, context.spans, self.dropped)
        return y.flatten(2)  # of [B, T, H, P]


def _joint(hidden: Tensor, parts: Sequence[nn.Linear]) -> Tensor:
    """Outputs of several projections of hidden [B, T, D], side by side, as one product."""
    weight = torch.cat([part.weight for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    return F.linear(hidden, weight, bias)


@dataclass(frozen=True)
class PackedAttention:
    """Attention of a decode pass; `qkv` rows are queries, keys, values.

    `window` 0 means all positions; with `sinks` the first of all are seen from everywhere. `norms`
    are the weights of those on queries and on keys, or none.
    """

    qkv: Projection
    out: Projection
    heads: int
    kv_heads: int
    width: int
    window: int
    sinks: int = 0
    norms: tuple[Tensor, Tensor] | tuple[()] = ()
    joint_norm: bool = False
    eps: float = 0.0
    query_factor: float = 1.0
    rotated: bool = True

    @property
    def attention(self) -> "PackedAttention":
        """The attention itself, which needs the scratch buffers of an attention."""
        return self

    @property
    def settles(self) -> bool:
        """True if queries and keys need more than a rotation behind their projection."""
        return bool(self.norms) or self.query_factor != 1

    @property
    def activations(self) -> int:
        """Columns of the widest buffer that a row needs."""
        return self.out.weight.shape[1]

    def new_state(self, like: Tensor, size: StateSize) -> AttentionState:
        """Empty keys and values with a slot for every position."""
        return self._keys(like, size.batch, size.capacity, size.splits)

    def new_ring(self, like: Tensor, size: StateSize) -> AttentionState:
        """Empty keys and values of the window alone, in a ring behind the sinks."""
        room = size.window_slots(self.window)
        # few slots: a second program would wait for the first
        return self._keys(like, size.batch, self.sinks + room, 1, room)

    def _keys(
        self, like: Tensor, batch: int, slots: int, splits: int, ring: int = 0
    ) -> AttentionState:
        shape = (batch, self.kv_heads, slots, self.width)
        return AttentionState(like.new_zeros(shape), like.new_zeros(shape), splits, ring)

    def lend(self, state: AttentionState, cache: AttentionCache) -> None:
        """Let a cache write its keys and values here, behind those that it holds."""
        if cache.keys is not None:
            slots = min(cache.keys.shape[2], state.keys.shape[2])
            state.keys[:, :, :slots] = cache.keys[:, :, :slots]
            state.values[:, :, :slots] = present(cache.values)[:, :, :slots]
        cache.keys, cache.values = state.keys, state.values

    def load(self, state: AttentionState, cache: AttentionCache, ends: PromptEnds) -> None:
        """Copy keys and values, unless they were lent.

        RuntimeError where a cache that was lent to outgrew the state.
        """
        if cache.keys is state.keys:
            return
        if ends.into is None:
            raise RuntimeError("the keys of a prompt do not fit the session that reads it")
        for ours, theirs in ((state.keys, cache.keys), (state.values, cache.values)):
            held = present(theirs)
            slots = min(held.shape[2], ours.shape[2])
            ends.write(ours[:, :, :slots], held[:, :, :slots])

    def load_ring(self, state: AttentionState, cache: WindowedCache, ends: PromptEnds) -> None:
        """Copy the sinks and the last positions of the prompts; rings may differ in size."""
        found = ends.held(state.keys.shape[2], cache.span.sinks, state.ring, cache.room)
        for ours, theirs in ((state.keys, cache.keys), (state.values, cache.values)):
            held = present(theirs)
            taken = held.gather(2, found.source.expand(-1, held.shape[1], -1, held.shape[3]))
            ends.write(ours, taken.masked_fill_(found.empty, 0))

    def run(
        self,
        context: PassContext,
        state: AttentionState,
        s: Residual,
        segment: Segment,
        gain: Tensor,
    ) -> None:
        """Add the attention's output to the stream."""
        ops, at, out = context.ops, segment, self.out
        columns = at.rows * self.activations
        args = self.arguments(context, state, s.wide[:columns], s.mixed[:columns])
        where = {"T": at.T, "offset": at.offset, "sinks": args.sinks, "ring": args.ring}
        ops.project_qkv(
            s.scaled, s.squares, context.eps, self.qkv.weight, self.qkv.bias,
            *projected_rotation(context, self), q=args.q, keys=args.keys, values=args.values,
            start=at.start, count=at.active, scale=at.T, **where,
        )  # fmt: skip
        settle(context, segment, [self], [args])
        ops.attention(
            args.q, args.keys, args.values, at.start, at.active, at.T, args.out, args.partial,
            counter=args.counter, splits=args.splits, window=args.window, **where,
        )  # fmt: skip
        ops.add_residual(args.out, out.weight, out.bias, s.hidden, gain, s.scaled, s.squares)

    def arguments(
        self, context: PassContext, state: AttentionState, q: Tensor, out: Tensor
    ) -> AttentionArguments:
        """Arguments of its operations; q and out are flat, for M rows."""
        columns = self.activations
        return AttentionArguments(
            q.view(-1, columns), state.keys, state.values, out.view(-1, columns), context.partial,
            context.counter, state.splits, window=self.window, sinks=self.sinks, ring=state.ring,
        )  # fmt: skip


def projected_rotation(context: PassContext, part: PackedAttention) -> tuple[Tensor, Tensor]:
    """Rotation of queries and keys where they are projected."""
    rotations = present(context.rotations)
    return rotations.of_heads if part.rotated and not part.settles else rotations.none


def settle(
    context: PassContext,
    at: Segment,
    parts: Sequence[PackedAttention],
    arguments: Sequence[AttentionArguments],
) -> None:
    """Finish queries and keys of the attentions of one layer, where a projection does not."""
    part = parts[0]
    if not part.settles:
        return
    rotation = present(context.rotations).of_heads if part.rotated else None
    context.ops.settle_heads(
        arguments, [each.norms for each in parts if each.norms], part.eps, part.query_factor,
        rotation, at.start, at.active, at.T, T=at.T, offset=at.offset, joint=part.joint_norm,
    )  # fmt: skip


def pack_attention(
    mixer: AttentionHeads, config: DecoderConfig, window: int, sinks: int = 0
) -> PackedAttention:
    """Stack the projections of an attention for decode passes."""
    norms = ()
    if mixer.head_norms:
        of_queries, of_keys = mixer.head_norms
        norms = of_queries.weight, of_keys.weight
    return PackedAttention(
        qkv=stack([mixer.q_proj, mixer.k_proj, mixer.v_proj]),
        out=Projection(mixer.o_proj.weight, mixer.o_proj.bias),
        heads=mixer.q_proj.out_features // config.head_dim,
        kv_heads=mixer.k_proj.out_features // config.head_dim,
        width=config.head_dim,
        window=window,
        sinks=sinks,
        norms=norms,
        joint_norm=mixer.joint_norm,
        eps=config.rms_norm_eps,
        query_factor=mixer.query_factor,
        rotated=mixer.rotated,
    )


def weights_of(mixer: AttentionHeads, norm: Tensor) -> AttentionWeights:
    """The projections of an attention, and the rms `norm` [D] of what it reads."""
    parts = {name: getattr(mixer, f"{name}_proj") for name in "qkvo"}
    biases = {name: part.bias for name, part in parts.items() if part.bias is not None}
    weights = {name: part.weight for name, part in parts.items()}
    norms: dict[str, Tensor] = {
        n: norm.weight for n, norm in zip("qk", mixer.head_norms, strict=False)
    }
    score = mixer.query_factor
    return AttentionWeights(**weights, norm=norm, biases=biases, head_norms=norms, score=score)


def copy_attention(mixer: AttentionHeads, attention: AttentionWeights) -> None:
    """Give an attention the weights of the one that it was made from."""
    for name in "qkvo":
        projection = getattr(mixer, f"{name}_proj")
        projection.weight.copy_(getattr(attention, name))
        if projection.bias is not None:
            projection.bias.copy_(present(attention.biases)[name])
    for name, weight in (attention.head_norms or {}).items():
        getattr(mixer, f"{name}_norm").weight.copy_(weight)


def attention_cost(config: DecoderConfig, seen: float, kv_heads: int | None = None) -> MixerCost:
    """Operations of an attention, or of `kv_heads` of it, whose queries see `seen` keys."""
    kv_heads = config.num_key_value_heads if kv_heads is None else kv_heads
    width, shared = config.hidden_size, kv_heads * config.head_dim
    inner = shared * (config.num_attention_heads // config.num_key_value_heads)
    return MixerCost(2 * width * (inner + 2 * shared), 2 * inner * width, 4 * inner * seen)


def kept_cost(config: DecoderConfig, seen: float, kv_heads: int | None = None) -> MixerCost:
    """Cost of heads whose queries and keys are kept: the part that makes them counts as lookup."""
    cost = attention_cost(config, seen, kv_heads)
    kv_heads = config.num_key_value_heads if kv_heads is None else kv_heads
    values = 2 * config.hidden_size * kv_heads * config.head_dim
    return replace(cost, lookup=cost.entrance - values)


class AttentionSpec(AttentionSizes, MixerSpec[None, AttentionMixer]):
    """Attention over all of the past, or the sliding window of the model."""

    in_granite = True
    title = "attention"
    module_type = AttentionMixer
    attribute = "self_attn"
    label = "attention"
    keeps = ""
    branches = {"attention": ""}
    tensor_parallel = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise"),
        "o_proj": "rowwise",
    }

    def module(self, config: DecoderConfig, settings: None, rotated: bool = True) -> AttentionMixer:
        """The module of one layer."""
        return AttentionMixer(config, rotated=rotated)

    def cache(self, settings: None) -> AttentionCache:
        """An empty cache of keys and values."""
        return AttentionCache()

    def cost(self, config: DecoderConfig, settings: None, length: int) -> MixerCost:
        """Operations per token; attention counts the causal half of its scores."""
        return kept_cost(config, min(length / 2, config.sliding_window or length))

    def kv_read(self, config: DecoderConfig, settings: None, context: int) -> int:
        """Numbers of keys and values that a step behind `context` tokens reads."""
        seen = min(context, config.sliding_window or context)
        return seen * self.kv_elements(config, settings)

    def pack(
        self,
        mixer: AttentionMixer,
        config: DecoderConfig,
        settings: None,
        rotations: Rotations | None,
    ) -> PackedAttention:
        """Weights for the decode kernels."""
        return pack_attention(mixer, config, config.sliding_window or 0)
