"""Rows of text or chat turns from .jsonl[.gz], .parquet, .txt and hub data sets."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mambactl.data.bad_rows import MALFORMED, BadRows
from mambactl.errors import UsageError

Row = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
EXPECTED = "`text` (a string) or `messages` (a list of role and content)"
# how much more of a set on the hub is read than used, so that the shuffled order means something
POOL = 4
CHARACTERS_PER_TOKEN = 4
# how JSON writes half of a character beyond 16 bits
ESCAPED_HALF = "\\ud"
_HUB_ID = re.compile(r"^(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@/]+))?(?:@(?P<split>.+))?$")


class Document(dict[str, Any]):
    """A checked row; `where` names its file and row, `part` numbers the data set it came from."""

    def __init__(self, where: str, row: Mapping[str, Any], part: int = 0):
        super().__init__(row)
        self.where, self.part = where, part


class BadRow(Exception):
    """What is wrong with one row, and its kind of fault; the caller adds where."""

    def __init__(self, problem: str, kind: str = MALFORMED):
        super().__init__(problem)
        self.kind = kind


def load_rows(
    specs: Sequence[str],
    max_samples: int | None = None,
    used_rows: int | None = None,
    used_tokens: int | None = None,
    bad: BadRows | None = None,
) -> list[Document]:
    """Read and check every data set of `specs`, taking rows from them round-robin.

    Files are read whole. A set on the hub, which may be far larger than what a run sees, is
    streamed until it gave `POOL` times the rows or tokens that are used.

    A spec is a .jsonl, .jsonl.gz, .parquet (a row each) or .txt (one document) file, or a hub id
    `ID[:config][@split]`. Rows hold `text`, or `messages` and perhaps `tools`. Raises UsageError
    naming file and row; with `bad` a row that holds something else is noted there and left out.
    """
    return list(_documents(specs, max_samples, used_rows, used_tokens, bad))


def count_rows(specs: Sequence[str], max_samples: int | None = None) -> int | None:
    """Check files and count their rows; None where a set lies on the hub, which is not asked."""
    found = sum(1 for _ in _documents(specs, max_samples, used_rows=0))
    streamed = [_hub_parts(spec) for spec in specs if is_on_hub(spec)]
    return None if streamed else found


def _documents(
    specs: Sequence[str],
    max_samples: int | None,
    used_rows: int | None = None,
    used_tokens: int | None = None,
    bad: BadRows | None = None,
) -> Iterator[Document]:
    if not specs:
        raise UsageError("no data given", f"pass --data FILE with {EXPECTED} per row")
    sources = [
        _pool(_checked(spec, part, bad), used_rows, used_tokens)
        if is_on_hub(spec)
        else _checked(spec, part, bad)
        for part, spec in enumerate(specs)
    ]
    return islice(round_robin(sources), max_samples)


def _pool(
    rows: Iterator[Document], used_rows: int | None, used_tokens: int | None
) -> Iterator[Document]:
    characters = 0
    for row in islice(rows, None if used_rows is None else POOL * used_rows):
        yield row
        if used_tokens is not None:
            characters += _characters(row)
            if characters >= POOL * CHARACTERS_PER_TOKEN * used_tokens:
                return


def _characters(row: Document) -> int:
    if "text" in row:
        return len(row["text"])
    return sum(len(str(turn.get("content") or "")) for turn in row["messages"])


def round_robin(sources: Sequence[Iterator[Any]]) -> Iterator[Any]:
    """One item of every source, then the next of each, until all are empty."""
    waiting = list(sources)
    while waiting:
        alive = []
        for source in waiting:
            for row in islice(source, 1):
                yield row
                alive.append(source)
        waiting = alive


def _checked(spec: str, part: int, bad: BadRows | None) -> Iterator[Document]:
    found = False
    for number, row in read_rows(spec, bad):
        found = True
        where = f"{spec}, row {number}"
        try:
            yield Document(where, _document(row), part)
        except BadRow as error:
            if bad is not None:
                bad.add(MALFORMED, where, str(error), f"expected {EXPECTED}")
                continue
            raise UsageError(f"{where}: {error}", f"expected {EXPECTED}") from None
    if not found and not (bad is not None and bad.found):
        raise UsageError(f"{spec} is empty", "give a data set with at least one row")


def is_on_hub(spec: str) -> bool:
    """Whether a name means a data set on the hub: no known kind of file, and none that is there."""
    return not (spec.endswith(SUFFIXES) or os.path.exists(spec))


def read_rows(spec: str, bad: BadRows | None = None) -> Iterator[tuple[int, Any]]:
    """Rows of one file or hub data set as they are, each with its number (from 1).

    Lines that are no JSON are noted in `bad`, if there is one.
    """
    path = Path(spec)
    if is_on_hub(spec):
        return _read_hub(spec)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(
            f"{spec} {what}", f"give a file ending in {', '.join(SUFFIXES)}, or a hub id"
        )
    if spec.endswith(".parquet"):
        return _read_parquet(spec)
    if spec.endswith(".txt"):
        return _read_text(spec)
    if spec.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(spec, bad)
    raise UsageError(f"{spec}: unknown kind of file", f"known are {', '.join(SUFFIXES)}")


def _read_jsonl(spec: str, bad: BadRows | None) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if spec.endswith(".gz") else open
    number = 0
    try:
        with opener(spec, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        row = _parsed(line)
                    except BadRow as error:
                        _broken(f"{spec}, row {number}", error, bad)
                    else:
                        yield number, row
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise UsageError(
            f"{spec}, after row {number}: cannot be read ({error})",
            "fetch or write the file again, as UTF-8",
        ) from None


def _parsed(line: str) -> Any:
    try:
        row = json.loads(line)
        if ESCAPED_HALF in line.lower():
            # half of a pair stands for no character, and no tokenizer takes it
            json.dumps(row, ensure_ascii=False).encode()
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRow(f"not JSON ({error})") from None
    except UnicodeEncodeError as error:
        raise BadRow(f"holds what is no text ({error.reason})") from None
    return row


def _broken(where: str, error: BadRow, bad: BadRows | None) -> None:
    cure = "one JSON object per line, in whole characters"
    if bad is None:
        raise UsageError(f"{where}: {error}", cure) from None
    bad.add(MALFORMED, where, str(error), cure)


def _read_text(spec: str) -> Iterator[tuple[int, Any]]:
    try:
        text = Path(spec).read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{spec} cannot be read ({error})", "save it as UTF-8") from None
    if text.strip():
        yield 1, {"text": text}


def _read_parquet(spec: str) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(spec) as file:
            batches = file.iter_batches(batch_size=1024)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (ArrowException, OSError) as error:
        raise UsageError(f"{spec} cannot be read as parquet ({error})") from None


def _hub_parts(spec: str) -> re.Match[str]:
    match = _HUB_ID.match(spec)
    if match is None:
        raise UsageError(f"{spec} is no file and no hub id", "use ID[:config][@split] or a file")
    return match


def _read_hub(spec: str) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    match = _hub_parts(spec)
    split = match["split"] or "train"
    try:
        rows = load_dataset(match["id"], match["config"], split=split, streaming="[" not in split)
        yield from enumerate(rows, start=1)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"data set {spec} cannot be loaded: {reason}",
            "check the id, `:config`, `@split` and the network, or give a local file",
        ) from None


def chat_turns(value: Any, column: str) -> list[Row]:
    """The messages of a column, checked; raises UsageError that says what is wrong with them."""
    try:
        return _messages(value, column)
    except BadRow as error:
        raise UsageError(str(error)) from None


def tool_list(value: Any) -> list[Row]:
    """The tools of a row, a list or JSON; raises UsageError that says what is wrong with them."""
    try:
        return _tools(value)
    except BadRow as error:
        raise UsageError(str(error)) from None


def _document(row: Any) -> Row:
    _require(isinstance(row, dict), f"holds a {type(row).__name__}, not an object")
    if row.get("messages") is not None:
        tools = row.get("tools")
        return {"messages": _messages(row["messages"], "messages")} | (
            {"tools": _tools(tools)} if tools else {}
        )
    _require(row.get("text") is not None, f"has the columns {_columns(row)}")
    _require(isinstance(row["text"], str), f"`text` is a {type(row['text']).__name__}")
    return {"text": row["text"]}


def preference_row(row: Any) -> Row:
    """`prompt`, `chosen` and `rejected` as lists of messages; raises BadRow.

    Without a prompt, or where the answers are whole conversations (as in ultrafeedback_binarized),
    the turns that both share are the prompt.
    """
    _require(isinstance(row, dict), f"holds a {type(row).__name__}, not an object")
    _require({"chosen", "rejected"} <= row.keys(), f"has the columns {_columns(row)}")
    chosen = _messages(_turn(row["chosen"], "assistant"), "chosen")
    rejected = _messages(_turn(row["rejected"], "assistant"), "rejected")
    if row.get("prompt") is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = _messages(_turn(row["prompt"], "user"), "prompt")
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    _require(len(chosen) > 1 and len(rejected) > 1, f"has the columns {_columns(row)}")
    pairs = enumerate(zip(chosen[:-1], rejected[:-1], strict=False))
    shared = next((n for n, (a, b) in pairs if a != b), min(len(chosen), len(rejected)) - 1)
    _require(shared > 0, "`chosen` and `rejected` start differently")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _turn(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _messages(value: Any, column: str) -> list[Row]:
    _require(isinstance(value, list) and len(value) > 0, f"`{column}` is not a filled list")
    for position, message in enumerate(value):
        where = f"`{column}[{position}]`"
        _require(isinstance(message, dict), f"{where} is not an object")
        role = message.get("role")
        _require(role in ROLES, f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
        content_ok = isinstance(message.get("content"), str) or bool(message.get("tool_calls"))
        _require(content_ok, f"{where} has no `content`")
    # parquet fills absent struct fields with nulls, which chat templates would print
    return [{key: item for key, item in m.items() if item is not None} for m in value]


def _tools(value: Any) -> list[Row]:
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise BadRow(f"`tools` is not JSON ({error})") from None
    _require(isinstance(tools, list), "`tools` is not a list")
    return tools


def _columns(row: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in row) or "none"


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise BadRow(problem)


def set_names(specs: Sequence[str]) -> list[str]:
    """Short names of data sets, or the specs where two would be called the same."""
    short = [set_name(spec) for spec in specs]
    return short if len(set(short)) == len(short) else list(specs)


def set_name(spec: str) -> str:
    """A file's name without what says its kind; other specs are their own name."""
    name = Path(spec).name.removesuffix(".gz")
    return name.rsplit(".", 1)[0] if name.endswith((".jsonl", ".parquet", ".txt")) else spec
