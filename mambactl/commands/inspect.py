"""`mambactl inspect`: what a checkpoint is, from its headers."""

from typing import Annotated, Any

import typer

from mambactl.cli import io
from mambactl.cli.parameters import Json, Model


def inspect(
    model: Model,
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    lineage: Annotated[bool, typer.Option("--lineage", help="print how it was made")] = False,
    as_json: Json = False,
) -> None:
    """Layers, sizes, cache and lineage of a checkpoint, read from its headers.

    \b
    Examples:
      mambactl inspect t.st
      mambactl inspect runs/llama3-8b-convert --tensors
    """
    source = io.read_model(model)
    with io.guarded_stdout():
        from mambactl.checkpoint.contents import describe

        found = describe(source, tensors=tensors)
    if as_json:
        io.write_json(found)
    else:
        io.write_out("\n".join(_blocks(found, tensors, lineage)))


def _blocks(found: dict[str, Any], tensors: bool, lineage: bool) -> list[str]:
    rows = [
        (part["part"], part["layers"], f"{part['parameters']:,}", _size(part["bytes"]))
        for part in found["parts"]
    ]
    rows.append(("total", "", f"{found['parameters']:,}", _size(found["bytes"])))
    title = f"{found['checkpoint']}  {found['architecture']}"
    blocks = [io.table(title, ("part", "layers", "parameters", "size"), rows, numbers=True)]
    cache = found["cache"]
    blocks.append(
        f"cache: {cache['bytes_per_token']:,} B per token, "
        f"{cache['bytes_per_sequence']:,} B per sequence ({found['dtype']}; states in float32)"
    )
    if "window_bytes" in cache:
        blocks.append(
            f"window: {cache['window_bytes']:,} B of it, the last {cache['window']} tokens and "
            f"the first {cache['sinks']} in every mamba2_window layer, however long the text"
        )
    if found["rotary"]:
        blocks.append("rotary: B and C of the mamba2 layers turn with the position")
    if found["lineage"]:
        steps = [str(found["lineage"].get("source")), *found["stages"]]
        blocks.append(f"lineage: {' -> '.join(steps)}")
    if lineage:
        import yaml

        blocks.append(yaml.safe_dump(found["lineage"], sort_keys=False).rstrip())
    if tensors:
        listed = [(t["name"], t["dtype"], "x".join(map(str, t["shape"]))) for t in found["tensors"]]
        blocks.append(io.table("", ("tensor", "dtype", "shape"), listed))
    return blocks


def _size(count: int) -> str:
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000**power:,.4g} {('B', 'kB', 'MB', 'GB')[power]}"
