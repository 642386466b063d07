"""Rows of text or chat turns from files, folders and hub data sets, checked."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from mambactl import console
from mambactl.data.bad_rows import BadRows
from mambactl.data.row_containers import SUFFIXES
from mambactl.data.row_files import is_on_hub, read_rows
from mambactl.data.row_folders import hub_parts
from mambactl.data.row_forms import EXPECTED, Reading, Unread, characters_of, document_of
from mambactl.data.turns import BadRow, Record, Row
from mambactl.errors import UsageError

# how much more of a set on the hub is read than used, so that the shuffled order means something
POOL = 4
CHARACTERS_PER_TOKEN = 4


# takes the columns of a row that are read
Form = Callable[[Reading], Row]


class Document(Row):
    """A checked row; `where` names its file and row, `part` numbers the data set it came from.

    `spec` is the file that it lies in, for a row that was read from one.
    """

    def __init__(self, where: str, row: Record, part: int = 0, spec: str | None = None):
        super().__init__(row)
        self.where, self.part, self.spec = where, part, spec


@console.doing("reading rows of data")
def load_rows(
    specs: Sequence[str],
    max_samples: int | None = None,
    used_rows: int | None = None,
    used_tokens: int | None = None,
    bad: BadRows | None = None,
    form: Form = document_of,
) -> list[Document]:
    """Read and check every data set of `specs`, taking rows from them round-robin.

    Files are read whole. A set on the hub, which may be far larger than what a run sees, is
    streamed until it gave `POOL` times the rows or tokens that are used.

    A spec is a file, a pattern of files, a folder or a hub id `ID[:config][@split]`; a .txt file is
    one document. `row_forms` has the forms of rows. Raises UsageError naming file and row; with
    `bad` a row that holds something else is noted there and left out. `form` takes the columns that
    are read.
    """
    return list(_documents(specs, max_samples, used_rows, used_tokens, bad, Unread(), form))


@console.doing("counting rows of data")
def count_rows(
    specs: Sequence[str], max_samples: int | None = None, form: Form = document_of
) -> int | None:
    """Check files and count their rows; None where a set lies on the hub, which is not asked."""
    found = sum(1 for _ in _documents(specs, max_samples, used_rows=0, unread=None, form=form))
    streamed = [hub_parts(spec) for spec in specs if is_on_hub(spec)]
    return None if streamed else found


def _documents(
    specs: Sequence[str],
    max_samples: int | None,
    used_rows: int | None = None,
    used_tokens: int | None = None,
    bad: BadRows | None = None,
    unread: Unread | None = None,
    form: Form = document_of,
) -> Iterator[Document]:
    if not specs:
        raise UsageError("no data given", f"pass --data FILE with {EXPECTED} per row")
    sources = [
        _pool(_checked(spec, part, bad, unread, form), used_rows, used_tokens)
        if is_on_hub(spec)
        else _checked(spec, part, bad, unread, form)
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
            characters += characters_of(row)
            if characters >= POOL * CHARACTERS_PER_TOKEN * used_tokens:
                return


Item = TypeVar("Item")


def round_robin(sources: Sequence[Iterator[Item]]) -> Iterator[Item]:
    """One item of every source, then the next of each, until all are empty."""
    waiting = list(sources)
    while waiting:
        alive = []
        for source in waiting:
            for row in islice(source, 1):
                yield row
                alive.append(source)
        waiting = alive


def _checked(
    spec: str,
    part: int,
    bad: BadRows | None,
    unread: Unread | None,
    form: Form,
) -> Iterator[Document]:
    found = False
    for where, row, file in read_rows(spec, bad):
        found = True
        try:
            reading = Reading.of(row)
            document = Document(where, form(reading), part, file)
        except BadRow as error:
            cure = error.cure or f"expected {EXPECTED}"
            if bad is not None:
                bad.add(error.kind, where, str(error), cure)
                continue
            raise UsageError(f"{where}: {error}", cure) from None
        if unread is not None:
            unread.see(file, reading)
        yield document
    if not found and not (bad is not None and bad.found):
        raise UsageError(f"{spec} is empty", "give a data set with at least one row")


def set_names(specs: Sequence[str]) -> list[str]:
    """Short names of data sets, or the specs where two would be called the same."""
    short = [set_name(spec) for spec in specs]
    return short if len(set(short)) == len(short) else list(specs)


def set_name(spec: str) -> str:
    """A file's name without what says its kind; other specs are their own name."""
    name = Path(spec).name.removesuffix(".gz")
    return name.rsplit(".", 1)[0] if name.endswith(SUFFIXES) else spec
