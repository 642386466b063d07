"""Rows of faults, and what each of them must end in."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambactl.errors import ModelError


def refused(load: Callable[[str], object], checkpoint: Path, said: str) -> None:
    started = time.process_time()
    with pytest.raises(ModelError) as caught:
        load(str(checkpoint))
    assert said in str(caught.value)
    assert str(checkpoint) in str(caught.value)
    assert caught.value.hint
    assert len(str(caught.value)) < 1000
    assert time.process_time() - started < 10


def set_fields(folder: Path, file: str, fields: dict[str, Any]) -> None:
    """Change keys of a JSON file; `a.b` is inside of a, and ... removes a key."""
    raw = json.loads((folder / file).read_text())
    for path, value in fields.items():
        *outer, key = path.split(".")
        inner = raw
        for part in outer:
            inner = inner[part]
        if value is ...:
            del inner[key]
        else:
            inner[key] = value
    (folder / file).write_text(json.dumps(raw))


def rows(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(key, value, id=f"{key}-{number}")
        for key, values in table.items()
        for number, value in enumerate(values)
    ]


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")
