"""Rows of text or chat turns from .jsonl[.gz], .parquet, .txt and hub data sets, checked."""

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mambactl import console
from mambactl.data.bad_rows import MALFORMED, BadRows
from mambactl.data.row_files import hub_parts, is_on_hub, read_rows
from mambactl.errors import UsageError
from mambactl.foreign import excerpt, json_value, reason

Row = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
EXPECTED = "`text` (a string) or `messages` (a list of role and content)"
# how much more of a set on the hub is read than used, so that the shuffled order means something
POOL = 4
CHARACTERS_PER_TOKEN = 4


class Document(dict[str, Any]):
    """A checked row; `where` names its file and row, `part` numbers the data set it came from.

    `spec` is that data set, for a row that was read from one.
    """

    def __init__(self, where: str, row: Mapping[str, Any], part: int = 0, spec: str | None = None):
        super().__init__(row)
        self.where, self.part, self.spec = where, part, spec


class BadRow(Exception):
    """What is wrong with one row, and its kind of fault; the caller adds where."""

    def __init__(self, problem: str, kind: str = MALFORMED):
        super().__init__(problem)
        self.kind = kind


@console.doing("reading rows of data")
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


@console.doing("counting rows of data")
def count_rows(specs: Sequence[str], max_samples: int | None = None) -> int | None:
    """Check files and count their rows; None where a set lies on the hub, which is not asked."""
    found = sum(1 for _ in _documents(specs, max_samples, used_rows=0))
    streamed = [hub_parts(spec) for spec in specs if is_on_hub(spec)]
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
            yield Document(where, _document(row), part, spec)
        except BadRow as error:
            if bad is not None:
                bad.add(MALFORMED, where, str(error), f"expected {EXPECTED}")
                continue
            raise UsageError(f"{where}: {error}", f"expected {EXPECTED}") from None
    if not found and not (bad is not None and bad.found):
        raise UsageError(f"{spec} is empty", "give a data set with at least one row")


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
        known = f"known are {', '.join(ROLES)}"
        _require(role in ROLES, f"{where} has the role {reprlib.repr(role)}; {known}")
        content, calls = message.get("content"), message.get("tool_calls")
        _require(content is not None or bool(calls), f"{where} has no `content`")
        _require(isinstance(content, str | None), f"{where} has a {_kind(content)} as `content`")
        _require(calls is None or _are_objects(calls), f"{where}: `tool_calls` are no objects")
    # parquet fills absent struct fields with nulls, which chat templates would print
    return [{key: item for key, item in m.items() if item is not None} for m in value]


def _tools(value: Any) -> list[Row]:
    try:
        tools = json_value(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRow(f"`tools` is not JSON ({reason(error)})") from None
    _require(_are_objects(tools), "`tools` is not a list of objects")
    return tools


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _kind(value: Any) -> str:
    return type(value).__name__


def _columns(row: Iterable[str]) -> str:
    return excerpt(", ".join(f"`{name}`" for name in row)) or "none"


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
