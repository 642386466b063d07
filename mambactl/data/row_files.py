"""Rows as they lie in files and on the hub, of any content, each with its number."""

import gzip
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mambactl.bounds import EMPTY_LINES, LINE_BYTES, ROW_GROUP_BYTES, Bound
from mambactl.checkpoint.hub_refusals import accept_terms, log_in, url_of
from mambactl.checkpoint.resolve import hub_forbidden
from mambactl.data.bad_rows import MALFORMED, BadRows
from mambactl.errors import UsageError
from mambactl.foreign import blamed, json_value, numbered_lines, open_regular, reason

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
PROMPT_FILES = (".txt", ".jsonl", ".jsonl.gz")
_AGAIN = "fetch or write the file again"
# rows of a Parquet file that are converted together
_TOGETHER = 256
_HUB_ID = re.compile(r"^(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@/]+))?(?:@(?P<split>.+))?$")


def is_on_hub(spec: str) -> bool:
    """Whether a name means a data set on the hub: no known kind of file, and none that is there."""
    return not (spec.endswith(SUFFIXES) or os.path.exists(spec))


def read_rows(spec: str, bad: BadRows | None = None) -> Iterator[tuple[int, Any]]:
    """Rows of one file or hub data set as they are, each with its number (from 1).

    Lines that are no JSON are noted in `bad`, if there is one.
    """
    require_there(spec)
    if is_on_hub(spec):
        return _read_hub(spec)
    return next(read(spec, bad) for suffix, read in _READERS.items() if spec.endswith(suffix))


def require_there(spec: str) -> None:
    """Raise UsageError for a file that is missing or of no known kind; no hub is asked."""
    if is_on_hub(spec):
        return
    if os.path.isdir(spec):
        raise UsageError(f"{spec} is a folder", _KNOWN)
    with blamed(spec, kind=UsageError, hint=_KNOWN):
        if not _is_there(spec):
            raise UsageError(f"{spec} does not exist", f"{_KNOWN}, or a hub id")
    if not spec.endswith(SUFFIXES):
        raise UsageError(f"{spec}: unknown kind of file", f"known are {', '.join(SUFFIXES)}")


def prompt_file(path: str) -> Path:
    """The file of prompts that an option names; UsageError where there is none, or of no kind."""
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
        raise UsageError(f"{path} is no file", hint="give a .txt or .jsonl file with prompts")
    if not file.name.endswith(PROMPT_FILES):
        known = ", ".join(PROMPT_FILES)
        raise UsageError(f"{path}: unknown kind of file", hint=f"known are {known}")
    return file


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _read_jsonl(spec: str, bad: BadRows | None) -> Iterator[tuple[int, Any]]:
    with open_regular(Path(spec), UsageError, _AGAIN) as file:
        yield from _json_rows(spec, file, bad)


def _read_packed(spec: str, bad: BadRows | None) -> Iterator[tuple[int, Any]]:
    with open_regular(Path(spec), UsageError, _AGAIN) as raw, gzip.GzipFile(fileobj=raw) as file:
        yield from _json_rows(spec, file, bad)


def _json_rows(
    spec: str, file: BinaryIO | gzip.GzipFile, bad: BadRows | None
) -> Iterator[tuple[int, Any]]:
    last = 0
    for number, line in numbered_lines(file, spec, UsageError, _AGAIN, "row"):
        if line.isspace():
            _require_within(EMPTY_LINES, number - last, f"{spec}, row {last + 1}")
            continue
        last = number
        try:
            row = json_value(line)
        except ValueError as error:
            _note(f"{spec}, row {number}", error, bad)
        else:
            yield number, row


def _note(where: str, error: ValueError, bad: BadRows | None) -> None:
    cure = "one JSON object per line, in UTF-8"
    what = "holds what is no text" if isinstance(error, UnicodeError) else "not JSON"
    problem = f"{what} ({reason(error)})"
    if bad is None:
        raise UsageError(f"{where}: {problem}", cure) from None
    bad.add(MALFORMED, where, problem, cure)


def _read_text(spec: str, bad: BadRows | None) -> Iterator[tuple[int, Any]]:
    with open_regular(Path(spec), UsageError, _AGAIN) as raw:
        # some programs write a mark of the encoding first
        file = io.TextIOWrapper(raw, encoding="utf-8-sig")
        with blamed(spec, kind=UsageError, hint="save it as UTF-8"):
            text = file.read(LINE_BYTES.most + 1)
            size = len(text.encode("utf-8"))
    _require_within(LINE_BYTES, size, spec)
    if text.strip():
        yield 1, {"text": text}


def _require_within(bound: Bound, found: int, where: str) -> None:
    if found > bound.most:
        raise UsageError(f"{where} has more than {bound}, the most for {bound.of}", "split it")


def _read_parquet(spec: str, bad: BadRows | None) -> Iterator[tuple[int, Any]]:
    with open_regular(Path(spec), UsageError, _AGAIN):
        pass
    with blamed(spec, "as parquet", UsageError, _AGAIN):
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(spec)
    with file:
        with blamed(spec, "as parquet", UsageError, _AGAIN):
            _require_small_groups(spec, file)
            batches = file.iter_batches(batch_size=_TOGETHER)
        number = 0
        while True:
            with blamed(f"{spec}, row {number + 1}", "as parquet", UsageError, _AGAIN):
                batch = next(batches, None)
                rows = None if batch is None else batch.to_pylist()
            if rows is None:
                return
            yield from enumerate(rows, start=number + 1)
            number += len(rows)


def _require_small_groups(spec: str, file: "ParquetFile") -> None:
    """Raise UsageError for a group that would take too much memory, which is read at once."""
    for number in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(number).total_byte_size
        _require_within(ROW_GROUP_BYTES, size, f"{spec}, row group {number}")


_READERS = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_packed,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
_KNOWN = f"give a file ending in {', '.join(SUFFIXES)}"


def hub_parts(spec: str) -> re.Match[str]:
    """Id, config and split of a data set on the hub; raises UsageError for another text."""
    match = _HUB_ID.match(spec)
    if match is None:
        raise UsageError(f"{spec} is no file and no hub id", "use ID[:config][@split] or a file")
    return match


def _read_hub(spec: str) -> Iterator[tuple[int, Any]]:
    match = hub_parts(spec)
    split = match["split"] or "train"
    try:
        from datasets import load_dataset

        rows = load_dataset(match["id"], match["config"], split=split, streaming="[" not in split)
        yield from enumerate(rows, start=1)
    except Exception as error:  # whatever the network, the library and the files bring
        message = f"data set {spec} cannot be loaded: {reason(error)}"
        raise UsageError(message, _hub_hint(match["id"], error)) from None


def _hub_hint(name: str, error: Exception) -> str:
    """Hint for a data set of the hub that cannot be loaded."""
    if hub_forbidden():
        return "unset HF_HUB_OFFLINE, or give a local file"
    if "gated" in str(error):
        return accept_terms(url_of(f"datasets/{name}"))
    if type(error).__name__ == "DatasetNotFoundError":
        return f"check the id; for a private one {log_in('read')}"
    return "check the id, `:config`, `@split` and the network, or give a local file"
