"""Models of published shapes with random weights, and scripted acceptance, to measure speed with.

Speed depends on shapes, not on what a model has learned. `script` makes the next token known in
advance whatever the blocks compute, so a decoder runs at full cost, its output can be checked, and
a draft that disagrees on a chosen share of the tokens is accepted with a chosen probability.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from mambactl.conversion.replace import kept_attention
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.registry import MIXERS
from mambactl.models.mixers.settings import Mamba1Settings, Mamba2Settings
from mambactl.models.mixers.spec import MixerForm
from mambactl.models.positions import RotaryEmbedding
from mambactl.present import present
from mambactl.speed.shape_table import TABLE, HybridShape, LlamaShape, NativeShape, Shape

# of every projection, as in Llama and GPT-2
STD = 0.02
DISAGREEMENT = 0x5EED
GOLDEN = (5**0.5 - 1) / 2
# tokens of the cycle after which a draft has disagreed as often as asked
PERIOD = 512
# no tokens with a meaning, and a head of its own, which a script needs
_COMMON = {
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _llama(shape: LlamaShape) -> HybridConfig:
    """Configuration with attention alone, Llama-3's rotary base."""
    return HybridConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads[0],
        num_key_value_heads=shape.heads[1],
        head_dim=shape.hidden // shape.heads[0],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        **_COMMON,
    )


def _hybrid(shape: HybridShape) -> HybridConfig:
    config = _llama(shape.base)
    spec = MIXERS[shape.mixer]
    if shape.window:
        spec = MIXERS[present(spec.with_window)]
    if shape.heads:
        spec = MIXERS[present(spec.with_kept_heads)]
    form = MixerForm(window=shape.window, rotary=shape.rotary, kept=shape.heads)
    kept = kept_attention(config.num_hidden_layers, shape.ratio)
    return config.with_layers(
        {
            index: (spec, spec.from_attention(config, form, index))
            for index in range(config.num_hidden_layers)
            if index not in kept
        }
    )


