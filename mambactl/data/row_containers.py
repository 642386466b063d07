"""Rows of one file, whatever it holds: JSON Lines, JSON, tables as text or Parquet, plain text."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mambactl.bounds import EMPTY_LINES, JSON_ROWS_BYTES, LINE_BYTES, ROW_GROUP_BYTES, Bound
from mambactl.data.bad_rows import MALFORMED, BadRows
from mambactl.data.turns import Row
from mambactl.errors import UsageError
from mambactl.foreign import blamed, json_value, numbered_lines, open_regular, reason

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

AGAIN = "fetch or write the file again"
Content = BinaryIO | gzip.GzipFile
Numbered = Iterable[tuple[int, Any]]
# rows of a Parquet file that are converted together
_TOGETHER = 256
_PACKED = ".gz"
# bytes of a .json file that tell a list from lines
_START = 1 << 16


def rows_of(path: str, bad: BadRows | None) -> Numbered:
    """Rows of one file as they are, each with its number (from 1); see `READERS` for its kinds.

    Lines that are no JSON are noted in `bad`, if there is one.
    """
    plain = path.removesuffix(_PACKED)
    return next(read(path, bad) for suffix, read in READERS.items() if plain.endswith(suffix))


@contextmanager
def _opened(path: str) -> Iterator[Content]:
    with open_regular(Path(path), UsageError, AGAIN) as raw:
        if not path.endswith(_PACKED):
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as file:
            yield file


def _read_lines(path: str, bad: BadRows | None) -> Numbered:
    with _opened(path) as file:
        yield from _json_rows(path, file, bad)


def _json_rows(path: str, file: Content, bad: BadRows | None) -> Numbered:
    last = 0
    for number, line in numbered_lines(file, path, UsageError, AGAIN, "row"):
        if line.isspace():
            require_within(EMPTY_LINES, number - last, f"{path}, row {last + 1}")
            continue
        last = number
        try:
            row = json_value(line)
        except ValueError as error:
            _note(f"{path}, row {number}", error, bad)
        else:
            yield number, row


def _note(where: str, error: ValueError, bad: BadRows | None) -> None:
    cure = "one JSON object per line, in UTF-8"
    what = "holds what is no text" if isinstance(error, UnicodeError) else "not JSON"
    problem = f"{what} ({reason(error)})"
    if bad is None:
        raise UsageError(f"{where}: {problem}", cure) from None
    bad.add(MALFORMED, where, problem, cure)


def _read_json(path: str, bad: BadRows | None) -> Numbered:
    """A list of rows, an object that holds one such list, one row, or lines after all."""
    with _opened(path) as file, blamed(path, kind=UsageError, hint=AGAIN):
        content = file.read(JSON_ROWS_BYTES.most + 1)
    require_within(JSON_ROWS_BYTES, len(content), path)
    if not content.removeprefix(b"\xef\xbb\xbf").strip():
        return
    if _holds_lines(content):
        yield from _json_rows(path, io.BytesIO(content), bad)
        return
    try:
        value = json_value(content)
    except ValueError as error:
        hint = "write a list of objects, or one object per line"
        raise UsageError(f"{path}: not JSON ({reason(error)})", hint) from None
    yield from enumerate(_listed(value), start=1)


def _holds_lines(content: bytes) -> bool:
    """Several lines of which the first is a whole object: many files of lines are called .json."""
    first, _, rest = content.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    if not (first.startswith(b"{") and rest.strip()):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _listed(value: object) -> list[object]:
    if isinstance(value, list):
        return value
    lists = [each for each in value.values() if _is_rows(each)] if isinstance(value, dict) else []
    # a single row of a chat holds a list of objects, too
    turns = [each for each in lists if {"role", "from"} & each[0].keys()]
    return lists[0] if len(lists) == 1 and not turns else [value]


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _read_table(path: str, bad: BadRows | None) -> Numbered:
    """Lines of cells below one of names; an empty cell is a column that the row does not have."""
    csv.field_size_limit(LINE_BYTES.most)
    separator = "\t" if path.removesuffix(_PACKED).endswith(".tsv") else ","
    with _opened(path) as file:
        table = csv.DictReader(_text_lines(path, file), delimiter=separator, strict=True)
        number = 0
        while True:
            number += 1
            with blamed(f"{path}, row {number}", "as a table", UsageError, AGAIN):
                row = next(table, None)
            if row is None:
                return
            extra = row.pop(None, None)
            if extra is not None:
                error = ValueError(f"{len(extra)} cells more than names in the first line")
                _note(f"{path}, row {number}", error, bad)
                continue
            yield number, {name: cell for name, cell in row.items() if cell}


def _text_lines(path: str, file: Content) -> Iterator[str]:
    for number, line in numbered_lines(file, path, UsageError, AGAIN):
        with blamed(f"{path}, line {number}", kind=UsageError, hint="save it as UTF-8"):
            text = line.decode("utf-8")
        yield text.removeprefix("\ufeff") if number == 1 else text


def _read_text(path: str, bad: BadRows | None) -> Numbered:
    with _opened(path) as raw:
        # some programs write a mark of the encoding first
        file = io.TextIOWrapper(raw, encoding="utf-8-sig")
        with blamed(path, kind=UsageError, hint="save it as UTF-8"):
            text = file.read(LINE_BYTES.most + 1)
            size = len(text.encode("utf-8"))
    require_within(LINE_BYTES, size, path)
    if text.strip():
        yield 1, {"text": text}


def require_within(bound: Bound, found: int, where: str) -> None:
    """Raise UsageError where more was found than a bound allows."""
    if found > bound.most:
        raise UsageError(f"{where} has more than {bound}, the most for {bound.of}", "split it")


def _read_parquet(path: str, bad: BadRows | None) -> Numbered:
    with open_regular(Path(path), UsageError, AGAIN):
        pass
    with blamed(path, "as parquet", UsageError, AGAIN):
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path)
    with file:
        with blamed(path, "as parquet", UsageError, AGAIN):
            _require_small_groups(path, file)
            batches = file.iter_batches(batch_size=_TOGETHER)
        number = 0
        while True:
            with blamed(f"{path}, row {number + 1}", "as parquet", UsageError, AGAIN):
                batch = next(batches, None)
                rows = None if batch is None else batch.to_pylist()
            if rows is None:
                return
            yield from enumerate(map(without_nulls, rows), start=number + 1)
            number += len(rows)


def _require_small_groups(path: str, file: "ParquetFile") -> None:
    """Raise UsageError for a group that would take too much memory, which is read at once."""
    for number in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(number).total_byte_size
        require_within(ROW_GROUP_BYTES, size, f"{path}, row group {number}")


def without_nulls(row: Row) -> Row:
    """A row of an Arrow table without the nulls inside its columns.

    Arrow gives every object of a column the keys of all of them: what a row does not have is null.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


READERS: dict[str, Callable[[str, BadRows | None], Numbered]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
# what may be packed: Parquet packs its own columns
SUFFIXES = (
    *READERS,
    *(suffix + _PACKED for suffix in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")),
)
