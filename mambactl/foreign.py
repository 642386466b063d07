"""The boundary to files that other programs or people wrote: bounded reads, failures as sentences.

Everything inside `blamed` is a library's work on foreign bytes, or a check of what came out. Our
own code works on the checked values, outside of it, so that a bug still shows as a bug.
"""

import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from mambactl.bounds import LINE_BYTES, NESTING, TEXT_BYTES, Bound
from mambactl.errors import MambactlError, ModelError
from mambactl.json_values import Json, JsonObject

if TYPE_CHECKING:
    # not needed by the help, which this module is part of
    from gzip import GzipFile

AGAIN = "fetch it again"
# characters that are repeated of a text, which may be the whole input
_EXCERPT = 200
# how JSON writes half of a character beyond 16 bits
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def blamed(
    where: Path | str,
    what: str = "",
    kind: type[MambactlError] = ModelError,
    hint: str = AGAIN,
) -> Iterator[None]:
    """Turn whatever is raised on damaged content into an error of one `kind` that names the place.

    `where` is the file (with its row, if there are any) and `what` the part of it, if it has parts.
    """
    try:
        yield
    except (MambactlError, MemoryError):
        raise
    except BaseException as error:  # libraries raise many types on damaged content
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise kind(f"{_location(where, what)} cannot be used ({reason(error)})", hint) from error


def is_panic(error: BaseException) -> bool:
    """True for a panic of a library in Rust, which is no subclass of Exception."""
    return type(error).__module__ == "pyo3_runtime"


def reason(error: BaseException) -> str:
    """The first line of what an exception says, in a bounded number of characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = excerpt(text.strip().split("\n")[0])
    name = type(error).__name__
    return first if isinstance(error, OSError) and first else f"{name}: {first}" if first else name


def _location(where: Path | str, what: str) -> str:
    return f"{where}: {what}" if what else str(where)


def excerpt(text: str) -> str:
    """A text as a message repeats it: the start of one that is long."""
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."


@contextmanager
def open_regular(
    path: Path, kind: type[MambactlError] = ModelError, hint: str = AGAIN
) -> Iterator[BufferedReader]:
    """A regular file to read from; raises `kind` for one that cannot be opened or is none."""
    with blamed(path, kind=kind, hint=hint):
        # without O_NONBLOCK opening a pipe waits for whoever writes it
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        require_regular(path, os.fstat(fd), kind)
        with open(fd, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(fd)


def numbered_lines(
    file: "BinaryIO | GzipFile",
    name: Path | str,
    kind: type[MambactlError] = ModelError,
    hint: str = AGAIN,
    word: str = "line",
) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers (from 1) and their ends; raises `kind` for one of unbounded size."""
    for number in count(1):
        where = f"{name}, {word} {number}"
        with blamed(where, kind=kind, hint=hint):
            line = file.readline(LINE_BYTES.most + 1)
        if not line:
            return
        if len(line) > LINE_BYTES.most:
            problem = f"{where} has more than {LINE_BYTES}, the most for {LINE_BYTES.of}"
            raise kind(problem, "split it")
        yield number, line


def read_bytes(
    path: Path,
    kind: type[MambactlError] = ModelError,
    most: Bound = TEXT_BYTES,
    hint: str = AGAIN,
) -> bytes:
    """The content of a regular file of bounded size; raises `kind` for anything else."""
    with open_regular(path, kind, hint) as file, blamed(path, kind=kind, hint=hint):
        content = file.read(most.most + 1)
    if len(content) > most.most:
        raise kind(f"{path} has more than {most}, the most for {most.of}", "give a smaller file")
    return content


def regular_size(path: Path, kind: type[MambactlError] = ModelError, hint: str = AGAIN) -> int:
    """The size of a regular file; raises `kind` for anything else."""
    with blamed(path, kind=kind, hint=hint):
        status = path.stat()
        require_regular(path, status, kind)
    return status.st_size


def require_regular(
    path: Path, status: os.stat_result, kind: type[MambactlError] = ModelError
) -> None:
    """Raise `kind` where `status`, of the file at `path`, is that of a folder, pipe or device."""
    if stat.S_ISDIR(status.st_mode):
        raise kind(f"{path} is a folder", "give a file")
    if not stat.S_ISREG(status.st_mode):
        raise kind(f"{path} is a pipe or device, not a regular file", "give a regular file")


def read_text(
    path: Path,
    kind: type[MambactlError] = ModelError,
    most: Bound = TEXT_BYTES,
    hint: str = AGAIN,
) -> str:
    """The text of a regular UTF-8 file of bounded size; raises `kind` that names it."""
    content = read_bytes(path, kind, most, hint)
    with blamed(path, kind=kind, hint=hint):
        return content.decode("utf-8")


def json_value(
    text: str | bytes, object_hook: Callable[[JsonObject], object] | None = None
) -> Json:
    """The value of a JSON text that can be written again as UTF-8; raises ValueError.

    Numbers of thousands of digits, nesting beyond the bound and halves of characters are refused,
    as everything that is no JSON is. `object_hook` is that of `json.loads`.
    """
    text = (text.decode("utf-8") if isinstance(text, bytes) else text).removeprefix("\ufeff")
    try:
        value = json.loads(text, object_hook=object_hook)
        if _ESCAPED_HALF.search(text):
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except RecursionError:
        raise ValueError(f"more than {NESTING}") from None
    except TypeError as error:
        # of the hook, for a value that it does not expect
        raise ValueError(str(error)) from error
    # no more levels than brackets, which is all that most texts need
    if text.count("[") + text.count("{") > NESTING.most:
        _require_shallow(value)
    return value


def _require_shallow(value: object) -> None:
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _members(outer)]:
        depth += 1
        if depth > NESTING.most:
            raise ValueError(f"more than {NESTING}, the most for {NESTING.of}")


def _members(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def json_object(
    text: str | bytes,
    where: Path | str,
    what: str = "",
    kind: type[MambactlError] = ModelError,
    hint: str = AGAIN,
    object_hook: Callable[[JsonObject], object] | None = None,
) -> JsonObject:
    """The object of a JSON text, as `json_value` reads it; raises `kind` for anything else."""
    location = _location(where, what)
    try:
        value = json_value(text, object_hook)
    except ValueError as error:
        raise kind(f"{location} is not valid JSON ({reason(error)})", hint) from error
    if not isinstance(value, dict):
        raise kind(f"{location} is not a JSON object", hint)
    return value


def read_object(
    path: Path, kind: type[MambactlError] = ModelError, hint: str = AGAIN
) -> JsonObject:
    """The JSON object in a regular file of bounded size; raises `kind` for anything else."""
    return json_object(read_bytes(path, kind, hint=hint), path, "", kind, hint)


Schema = TypeVar("Schema", bound=BaseModel)


def fitted(
    schema: type[Schema],
    raw: Mapping[str, object],
    where: Path | str,
    what: str = "",
    kind: type[MambactlError] = ModelError,
    hint: str = AGAIN,
) -> Schema:
    """The fields of `schema` in a JSON object; raises `kind` for the first that does not fit."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        path = ".".join(_path(raw, wrong["loc"]))
        found = f"is {reprlib.repr(wrong['input'])}: {wrong['msg']}"
        if wrong["type"] == "missing":
            path, found = ".".join(map(str, wrong["loc"])), "is missing"
        raise kind(f"{_location(where, what)}: {path} {found}", hint) from error


def _path(raw: Any, location: Iterable[int | str]) -> Iterator[str]:
    """Keys and indices of a value, without the types that were tried for it."""
    for part in location:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            continue
        yield str(part)
