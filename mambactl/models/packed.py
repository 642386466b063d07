"""A hybrid model's weights as decode kernels want them: stacked, with constants worked out once.

Stacking moves weights; the model's own parameters become views of the stacks, so nothing is held
twice and the model still computes what it did.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambactl.kernels.decode.reference.linear import TAPS
from mambactl.kernels.decode.reference.recurrent import spread
from mambactl.models.config import HybridConfig, Mamba1Settings, Mamba2Settings
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.rotary import still


class NotSupported(ValueError):
    """The decode kernels cannot run this model; the message says why."""


@dataclass(frozen=True)
class Projection:
    """y = x W^T + bias."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]


@dataclass(frozen=True)
class AttentionWeights:
    """`qkv` rows are queries, keys, values; `window` 0 means all positions, and with `sinks` the
    first of all are seen from everywhere.
    """

    qkv: Projection
    out: Projection
    heads: int
    kv_heads: int
    width: int
    window: int
    sinks: int = 0


@dataclass(frozen=True)
class Mamba2Weights:
    """Mamba-2; the ring takes the columns of `inner` from `ring_lo` on.

    `window` is the attention beside it, and `turn` (cos, sin) [S, N / 2] rotates B and C.
    """

    inner: Projection
    conv: Projection  # weight [Ch, 4]
    A: Tensor  # [H]
    D: Tensor  # [H]
    dt_bias: Tensor  # [H]
    gain: Tensor  # [H P]
    out: Projection
    sizes: Mamba2Settings
    ring_lo: int
    ring_width: int
    window: AttentionWeights | None = None
    turn: tuple[Tensor, Tensor] | None = None

    @property
    def norm_by_head(self) -> bool:
        """Whether the gated norm stays within heads, so that the scan can do it."""
        return self.sizes.norm_groups == self.sizes.n_heads


@dataclass(frozen=True)
class Mamba1Weights:
    """Mamba-1; `low` is x_proj of the native form, and None in the attention form."""

    inner: Projection
    conv: Projection  # weight [Ch, 4]
    low: Tensor | None  # [dt_rank + 2 N, Ch]
    dt: Projection  # weight [Ch, dt_rank]
    A: Tensor  # [Ch, N]
    D: Tensor  # [Ch]
    out: Projection
    sizes: Mamba1Settings
    ring_lo: int
    ring_width: int
    piece: int
    repeat: int

    def ring_source(self) -> Tensor:
        """The convolution channel that holds each x column of the ring, [ring x columns]."""
        if self.sizes.native:
            return torch.arange(self.sizes.d_inner)
        source = spread(self.sizes.d_inner, self.piece, self.repeat)
        first = torch.zeros(self.sizes.x_dim, dtype=torch.long)
        # written from the end, so that the first channel with a source wins
        return first.scatter(0, source.flip(0), torch.arange(self.sizes.d_inner).flip(0))


MixerWeights = AttentionWeights | Mamba2Weights | Mamba1Weights


def attention_of(mixer: MixerWeights) -> AttentionWeights | None:
    """The attention of a mixer, if it has any."""
    if isinstance(mixer, AttentionWeights):
        return mixer
    return mixer.window if isinstance(mixer, Mamba2Weights) else None


@dataclass(frozen=True)
class LayerWeights:
    """One block; without an MLP its three tensors are None."""

    gain: Tensor  # [D]
    mixer: MixerWeights
    mlp_gain: Tensor | None  # [D]
    gate_up: Tensor | None  # [2 I, D]
    down: Tensor | None  # [D, I]


@dataclass(frozen=True)
class PackedModel:
    """Everything a decode pass reads."""

    table: Tensor  # [V, D]
    layers: tuple[LayerWeights, ...]
    gain: Tensor  # [D]
    head: Tensor  # [V, D]
    eps: float
    cos: Tensor | None  # [S, P / 2]
    sin: Tensor | None  # [S, P / 2]

    @property
    def has_mamba1(self) -> bool:
        """Whether a layer's ring is nearly as large as its state."""
        return any(isinstance(layer.mixer, Mamba1Weights) for layer in self.layers)


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
    cos = sin = turn = None
    if config.attends:
        cos, sin = _rotations(model, positions)
    if config.rotates:
        turn = still(cos, 1.0), still(sin, 0.0)
    return PackedModel(
        table=inner.embed_tokens.weight,
        layers=tuple(_layer(block, config, turn) for block in inner.layers),
        gain=inner.norm.weight,
        head=model.lm_head.weight,
        eps=config.rms_norm_eps,
        cos=cos,
        sin=sin,
    )