def _mamba1(hidden: int) -> Mamba1Settings:
    return Mamba1Settings(d_inner=2 * hidden, dt_rank=-(-hidden // 16), native=True)


def _mamba2(hidden: int) -> Mamba2Settings:
    heads = 2 * hidden // 64
    return Mamba2Settings(heads, 64, 128, x_heads=heads, b_groups=1, c_groups=1, norm_groups=1)


_SIZES: dict[str, Callable[[int], Mamba1Settings | Mamba2Settings]] = {
    "mamba1": _mamba1,
    "mamba2": _mamba2,
}


def _native(shape: NativeShape) -> HybridConfig:
    """Configuration of recurrent mixers alone, as `checkpoint.adapters.mamba` reads them."""
    hidden = shape.hidden
    return HybridConfig(
        vocab_size=shape.vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=1 << 20,
        mixers=[shape.mixer] * shape.layers,
        has_mlp=False,
        **{shape.mixer: asdict(_SIZES[shape.mixer](hidden))},
        **_COMMON,
    )


def config_of(shape: Shape) -> HybridConfig:
    """Configuration of a shape, with a head of its own."""
    if isinstance(shape, LlamaShape):
        return _llama(shape)
    return _hybrid(shape) if isinstance(shape, HybridShape) else _native(shape)


# name -> the configuration of that shape
SHAPES: dict[str, Callable[[], HybridConfig]] = {
    name: partial(config_of, shape) for name, shape in TABLE.items()
}


def build(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    successor: Tensor | None = None,
) -> HybridForCausalLM:
    """A model of a shape in `SHAPES`, random or, with `successor` [V], scripted."""
    model = materialise(SHAPES[name](), device, dtype, seed)
    if successor is not None:
        script(model, successor, seed)
    return model


@torch.no_grad()
def materialise(
    config: HybridConfig, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> HybridForCausalLM:
    """Random weights made on `device` itself, in eval mode and without gradients.

    A_log, D and dt_bias are fp32. The values follow from `seed` and the kind of device.
    """
    with torch.device("meta"):
        model = HybridForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    # rotary frequencies are computed at construction and never stored, so they need it again
    model.model.rotary_emb = RotaryEmbedding(config).to(device)
    model.config.dtype = dtype
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        fill(name, parameter, additions(config), generator)
    return model.eval().requires_grad_(False)


def additions(config: HybridConfig) -> int:
    """Number of times that a model adds to its residual stream."""
    return config.num_hidden_layers * (2 if config.has_mlp else 1)


def fill(name: str, parameter: Tensor, additions: int, generator: torch.Generator) -> None:
    """Give a parameter its initial values, as Mamba and Llama do, in place.

    `additions` is how often the model adds to its residual stream.
    """
    owner, _, kind = f".{name}".rpartition(".")
    owner = owner.rpartition(".")[2]
    if kind == "D" or owner.endswith("norm"):
        parameter.fill_(1)
    elif kind == "A_log":
        _fill_decay(parameter, generator)
    elif kind == "dt_bias" or (owner, kind) == ("dt_proj", "bias"):
        dt = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        dt.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
        # the inverse of softplus
        parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
    elif kind == "bias":
        parameter.zero_()
    elif owner in ("conv1d", "dt_proj"):
        bound = parameter.shape[-1] ** -0.5
        parameter.uniform_(-bound, bound, generator=generator)
    else:
        # what is added to the stream must not drown the embedding that a script relies on
        last = owner in ("out_proj", "o_proj", "down_proj")
        parameter.normal_(0, STD / additions**0.5 if last else STD, generator=generator)


def _fill_decay(A_log: Tensor, generator: torch.Generator) -> None:
    if A_log.ndim == 1:  # [H], Mamba-2
        A_log.uniform_(1, 16, generator=generator).log_()
    else:  # [Ch, N], Mamba-1
        steps = torch.arange(1, A_log.shape[1] + 1, dtype=torch.float32, device=A_log.device)
        A_log.copy_(steps.log().expand_as(A_log))


def successors(vocabulary: int, seed: int = 0, limit: int | None = None) -> Tensor:
    """A map [V] int64 that leads through every token in one single cycle, as text never repeats.

    With `limit` the cycle stays in the first `limit` tokens and the others lead into it, which is
    what a draft of a trimmed vocabulary needs.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = vocabulary if limit is None else limit
    if not 2 <= limit <= vocabulary:
        raise ValueError(f"a cycle of {limit} tokens in a vocabulary of {vocabulary}")
    order = torch.randperm(limit, generator=generator)  # [limit]
    successor = torch.randint(limit, (vocabulary,), generator=generator)  # [V]
    successor[order] = order.roll(-1)
    return successor


def disagreeing(successor: Tensor, share: float, seed: int = 0, period: int = PERIOD) -> Tensor:
    """Another map [V] that differs on exactly round(share * n) of the n tokens of the cycle.

    They exchange their successors among themselves, so on the cycle it stays a permutation. Every
    `period` tokens of `cycle_of` hold as many of them; `spread_apart` says where.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share} is not between 0 and 1")
    cycle = cycle_of(successor)  # [n]
    generator = torch.Generator().manual_seed(seed ^ DISAGREEMENT)
    chosen = cycle[spread_apart(len(cycle), share, generator, period)]
    # exchanged at random: neighbours that exchanged would be right about each other's next token
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    other = successor.clone()
    # one token has nobody to exchange with: it then follows itself, which no cycle contains
    other[chosen] = successor[chosen.roll(1)] if len(chosen) > 1 else chosen
    return other


def spread_apart(
    length: int, share: float, generator: torch.Generator, period: int = PERIOD
) -> Tensor:
    """round(share * length) of the numbers 0 .. length - 1, sorted.

    Each `period` of numbers ends with one of them and holds its part of all. How many lie between
    two are quantiles of the geometric distribution, which independent draws would have, in
    an order of its own for each period. A decoder starts anew behind each rejected draft, so any
    number of drafts is accepted as often as asked in every period, not only on average.
    """
    total, found = round(share * length), []
    for start in range(0, length, period):
        end = min(start + period, length)
        count = _part(total, end, length) - _part(total, start, length)
        steps = _steps(count, end - start)
        # a stretch of multiples of the golden ratio is evenly spread wherever it is cut
        order = (torch.rand(1, generator=generator) + torch.arange(count) * GOLDEN) % 1
        found.append(start - 1 + steps[order.argsort().argsort()].cumsum(0))
    return torch.cat(found)


def _part(total: int, end: int, length: int) -> int:
    return total * end // length


def _steps(count: int, length: int) -> Tensor:
    """`count` distances of at least 1 with the sum `length`, geometric and sorted."""
    if count == 0 or count == length:
        return torch.ones(count, dtype=torch.long)
    u = (torch.arange(count, dtype=torch.double) + 0.5) / count  # [count]
    steps = 1 + (torch.log1p(-u) / math.log1p(-count / length)).floor().long()
    missing = length - int(steps.sum())
    # quantiles leave out the end of the tail: the longest distances make up for it
    for index in range(abs(missing)):
        at = count - 1 - index % max(1, count // 4) if missing > 0 else int(steps.argmax())
        steps[at] += 1 if missing > 0 else -1
    return steps


def cycle_of(successor: Tensor) -> Tensor:
    """The tokens of a map's cycle [n] in its order, from the lowest one on."""
    following = successor.tolist()
    found = [min(following)]
    while (token := following[found[-1]]) != found[0]:
        found.append(token)
    return torch.tensor(found)


@torch.no_grad()
def script(model: HybridForCausalLM, successor: Tensor, seed: int = 0) -> None:
    """Make `successor[t]` [V] the greedy token after t, whatever the blocks compute.

    Head rows are random with entries of rms 1 and token t is embedded as the head row of its
    successor: a token's logit there is about D, any other about sqrt(D). Tokens that share a
    successor share an embedding. A longer map is cut at the model's vocabulary.
    """
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight  # [V, D]
    if head is embedding:
        raise ValueError("a model with a tied head cannot be scripted")
    vocabulary, width = head.shape
    successor = successor[:vocabulary].to(head.device)
    if len(successor) < vocabulary or int(successor.max()) >= vocabulary:
        raise ValueError(f"the map does not stay in the model's {vocabulary} tokens")
    head.normal_(generator=torch.Generator(head.device).manual_seed(seed))
    # equal lengths, or in a narrow model a long row beats the right one
    head.mul_(width**0.5 / torch.linalg.vector_norm(head, dim=1, keepdim=True))
    torch.index_select(head, 0, successor, out=embedding)


def first_wrong(tokens: Sequence[int], successor: Tensor) -> int | None:
    """Index of the first token that is not the successor of the one before it, None if all are.

    Begin with the prompt's last token to check a whole answer.
    """
    row = torch.as_tensor(tokens, dtype=torch.long)  # [T]
    wrong = (successor.cpu()[row[:-1]] != row[1:]).nonzero()  # [n, 1]
    return int(wrong[0]) + 1 if len(wrong) else None


def follows(tokens: Sequence[int], successor: Tensor) -> bool:
    """True if every token is the successor of the one before it."""
    return first_wrong(tokens, successor) is None
