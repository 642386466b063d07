"""Names that must not leave this machine: its paths, user and host."""

import getpass
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache

from mambactl.json_values import Json

_SUFFIXES = (
    r"(?:jsonl|json|gz|parquet|txt|csv|ya?ml|st|safetensors|gguf|bin|pt|pth|partial|png|html|py)"
)
_FILE = re.compile(rf"\.{_SUFFIXES}(?:=[\d.]+)?$")
# an id on the hub, of a data set with configuration, split and weight
_HUB_LIKE = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?(?:@[\w./:\[\]%-]+)?(?:=[\d.]+)?")
_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# user and password in an address
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@\"'`]+@")
_ROOT = r"(?:[\w.-]+@[\w.-]+:|file://)?(?:~[\w.-]*[/\\]|/|[A-Za-z]:[/\\]|\\\\)"
_ABSOLUTE = re.compile(rf"{_ROOT}\S")
_SUPERUSER = "root"
_HOME = re.compile(rf"(?:/(?:home|Users)|[A-Za-z]:[/\\]Users)[/\\][^/\\]+[/\\]?|/{_SUPERUSER}/?")
# ends of a path inside of a text
_END = r"\s\"'`,;<>|()\[\]{}"
# two parts at least: </think>, <!-- /results --> and tokens/s are none
_INSIDE = re.compile(
    rf"(?<![\w/.:~<\\-]){_ROOT}[^{_END}/\\]+[/\\][^{_END}]*"
    rf"|(?<![\w/.:~<-])[\w.-]+@[\w.-]+:[/~][^{_END}]*"
    rf"|(?<![\w/.:~<-])(?:\.{{1,2}}|runs|~[\w.-]*)/[^{_END}]+"
    rf"|(?<![\w/.:~<-])[\w.-]+/[^{_END}]*\.{_SUFFIXES}\b"
    # an absolute path as the value of an option, or behind a colon that is no part of a URL
    rf"|(?<=[=:])/(?!/)[^{_END}]+"
)
# names of users and hosts that say nothing, and words of every card
_ORDINARY = {"root", "user", "users", "admin", "ubuntu", "localhost", "mamba", "llama", "model"}
_SHORTEST = 4


def is_local(text: str) -> bool:
    """True if a whole text is a path, of this machine or of another one."""
    if "\n" in text or _URL.match(text):
        return False
    if _ABSOLUTE.match(text) or text.startswith(("./", "../", "runs/", "file:")):
        return True
    if "/" not in text and "\\" not in text:
        return False
    spec = re.sub(r"=[\d.]+$", "", text)
    if " " not in spec and (_FILE.search(text) or os.path.exists(spec)):
        return True
    # `org/name` is an id where no file has that name
    return " " not in text and not _HUB_LIKE.fullmatch(text) and _plain(text)


def _plain(text: str) -> bool:
    return re.fullmatch(r"[\w./\\~=@:+-]+", text) is not None and text.count("/") > 1


def base_name(path: str) -> str:
    """The last part of a path; nothing for a home folder, which is called after its user."""
    if _HOME.fullmatch(path):
        return "~"
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "/"


def local_paths(value: Json) -> Iterator[str]:
    """Every text in a value, keys included, that is a path as a whole."""
    if isinstance(value, str):
        if is_local(value):
            yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from local_paths(key)
            yield from local_paths(each)
    elif isinstance(value, list):
        for each in value:
            yield from local_paths(each)


def without_local_names(value: Json, known: tuple[str, ...] = ()) -> Json:
    """A copy of a value in which paths are base names, and no user, password or host is named.

    `known` are paths to look for inside of texts, where one with spaces is not recognised. Ids and
    addresses of the hub stay.
    """
    if isinstance(value, str):
        return _unnamed(base_name(value) if is_local(value) else _shortened(value, known))
    if isinstance(value, dict):
        return members_without_local_names(value, known)
    if isinstance(value, list):
        return [without_local_names(each, known) for each in value]
    return value


def _shortened(text: str, known: tuple[str, ...]) -> str:
    text = _CREDENTIALS.sub("", text)
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, base_name(path))
    return _INSIDE.sub(lambda found: base_name(found[0]), text)


def _unnamed(text: str) -> str:
    for word in _machine_names():
        # part of a hub id it is a public name
        text = re.sub(rf"(?<![\w/.-]){re.escape(word)}(?![\w/-])", "...", text)
    return text


@cache
def _machine_names() -> tuple[str, ...]:
    host = socket.gethostname()
    names = {host, host.partition(".")[0]}
    # a user may be a number without a name
    with suppress(KeyError, OSError):
        names.add(getpass.getuser())
    found = {name for name in names if len(name) >= _SHORTEST and name.lower() not in _ORDINARY}
    return tuple(sorted(found, key=len, reverse=True))


def members_without_local_names(
    values: Mapping[str, Json], known: tuple[str, ...] = ()
) -> dict[str, Json]:
    """Copy an object without names that must not leave this machine."""
    return {
        str(without_local_names(key, known)): without_local_names(each, known)
        for key, each in values.items()
    }
