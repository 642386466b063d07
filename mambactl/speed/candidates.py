"""Models that `bench` measures: checkpoints, and synthetic ones with a given acceptance rate.

Models are made when they are needed, so that one at a time is in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.head_layout import is_draft_head
from mambactl.checkpoint.load import load_model
from mambactl.decode.backend import NGRAM, Draft
from mambactl.decode.head_files import load_head
from mambactl.errors import ModelError, UsageError
from mambactl.json_values import JsonObject
from mambactl.models.byte_weights import for_decoding
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import BenchConfig
from mambactl.options.measurement import HEAD
from mambactl.speed.limits import parameters_read
from mambactl.speed.scripted_head import TOKENS, scripted_head
from mambactl.speed.shapes import SHAPES, build, disagreeing, successors
from mambactl.speed.subject import Subject

LEAST_PERIOD = 64


Helper = Callable[[HybridForCausalLM], Draft]


@dataclass(frozen=True)
class Source:
    """Constructors of a model and its draft; a synthetic model answers with the map `successor`."""

    name: str
    target: Callable[[], HybridForCausalLM]
    # of the model itself, which a head needs
    draft: Helper | None = None
    successor: Tensor | None = None
    period: int = 1

    def subject(self, bandwidth: float, rounded: bool = False) -> Subject:
        """Make the model, to be measured on a device that reads `bandwidth` bytes/s.

        `rounded`: its weights may be read in bfloat16 copies.
        """
        return Subject(self.target(), self.name, bandwidth, self.successor, self.period, rounded)


def _ngram(_: HybridForCausalLM) -> Draft:
    return NGRAM


def checkpoint(
    config: BenchConfig, spec: str, device: torch.device, dtype: torch.dtype, draft: str | None
) -> Source:
    """A model that is read from disk."""
    load = partial(_load, config, device, dtype)
    helper = None if draft is None else _helper(config, spec, load, draft)
    return Source(spec, partial(load, spec), helper)


def _helper(
    config: BenchConfig, spec: str, load: Callable[[str], HybridForCausalLM], draft: str
) -> Helper:
    """Constructor of a draft from disk; UsageError for a head beside weights it does not know."""
    if draft == NGRAM:
        return _ngram
    if not is_draft_head(draft):
        return lambda _: load(draft)
    if config.weights != "auto":
        raise UsageError(
            f"a draft head knows its target by the stored weights, not by {config.weights}",
            "drop --weights, or give another draft",
        )
    return lambda target: load_head(draft, target, spec)


def _load(
    config: BenchConfig, device: torch.device, dtype: torch.dtype, spec: str
) -> HybridForCausalLM:
    model = load_model(
        spec, device=str(device), dtype=dtype, trust_remote_code=config.trust_remote_code
    )
    if not isinstance(model, HybridForCausalLM):
        raise ModelError(
            f"{spec} runs code of its own, which the decode engine cannot drive",
            hint="bench a checkpoint that loads without --trust-remote-code",
        )
    return for_decoding(model, config.weights, spec)


def synthetic(config: BenchConfig, name: str, device: torch.device, dtype: torch.dtype) -> Source:
    """A scripted model; the draft, if any, goes wrong as often as `config.acceptance` says."""
    whole = SHAPES[name]().vocab_size
    sizes = [whole, *(SHAPES[draft]().vocab_size for draft in config.draft_shapes)]
    if config.draft == HEAD:
        sizes.append(min(whole, TOKENS))
    # only tokens that a draft of a trimmed vocabulary has
    successor = successors(max(sizes), config.seed, limit=min(sizes))
    helper: Helper | None = _ngram if config.draft == NGRAM else None
    # an answer takes a whole period, and a very short one still the drafts' share of many tokens
    period = min(max(config.output_len, LEAST_PERIOD), len(successor) // 2)
    if len(sizes) > 1:
        other = disagreeing(successor, 1 - config.acceptance, config.seed, period)
        helper = partial(_scripted, config, dtype, successor, other)
    target = partial(_build, config, name, device, dtype, config.seed, successor)
    return Source(name, target, helper, successor, period)


def _scripted(
    config: BenchConfig,
    dtype: torch.dtype,
    successor: Tensor,
    other: Tensor,
    target: HybridForCausalLM,
) -> Draft:
    """A draft that goes wrong where `other` parts from `successor`."""
    if config.draft == HEAD:
        return scripted_head(target, successor, other, config.seed + 1)
    return _build(config, str(config.draft), target.device, dtype, config.seed + 1, other)


def _build(
    config: BenchConfig,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    successor: Tensor,
) -> HybridForCausalLM:
    return for_decoding(build(name, device, dtype, seed, successor), config.weights, name)


def about_checkpoint(spec: str) -> JsonObject:
    """Description of a checkpoint for a dry run; reads headers only."""
    found = describe(spec)
    return {key: found[key] for key in ("checkpoint", "parameters", "mixers", "cache")}


def about_shapes(config: BenchConfig) -> JsonObject:
    """Description of synthetic models for a dry run; makes none."""
    names = config.shapes
    return {
        "synthetic": config.synthetic,
        "parameters_read": {name: parameters_read(SHAPES[name]()) for name in names},
        "acceptance": config.acceptance,
    }
