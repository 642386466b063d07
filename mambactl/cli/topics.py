"""Topics of `mambactl docs`: Markdown files of the package, and a reference made from the code."""

from pathlib import Path

from mambactl.commands import COMMANDS
from mambactl.errors import UsageError
from mambactl.files import document_folder, recipe_folder
from mambactl.options.fields import nearest

REFERENCE = "reference"
SUFFIX = ".md"
# guides, then background, in the order of the list; others follow by name
FIRST = (
    *("tutorial", "one-gpu", "eight-gpus", "own-data", "rows", "choosing", "long-context"),
    *("serving", "exporting", "models", "conversion", "training", "measuring", "decoding"),
    *("python", "promises", "glossary", "troubleshooting", "contributing", "changelog"),
)
TITLES = {REFERENCE: "Every command, recipe, exit code and environment variable"}


def topics() -> list[str]:
    """Names of all documents, guides first, then the reference; commands have a page each, too."""
    written = sorted(_files(), key=lambda name: (_rank(name), name))
    return [*written, REFERENCE]


def pages() -> list[str]:
    """Everything that `read` knows: documents, then commands."""
    return [*topics(), *COMMANDS, "recipe"]


def title(topic: str) -> str:
    """The heading of a document."""
    if topic in TITLES:
        return TITLES[topic]
    first, _, _ = read(topic).partition("\n")
    return first.removeprefix("# ")


def read(topic: str) -> str:
    """A document as Markdown; UsageError with the nearest name for an unknown one."""
    if topic in (files := _files()):
        return files[topic].read_text("utf-8")
    if topic not in pages():
        raise UsageError(f"no document {topic!r}", nearest(topic, pages()))
    from mambactl.cli.reference import command_page, reference

    return reference() if topic == REFERENCE else command_page(topic) + "\n"


def contents() -> str:
    """All documents with their headings, as Markdown."""
    lines = [f"- `{topic}`: {title(topic)}" for topic in topics()]
    return "\n".join(
        [
            "# Documents of mambactl",
            "",
            "`mambactl docs TOPIC` shows one; the name of a command shows its options.",
            "",
            *lines,
        ]
    )


def _files() -> dict[str, Path]:
    found = {path.stem: path for path in document_folder().glob(f"*{SUFFIX}")}
    return {**found, "rows": recipe_folder() / f"rows{SUFFIX}"}


def _rank(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST)
