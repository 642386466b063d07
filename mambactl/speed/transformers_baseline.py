"""Speed of transformers' own `generate` with a Llama of a model's shape and random weights."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mambactl.errors import UsageError
from mambactl.metrics import DECODE_RATE, FIRST_TOKEN, PEAK, PREFILL_RATE
from mambactl.models.config import HybridConfig
from mambactl.options.measurement import TRANSFORMERS
from mambactl.speed.limits import Numbers
from mambactl.speed.memory import peak_bytes, release, reset_peak
from mambactl.speed.shapes import STD
from mambactl.speed.subject import Grid, random_prompts, spread, sweep

# what a Llama's shape consists of
FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
)
NUMBERS = (PREFILL_RATE.name, FIRST_TOKEN.name, DECODE_RATE.name, PEAK.name, "intervals")


def llama_shape(config: HybridConfig, name: str) -> LlamaConfig:
    """The Llama that a hybrid `name` was made from, by its shape; UsageError for a native Mamba."""
    if not config.has_mlp:
        raise UsageError(
            f"{name} has no attention whose shape a Llama could have",
            "drop --baseline transformers",
        )
    values = {field: getattr(config, field) for field in FIELDS}
    return LlamaConfig(**values, bos_token_id=None, eos_token_id=None, pad_token_id=None)


@torch.no_grad()
def random_llama(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> LlamaForCausalLM:
    """transformers' model with random weights made on `device`, in eval mode."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)  # pyright: ignore[reportArgumentType]
    model.to_empty(device=device)
    model.tie_weights()
    # rotary frequencies are computed at construction and never stored
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1)
        else:
            parameter.normal_(0, STD, generator=generator)
    return model.eval().requires_grad_(False)


def transformers_points(
    config: LlamaConfig, label: str, grid: Grid, device: torch.device, dtype: torch.dtype
) -> list[Numbers]:
    """Every point of `grid`: the first token from a call that asks for one, the rate of the others
    from what a call that asks for all takes longer. None in all columns where it does not fit.
    """
    found = _points(random_llama(config, device, dtype, grid.seed), label, grid)
    release(device)
    return [
        {
            "model": TRANSFORMERS,
            "input_len": length,
            "batch_size": rows,
            "output_len": grid.output_len,
        }
        | numbers
        for (length, rows), numbers in zip(grid.points, found, strict=True)
    ]


def _points(model: LlamaForCausalLM, label: str, grid: Grid) -> list[Numbers]:
    def measure(length: int, rows: int, advance: Callable[[], None]) -> Numbers:
        return _measure(model, grid, length, rows, advance)

    return sweep(f"transformers' Llama of {label}", grid, NUMBERS, measure)


def _measure(
    model: LlamaForCausalLM, grid: Grid, length: int, rows: int, advance: Callable[[], None]
) -> Numbers:
    prompts = random_prompts(model.config.vocab_size, rows, length, grid.seed)
    ids = torch.tensor(prompts, device=model.device)  # [B, T]
    reset_peak(model.device)
    firsts, rates = [], []
    for number in range(grid.rounds):
        first = _seconds(model, ids, 1)
        whole = _seconds(model, ids, grid.output_len) if grid.output_len > 1 else first
        if number % (grid.warmup + grid.iters) >= grid.warmup:
            firsts.append(first)
            rates.append(rows * (grid.output_len - 1) / max(whole - first, 1e-9))
        advance()
    rounds = {FIRST_TOKEN.name: [1000 * seconds for seconds in firsts]}
    if grid.output_len > 1:
        rounds[DECODE_RATE.name] = rates
    found = spread(**rounds)
    return {
        DECODE_RATE.name: None,
        **found,
        PREFILL_RATE.name: 1000 * rows * length / found[FIRST_TOKEN.name],
        PEAK.name: peak_bytes(model.device),
    }


@torch.no_grad()
def _seconds(model: LlamaForCausalLM, ids: Tensor, count: int) -> float:
    """Seconds of a call that writes `count` tokens behind ids [B, T]."""
    cuda = ids.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(ids.device)
    start = time.perf_counter()
    # of a mixin that its own type does not name
    generate: Callable[..., Tensor] = getattr(model, "generate")  # noqa: B009
    generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    if cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start
