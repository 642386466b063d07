"""Files: one writer at a time, failures of the disk as sentences, and those of the package."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mambactl.errors import OutputError, ResourceError

# what a training run writes first into the folder it keeps its state in
RUN_FILE = "run.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


@contextmanager
def explained(
    place: Path, full: str, refused: str = "choose another place with -o"
) -> Iterator[None]:
    """Turn an OSError into ResourceError with hint `full` on a full disk, else into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(f"the disk is full while writing {place}", full) from error
        raise OutputError(f"cannot write {place}: {error.strerror or error}", refused) from error


def recipe_folder() -> Path:
    """Return the folder of the recipes that come with the package."""
    installed = Path(__file__).parent / "_recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def gib(size: float) -> str:
    """A size for people: GiB, or MiB where that would be next to nothing."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
