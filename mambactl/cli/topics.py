"""Names of what `mambactl docs` shows: Markdown files of the package, a reference, commands."""

from pathlib import Path

from mambactl.commands import COMMANDS
from mambactl.files import document_folder, recipe_folder

REFERENCE = "reference"
SUFFIX = ".md"
# guides, then background, in the order of the list; others follow by name
FIRST = (
    *("tutorial", "one-gpu", "eight-gpus", "own-data", "rows", "choosing", "long-context"),
    *("serving", "exporting", "models", "conversion", "training", "measuring", "decoding"),
    *("python", "promises", "glossary", "troubleshooting", "contributing", "changelog"),
)


def topics() -> list[str]:
    """Names of all documents: guides first, the reference last."""
    return [*sorted(files(), key=lambda name: (_rank(name), name)), REFERENCE]


def pages() -> list[str]:
    """Everything that can be shown: documents, then commands."""
    return [*topics(), *COMMANDS, "recipe"]


def files() -> dict[str, Path]:
    """The file of every document that is written by hand."""
    found = {path.stem: path for path in document_folder().glob(f"*{SUFFIX}")}
    return {**found, "rows": recipe_folder() / f"rows{SUFFIX}"}


def _rank(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST)
