"""Limits set by memory bandwidth: bytes a decoding step must move, and the resulting tokens/s.

Weights are read once per step, recurrent states read and written once, keys and values read once;
activations and inputs of convolutions (together below 0.1 %) are free. A decoder that replays
tokens instead of writing the state at every step moves a little less: it could pass the limit of
many rows, by what those writes are of all bytes.
"""

from dataclasses import dataclass

import torch

from mambactl.json_values import JsonObject
from mambactl.models.cache_bytes import STATE_BYTES, state_elements
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.sizes import FLOAT32_PARAMETERS

Numbers = JsonObject

# each limit with the rate that it is for, and the share of it that was reached
LIMITS = (
    ("decode_byte_limit", "decode_tokens_per_second", "decode_share"),
    ("speculative_byte_limit", "speculative_tokens_per_second", "speculative_share"),
)


def at_bandwidth(point: Numbers, factor: float) -> None:
    """Judge a point by `factor` times the bandwidth that it was judged by, in place."""
    for allowed, rate, share in LIMITS:
        if point.get(allowed) and point.get(rate):
            point[allowed] *= factor
            point[share] = point[rate] / point[allowed]


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one decoding step of a whole batch.

    weights: blocks, final norm and head; embedding: rows looked up; state: read and written;
    kv: keys and values read, and those of the new tokens written.
    """

    weights: int
    embedding: int
    state: int
    kv: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.weights + self.embedding + self.state + self.kv


def bytes_per_step(
    config: HybridConfig,
    weight_bytes_per_param: float = 2,
    batch: int = 1,
    context: int = 0,
    tokens_per_pass: int = 1,
    kv_bytes: int = 2,
) -> StepBytes:
    """Bytes to run `tokens_per_pass` tokens of every row behind `context` tokens held.

    A_log, D and dt_bias count 4 bytes whatever the other weights are stored in. `kv_bytes` is the
    size of one number in the KV cache.
    """
    new = batch * tokens_per_pass
    kv = sum(
        batch * layer.spec.kv_read(config, layer.settings, context)
        + new * layer.spec.kv_elements(config, layer.settings)
        for layer in config.layers
    )
    return StepBytes(
        weights=round(_weight_bytes(config, weight_bytes_per_param)),
        embedding=round(new * config.hidden_size * weight_bytes_per_param),
        state=2 * batch * state_elements(config) * STATE_BYTES,
        kv=kv * kv_bytes,
    )


def parameters_read(config: HybridConfig) -> int:
    """Parameters that every step reads: all but the embedding table (a tied one is the head)."""
    return sum(_sizes(config))


def _weight_bytes(config: HybridConfig, per_parameter: float) -> float:
    plain, float32 = _sizes(config)
    return plain * per_parameter + float32 * 4


def _sizes(config: HybridConfig) -> tuple[int, int]:
    """Parameters outside the embedding table: in the model's type, and kept in fp32."""
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    modules = (model.model.layers, model.model.norm, model.lm_head)
    sizes = [0, 0]
    for module in modules:
        for name, parameter in module.named_parameters():
            sizes[name.rpartition(".")[2] in FLOAT32_PARAMETERS] += parameter.numel()
    return sizes[0], sizes[1]


def limit(
    config: HybridConfig,
    bandwidth: float,
    weight_bytes_per_param: float = 2,
    batch: int = 1,
    context: int = 0,
    kv_bytes: int = 2,
) -> float:
    """Tokens/s of plain decoding, all rows together; bandwidth in bytes/s."""
    step = bytes_per_step(config, weight_bytes_per_param, batch, context, 1, kv_bytes)
    return batch * bandwidth / step.total


def tokens_per_step(k: int, acceptance: float) -> float:
    """Mean tokens a step of k drafts yields, each accepted with probability `acceptance`.

    The draft ends at the first rejection and the target adds one token of its own, so this is
    1 + a + ... + a^k = (1 - a^(k+1)) / (1 - a) (arXiv 2211.17192, equation 1).
    """
    return sum(acceptance**i for i in range(k + 1))


def speculative_limit(
    target: HybridConfig,
    draft: HybridConfig | None,
    k: int,
    acceptance: float,
    bandwidth: float,
    weight_bytes_per_param: float = 2,
    batch: int = 1,
    context: int = 0,
    kv_bytes: int = 2,
    draft_bytes_per_param: float | None = None,
) -> float:
    """Tokens/s of speculative decoding, all rows together: one segment of k + 1 tokens through the
    target and k single tokens through the draft; no draft model (None) is a free draft. Weights of
    the draft are stored as the target's where nothing else is given.
    """
    shared = {"batch": batch, "context": context, "kv_bytes": kv_bytes}
    step = bytes_per_step(target, weight_bytes_per_param, tokens_per_pass=k + 1, **shared).total
    if draft is not None:
        size = draft_bytes_per_param or weight_bytes_per_param
        step += k * bytes_per_step(draft, size, **shared).total
    return batch * tokens_per_step(k, acceptance) * bandwidth / step
