"""Upload to the hub: one commit of what differs, and sentences for what can fail."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING

from mambactl import console
from mambactl.checkpoint.hub_files import WEIGHTS
from mambactl.checkpoint.hub_refusals import AGAIN, log_in, refusal, status_of
from mambactl.checkpoint.resolve import hub_forbidden
from mambactl.errors import MambactlError, ResourceError, UsageError
from mambactl.foreign import reason
from mambactl.json_values import JsonObject

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, RepoFile
    from huggingface_hub.errors import HfHubHTTPError

Content = Path | bytes

_AGAIN = f"{AGAIN}: what has arrived is not sent twice"
# seconds between looks whether an upload has ended
_WAIT = 0.2
# another commit came first
_CONFLICTS = (409, 412)
# of front matter, what a model inherits from the one it was made from
INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Sent:
    """Result of an upload: names of the files sent and removed, and the number of bytes sent."""

    files: tuple[str, ...]
    removed: tuple[str, ...]
    size: int


def require_name(repo: str) -> None:
    """Raise UsageError for what is no `org/name` on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    hint = "give org/name, of letters, digits, -, _ and ., such as my-org/my-model"
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UsageError(f"{repo!r} is no name on the hub", hint)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no name on the hub", hint) from error


def require_hub() -> None:
    """Raise ResourceError where the hub may not be asked, or nobody is logged in."""
    from huggingface_hub import constants, get_token

    if hub_forbidden() or constants.HF_HUB_OFFLINE:
        raise ResourceError("HF_HUB_OFFLINE is set, and push needs the hub", "unset HF_HUB_OFFLINE")
    with _explained("the hub"):
        token = get_token()
    if not token:
        raise ResourceError("push needs a token of the hub, and there is none", log_in("write"))


def inherited_from(base: str | None) -> JsonObject:
    """Licence and languages of a model on the hub; empty, with a warning, where it does not say."""
    from huggingface_hub import HfApi

    if base is None:
        return {}
    try:
        with _explained(base):
            front = HfApi().model_info(base).card_data
    except MambactlError as error:
        console.warn(f"the card names no licence of {base}: {error}")
        return {}
    values = {} if front is None else front.to_dict()
    return {key: values[key] for key in INHERITED if values.get(key) is not None}


def upload(repo: str, files: Mapping[str, Content], public: bool, message: str) -> Sent:
    """Make `repo` hold these files, in one commit or none; weights of earlier pushes go.

    Raises ResourceError for a refusal of the hub and for a connection that fails, UsageError for a
    public repository that was not asked for.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _explained(repo):
        head = _repository(api, repo, public)
        there = _tree(api, repo) if head else {}
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        changed = _changed(added, there)
        stale = [
            name
            for name in there
            if name not in files and any(fnmatch(name, pattern) for pattern in WEIGHTS)
        ]
        size = sum(each.upload_info.size for each in changed)
        names = tuple(each.path_in_repo for each in changed)
        if changed or stale:
            removing = [CommitOperationDelete(name) for name in stale]
            _said(names, stale, size)
            operations = [*changed, *removing]
            _interruptible(
                lambda: api.create_commit(
                    repo, operations, commit_message=message, parent_commit=head
                )
            )
    return Sent(names, tuple(stale), size)


def _interruptible(work: Callable[[], object]) -> None:
    """Run `work` in a thread of its own, which a signal does not wait for.

    huggingface_hub waits for every upload that it began, which may take hours.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    thread = threading.Thread(target=run, name="upload", daemon=True)
    thread.start()
    while thread.is_alive():
        # a signal that comes just before a wait begins does not end it
        thread.join(_WAIT)
    done.result()


def _said(names: Sequence[str], stale: Sequence[str], size: int) -> None:
    console.log(f"sending {len(names)} files, {size:,} bytes")
    if stale:
        console.log(f"removing weights of an earlier push: {', '.join(stale)}")


def _repository(api: "HfApi", repo: str, public: bool) -> str | None:
    """The newest commit of the repository, which is made if need be; None where it is new."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(repo)
    except RepositoryNotFoundError as error:
        # what is no 404 is a refusal
        if error.response.status_code != 404:
            raise
        api.create_repo(repo, private=not public, exist_ok=True)
        return None
    if not found.private and not public:
        raise UsageError(f"{repo} is there and public", "add --public, or make it private first")
    if found.private and public:
        console.warn(f"{repo} is there and private, and stays so: its settings can change that")
    return found.sha


def _tree(api: "HfApi", repo: str) -> dict[str, "RepoFile"]:
    """The files at the top of the repository."""
    from huggingface_hub import RepoFile

    return {each.path: each for each in api.list_repo_tree(repo) if isinstance(each, RepoFile)}


def _changed(
    added: "Sequence[CommitOperationAdd]", there: "Mapping[str, RepoFile]"
) -> "list[CommitOperationAdd]":
    """Files whose content the repository does not hold."""
    if not there:
        return list(added)
    found = []
    with console.progress("compare", sum(each.upload_info.size for each in added)) as task:
        for each in added:
            if not _same(each, there.get(each.path_in_repo)):
                found.append(each)
            task.advance(each.upload_info.size)
    return found


def _same(local: "CommitOperationAdd", remote: "RepoFile | None") -> bool:
    """True if the remote file has the same content; hashes the local one only if sizes match."""
    from huggingface_hub.utils.sha import git_hash

    if remote is None or remote.size != local.upload_info.size:
        return False
    if remote.lfs is not None:
        return local.upload_info.sha256.hex() == remote.lfs.sha256
    with local.as_file() as file:
        return git_hash(file.read()) == remote.blob_id


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn failures of the hub and of the connection into ResourceError."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except MambactlError:
        raise
    except Exception as error:
        if not _raised_by_hub(error):
            raise
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        for each in (error, cause):
            if isinstance(each, HfHubHTTPError):
                raise _refused(repo, each) from error
        message = f"the upload to {repo} failed ({type(cause).__name__}: {reason(cause)})"
        raise ResourceError(message, _AGAIN) from error


def _raised_by_hub(error: Exception) -> bool:
    """True if huggingface_hub, or a library below it, raised the error."""
    files = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
    return any("huggingface_hub" in file for file in files)


def _refused(repo: str, error: "HfHubHTTPError") -> ResourceError:
    status = status_of(error)
    if status in _CONFLICTS:
        message, hint = f"{repo} was changed by somebody else at the same time", _AGAIN
    else:
        message, hint = refusal(status, repo, "write")
    return ResourceError(f"{message} (HTTP {status}: {reason(error)})", hint)
