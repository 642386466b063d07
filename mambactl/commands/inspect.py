"""`mambactl inspect`: what a checkpoint is, from its headers."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from mambactl.checkpoint.contents import describe
from mambactl.json_values import AnyObject, JsonObject
from mambactl.metrics import columns, group
from mambactl.models.mixers.settings import WindowSettings
from mambactl.models.mixers.sizes import SIZES, MixerSizes
from mambactl.models.session_size import SessionSize
from mambactl.options.reading import InspectConfig
from mambactl.stage_result import StageResult, Table
from mambactl.units import decimal_size


def run(options: InspectConfig, source: str) -> StageResult:
    """Describe the checkpoint at `source`; the description is the metrics."""
    session = SessionSize.holding(options.batch_size, options.input_len, options.k)
    found = describe(source, tensors=options.tensors, session=session)
    return StageResult(source, found, blocks=tuple(_blocks(found, options)))


def _blocks(found: JsonObject, options: InspectConfig) -> Iterator[str | Table]:
    rows = [
        (part["part"], part["layers"], f"{part['parameters']:,}", decimal_size(part["bytes"]))
        for part in found["parts"]
    ]
    rows.append(("total", "", f"{found['parameters']:,}", decimal_size(found["bytes"])))
    title = f"{found['checkpoint']}  {found['architecture']}"
    yield Table(title, ("part", "layers", "parameters", "size"), rows, numbers=True)
    cache = found["cache"]
    yield (
        f"cache: {cache['bytes_per_token']:,} B per token, "
        f"{cache['bytes_per_sequence']:,} B per sequence ({found['dtype']}; states in float32)"
    )
    if "window_bytes" in cache:
        windows = cache.get("windows", [cache])
        spans = [f"the last {w['window']} tokens and the first {w['sinks']}" for w in windows]
        yield (
            f"window: {cache['window_bytes']:,} B of it, {' or '.join(spans)} in every "
            f"{_windowed(found['mixers'])} layer, however long the text"
        )
    yield _sequences(found["sequences"])
    yield from _session(found, options)
    if found["rotary"]:
        yield "rotary: B and C of the mamba2 layers turn with the position"
    if found["lineage"]:
        steps = [str(found["lineage"].get("source") or "random weights"), *found["stages"]]
        yield f"lineage: {' -> '.join(steps)}"
    if options.lineage:
        yield yaml.safe_dump(found["lineage"], sort_keys=False).rstrip()
    if options.tensors:
        listed = [(t["name"], t["dtype"], "x".join(map(str, t["shape"]))) for t in found["tensors"]]
        yield Table("", ("tensor", "dtype", "shape"), listed)


def _sequences(found: Mapping[str, AnyObject]) -> Table:
    """Cache bytes of one sequence at some lengths, beside the teacher's."""
    numbers = columns(group("sequence"), found.values())
    rows = [
        (f"{int(tokens):,}", *(each.written(one) for each in numbers))
        for tokens, one in found.items()
    ]
    return Table("one sequence", ("tokens", *(n.heading for n in numbers)), rows, True)


# part of a session's bytes -> its name in a table
SESSION_PARTS = {
    "kv": "keys and values of all tokens",
    "windows": "keys and values of windows",
    "rings": "rings of projections",
    "states": "recurrent states",
    "total": "total",
}


def _session(found: JsonObject, options: InspectConfig) -> Iterator[str | Table]:
    """The cache that a GPU allocates to decode the sequences that were asked for."""
    session = found["session"]
    sizes = session["bytes"]
    yield (
        f"decoding on a GPU in {found['dtype']}, {options.batch_size:,} x {options.input_len:,} "
        f"tokens, k = {options.k}: memory for {session['rows']:,} x {session['capacity']:,} tokens"
    )
    rows = [
        (name, f"{sizes[part]:,}", decimal_size(sizes[part]))
        for part, name in SESSION_PARTS.items()
        if sizes[part]
    ]
    yield Table("", ("part", "bytes", "size"), rows, numbers=True)


def _windowed(mixers: list[str]) -> str:
    """Names of the mixers that have a window of attention beside a recurrence."""
    used = dict.fromkeys(mixers)
    known: Mapping[str, MixerSizes[Any]] = SIZES
    if not known.keys() >= used.keys():
        from mambactl.models.mixers.registry import MIXERS

        known = MIXERS
    return " or ".join(name for name in used if WindowSettings in known[name].sections.values())
