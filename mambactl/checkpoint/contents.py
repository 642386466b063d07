"""What a checkpoint holds, from its headers: parts, sizes, cache and history; no weight is read."""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from mambactl.checkpoint.load import adapt, open_checkpoint
from mambactl.checkpoint.reader import Reader
from mambactl.errors import ModelError
from mambactl.models.config import HybridConfig

LAYER = re.compile(r"layers\.(\d+)\.")


def describe(spec: str, tensors: bool = False) -> dict[str, Any]:
    """Describe a checkpoint as JSON-able data; with `tensors` also every tensor of it."""
    with open_checkpoint(spec) as reader:
        config = adapt(reader).config
        parts = _parts(reader, config)
        dtype = _main_dtype(reader)
        found = {
            "checkpoint": str(reader.path.absolute()),
            "architecture": reader.config.get("model_type", "unknown"),
            "mixers": config.mixers,
            "rotary": config.rotates,
            "parts": parts,
            "parameters": sum(part["parameters"] for part in parts),
            "bytes": sum(part["bytes"] for part in parts),
            "dtype": _name(dtype),
            "cache": cache_bytes(config, dtype),
            "stages": _stages(reader.lineage),
            "lineage": reader.lineage,
        }
        if tensors:
            found["tensors"] = [
                {"name": n, "dtype": _name(reader.dtype(n)), "shape": list(reader.shape(n))}
                for n in reader.names()
            ]
    return found


def _parts(reader: Reader, config: HybridConfig) -> list[dict[str, Any]]:
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    layers: dict[str, set[int]] = defaultdict(set)
    for name in reader.names():
        match = LAYER.search(name)
        part = "embeddings, norm, head"
        if match:
            index = int(match[1])
            if index >= len(config.mixers):
                raise ModelError(
                    f"{reader.path} holds {name}, but its config has {len(config.mixers)} layers",
                    "its config.json belongs to another model",
                )
            part = f"{config.mixers[index]} layers"
            layers[part].add(index)
        count = math.prod(reader.shape(name))
        sizes[part][0] += count
        sizes[part][1] += count * reader.dtype(name).itemsize
    return [
        {"part": part, "layers": ranges(layers[part]), "parameters": count, "bytes": size}
        for part, (count, size) in sizes.items()
    ]


def cache_bytes(config: HybridConfig, dtype: Any) -> dict[str, int]:
    """Bytes a decoded sequence holds, measured on a model without storage.

    `window_bytes` of a sequence's are keys and values of windows beside Mamba layers.
    """
    import torch

    from mambactl.models.cache import HybridCache
    from mambactl.models.hybrid import HybridForCausalLM
    from mambactl.models.key_ring import KeyRing

    held = []
    # a cache holds no angles, and some kinds of them look at the value of a position
    config = copy.deepcopy(config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    with torch.device("meta"):
        model = HybridForCausalLM(config).to(dtype)
        for length in (1, 2):
            cache = HybridCache(config, 1, device="meta")
            model(torch.zeros(1, length, dtype=torch.long), past_key_values=cache)
            held.append(cache.nbytes())
    per_token = held[1] - held[0]
    found = {"bytes_per_token": per_token, "bytes_per_sequence": held[0] - per_token}
    if config.windows:
        rings = [layer for layer in cache.layers if isinstance(layer, KeyRing)]
        found["window_bytes"] = sum(ring.keys.nbytes + ring.values.nbytes for ring in rings)
    if len(config.windows) == 1:
        found |= asdict(config.windows[0])
    elif config.windows:
        found["windows"] = [asdict(window) for window in config.windows]
    return found


def _stages(lineage: dict[str, Any] | None) -> list[str]:
    """The stages that made it, oldest first."""
    if lineage is None:
        return []
    return [str(link.get("stage")) for link in (*lineage.get("ancestors", ()), lineage)]


def _main_dtype(reader: Reader) -> Any:
    sizes: dict[Any, int] = defaultdict(int)
    for name in reader.names():
        sizes[reader.dtype(name)] += math.prod(reader.shape(name))
    return max(sizes, key=sizes.__getitem__)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def ranges(indices: Iterable[int]) -> str:
    """Numbers as text, runs shortened: `0-3,7`."""
    ordered, spans = sorted(indices), []
    for index in ordered:
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
