"""What a report is made of: files that are named, and those that lie beside checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mambactl.checkpoint.source import LEDGER, SINGLE_FILE_SUFFIXES
from mambactl.errors import UsageError
from mambactl.report.entries import (
    Entry,
    Found,
    Ledger,
    ledger_of,
    read_entries,
)
from mambactl.report.naming import named_apart

RESULTS = "results"
CHANGED = "the checkpoint has changed since this was measured"


def collect(paths: Sequence[Path], digest_of: Callable[[Path], str] | None = None) -> Found:
    """Read results (.json), ledgers (.jsonl), folders of results, and checkpoints with what is kept
    beside them.

    What lies beside a checkpoint is about that one, wherever it was when it was measured.
    `digest_of` a checkpoint tells whether results beside it are about what it holds now; those of
    another state are marked. Raises UsageError for a path that holds nothing.
    """
    entries: list[Entry] = []
    ledgers: list[Ledger] = []
    read: set[Path] = set()
    for path in dict.fromkeys(paths):
        files = [path] if path.suffix in (".json", ".jsonl") else kept_beside(path)
        if not files:
            raise UsageError(
                f"nothing measured is kept beside {path}",
                "give a results .json, a metrics.jsonl, or a checkpoint that was evaluated",
            )
        for file in files:
            # a checkpoint and its folder of results, say
            if file.resolve() in read:
                continue
            read.add(file.resolve())
            if file.suffix == ".jsonl":
                ledgers.append(ledger_of(file))
                continue
            found = list(read_entries(file))
            if not found and file == path:
                raise UsageError(
                    f"{file} holds no measurement", "give what eval, bench or spec-decode wrote"
                )
            checkpoint = None if file == path or _holds_results(path) else path
            entries += [
                _placed(entry, _owner(entry, file, checkpoint), digest_of) for entry in found
            ]
    return named_apart(Found(entries, ledgers))


def _owner(entry: Entry, file: Path, checkpoint: Path | None) -> Path | None:
    """The checkpoint that results lie beside.

    Without `checkpoint`, only where the name of the folder says whose results it holds.
    """
    if checkpoint is not None or not _holds_results(file.parent):
        return checkpoint
    folder, measured = file.parent, str(entry.about.get("checkpoint") or "")
    owner = folder.parent
    if folder.name != RESULTS:
        owner = folder.with_name(folder.name.removesuffix(f".{RESULTS}"))
    # a page has such a folder too, with results of many models
    known = owner.name == Path(measured).name or owner.suffix in SINGLE_FILE_SUFFIXES
    return owner if measured and known else None


def _placed(entry: Entry, owner: Path | None, digest_of: Callable[[Path], str] | None) -> Entry:
    """The entry under the name of its owner, marked where that has changed."""
    if owner is None:
        return entry
    if entry.about.get("checkpoint"):
        entry = replace(entry, model=str(owner))
    if digest_of is None or not owner.exists():
        return entry
    return _marked(entry, digest_of(owner))


def _holds_results(path: Path) -> bool:
    """Whether a path is called as the folder of a checkpoint's results."""
    return path.name == RESULTS or path.name.endswith(f".{RESULTS}")


def _marked(entry: Entry, digest: str) -> Entry:
    measured = dict(entry.source.details).get("digest", digest)
    if measured == digest:
        return entry
    details = (*entry.source.details, ("attention", CHANGED))
    return replace(entry, source=replace(entry.source, details=details))


def kept_beside(checkpoint: Path) -> list[Path]:
    """Results and ledger of a folder or a single file, or what a folder of results holds."""
    if _holds_results(checkpoint):
        return sorted(checkpoint.glob("*.json"))
    results = [checkpoint / RESULTS, checkpoint.with_name(f"{checkpoint.name}.{RESULTS}")]
    ledgers = [checkpoint / LEDGER, checkpoint.with_name(f"{checkpoint.name}.{LEDGER}")]
    found = [file for folder in results for file in sorted(folder.glob("*.json"))]
    return found + [file for file in ledgers if file.is_file()]
