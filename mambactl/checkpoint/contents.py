"""Contents of a checkpoint by its headers: parts, sizes, cache and history; no weight is read."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial

from mambactl.checkpoint.opening import open_checkpoint
from mambactl.checkpoint.plain_config import plain_layout
from mambactl.checkpoint.reader import NumberType, Reader
from mambactl.errors import ModelError
from mambactl.json_values import JsonObject
from mambactl.models.cache_bytes import attention_bytes, cache_bytes, sequences, session_bytes
from mambactl.models.layout import AnyLayout
from mambactl.models.session_size import SessionSize

LAYER = re.compile(r"layers\.(\d+)\.")


def describe(spec: str, tensors: bool = False, session: SessionSize | None = None) -> JsonObject:
    """Describe a checkpoint as JSON-able data.

    With `tensors` also every tensor of it, with `session` the memory that decoding one takes.
    """
    with open_checkpoint(spec) as reader:
        config = layout_of(reader)
        parts = _parts(reader, config)
        dtype = _main_type(reader)
        found = {
            "checkpoint": str(reader.path.absolute()),
            "architecture": reader.config.get("model_type", "unknown"),
            "mixers": config.mixers,
            "rotary": config.rotates,
            "parts": parts,
            "parameters": sum(part["parameters"] for part in parts),
            "bytes": sum(part["bytes"] for part in parts),
            "dtype": dtype.name,
            "cache": cache_bytes(config, dtype.itemsize),
            "sequences": _sequences(reader, config, dtype.itemsize),
            "stages": _stages(reader.lineage),
            "lineage": reader.lineage,
        }
        if session is not None:
            found["session"] = _session(config, dtype.itemsize, session)
        if tensors:
            found["tensors"] = [
                {"name": n, "dtype": reader.number_type(n).name, "shape": list(reader.shape(n))}
                for n in reader.names()
            ]
    return found


def layout_of(reader: Reader) -> AnyLayout:
    """The layers of an open checkpoint; ModelError for a configuration that cannot be used.

    torch is loaded where config.json alone does not answer that.
    """
    found = plain_layout(reader)
    if found is None:
        from mambactl.checkpoint.load import adapt

        return adapt(reader).config
    return found


def _parts(reader: Reader, config: AnyLayout) -> list[JsonObject]:
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    layers: dict[str, set[int]] = defaultdict(set)
    for name in _distinct_names(reader):
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
        sizes[part][1] += count * reader.number_type(name).itemsize
    return [
        {"part": part, "layers": ranges(layers[part]), "parameters": count, "bytes": size}
        for part, (count, size) in sizes.items()
    ]


def _distinct_names(reader: Reader) -> list[str]:
    """Names of tensors, without a head that some writers store beside embeddings it is tied to."""
    names = list(reader.names())
    if reader.config.get("tie_word_embeddings") and any("embed" in name for name in names):
        return [name for name in names if name != "lm_head.weight"]
    return names


def _session(config: AnyLayout, itemsize: int, size: SessionSize) -> JsonObject:
    found = session_bytes(config, itemsize, size)
    return {
        "rows": size.batch,
        "capacity": size.capacity,
        "k": size.k,
        "bytes": asdict(found) | {"total": found.total},
    }


def _sequences(reader: Reader, config: AnyLayout, itemsize: int) -> JsonObject:
    """Bytes of one sequence; a teacher had attention in every layer."""
    converted = reader.lineage is not None and config.replaced_layers
    teacher = partial(attention_bytes, config, itemsize) if converted else None
    return sequences(config, itemsize, teacher)


def _stages(lineage: JsonObject | None) -> list[str]:
    """The stages that made it, oldest first."""
    if lineage is None:
        return []
    return [str(link.get("stage")) for link in (*lineage.get("ancestors", ()), lineage)]


def _main_type(reader: Reader) -> NumberType:
    sizes: dict[NumberType, int] = defaultdict(int)
    for name in reader.names():
        sizes[reader.number_type(name)] += math.prod(reader.shape(name))
    return max(sizes, key=sizes.__getitem__)


def ranges(indices: Iterable[int]) -> str:
    """Numbers as text, runs shortened: `0-3,7`."""
    ordered, spans = sorted(indices), []
    for index in ordered:
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