def _rotations(model: HybridForCausalLM, positions: int) -> tuple[Tensor, Tensor]:
    rotary = model.model.rotary_emb
    if "dynamic" in rotary.rope_type or rotary.rope_type == "longrope":
        raise NotSupported(f"{rotary.rope_type} rotary positions, which change with the length")
    at = torch.arange(positions, device=model.device)[None]
    # in the model's precision, as its attention layers use them
    cos, sin = rotary(model.model.embed_tokens.weight[:1, None], at)  # [1, S, P]
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


def _layer(
    block: nn.Module, config: HybridConfig, turn: tuple[Tensor, Tensor] | None
) -> LayerWeights:
    kind = config.mixers[block.index]
    if kind == "attention":
        mixer = _attention(block.mixer, config, config.sliding_window or 0)
    elif kind == "mamba1":
        mixer = _mamba1(block.mixer)
    else:
        window = None
        if kind == "mamba2_window":
            span = config.mamba2_window_settings
            window = _attention(block.mixer.window, config, span.window, span.sinks)
        mixer = _mamba2(block.mixer, window, turn)
    if not block.has_mlp:
        return LayerWeights(block.input_layernorm.weight, mixer, None, None, None)
    return LayerWeights(
        gain=block.input_layernorm.weight,
        mixer=mixer,
        mlp_gain=block.post_attention_layernorm.weight,
        gate_up=_stack([block.mlp.gate_proj, block.mlp.up_proj]).weight,
        down=block.mlp.down_proj.weight,
    )


def _stack(linears: list[nn.Linear]) -> Projection:
    """One matrix of several, which become its views."""
    joined = [_joined([linear.weight for linear in linears])]
    if linears[0].bias is not None:
        joined.append(_joined([linear.bias for linear in linears]))
    return Projection(joined[0], joined[1] if len(joined) > 1 else None)


def _joined(parts: list[nn.Parameter]) -> Tensor:
    first = parts[0].data
    rows = sum(len(part) for part in parts)
    if _adjoin([part.data for part in parts]):
        # stacked by an earlier call
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([part.data for part in parts])
    start = 0
    for part in parts:
        part.data = whole[start : start + len(part)]
        start += len(part)
    return whole


def _adjoin(parts: list[Tensor]) -> bool:
    """Whether tensors lie one after the other in the same memory."""
    place = parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not same or part.storage_offset() != place or not part.is_contiguous():
            return False
        place += part.numel()
    return True


def _attention(
    mixer: nn.Module, config: HybridConfig, window: int, sinks: int = 0
) -> AttentionWeights:
    return AttentionWeights(
        qkv=_stack([mixer.q_proj, mixer.k_proj, mixer.v_proj]),
        out=Projection(mixer.o_proj.weight, mixer.o_proj.bias),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        width=config.head_dim,
        window=window,
        sinks=sinks,
    )


def _conv(conv: nn.Conv1d) -> Projection:
    channels, _, taps = conv.weight.shape
    if taps > TAPS:
        raise NotSupported(f"a convolution of {taps} taps (at most {TAPS})")
    weight = conv.weight.new_zeros(channels, TAPS)
    weight[:, TAPS - taps :] = conv.weight[:, 0]
    bias = conv.weight.new_zeros(channels) if conv.bias is None else conv.bias
    return Projection(weight, bias)


def _mamba2(
    mixer: nn.Module, window: AttentionWeights | None, turn: tuple[Tensor, Tensor] | None
) -> Mamba2Weights:
    s: Mamba2Settings = mixer.sizes
    return Mamba2Weights(
        inner=Projection(mixer.in_proj.weight, mixer.in_proj.bias),
        conv=_conv(mixer.conv1d),
        A=-mixer.A_log.float().exp(),
        D=mixer.D.float(),
        dt_bias=mixer.dt_bias.float(),
        gain=mixer.norm.weight,
        out=Projection(mixer.out_proj.weight, mixer.out_proj.bias),
        sizes=s,
        ring_lo=s.d_inner,
        ring_width=s.conv_dim + s.n_heads,
        window=window,
        turn=turn,
    )


def _mamba1(mixer: nn.Module) -> Mamba1Weights:
    s: Mamba1Settings = mixer.sizes
    return Mamba1Weights(
        inner=Projection(mixer.in_proj.weight, mixer.in_proj.bias),
        conv=_conv(mixer.conv1d),
        low=mixer.x_proj.weight if s.native else None,
        dt=Projection(mixer.dt_proj.weight, mixer.dt_proj.bias),
        A=-mixer.A_log.float().exp().contiguous(),
        D=mixer.D.float(),
        out=Projection(mixer.out_proj.weight, mixer.out_proj.bias),
        sizes=s,
        ring_lo=0 if s.native else s.d_inner,
        ring_width=s.d_inner if s.native else sum(s.in_rows) - s.d_inner,
        piece=s.d_inner if s.native else s.repeat_width,
        repeat=1 if s.native else s.d_inner // s.x_dim,
    )
