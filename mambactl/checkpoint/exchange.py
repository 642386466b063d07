"""Renames that Python's os lacks: two paths that trade names, and one that replaces nothing."""

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import NamedTuple


class _Call(NamedTuple):
    """A function of the C library, the number that means the working directory, and flags."""

    name: str
    here: int
    exclusive: int
    exchange: int


_CALLS = {"linux": _Call("renameat2", -100, 1, 2), "darwin": _Call("renameatx_np", -2, 4, 2)}
# what a system, a file system or a sandbox without such renames answers
_UNKNOWN = {
    *(errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM),
    # of folders in an overlay
    errno.EXDEV,
}


def exchange(one: Path, other: Path) -> bool:
    """Let two paths trade what they name, in one step; False where the system cannot do that."""
    call = _CALLS.get(sys.platform)
    return call is not None and _rename(call, one, other, call.exchange)


def rename_new(source: Path, target: Path) -> None:
    """Rename; raises FileExistsError where `target` exists, also if it has just appeared."""
    call = _CALLS.get(sys.platform)
    if call is not None and _rename(call, source, target, call.exclusive):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def _rename(call: _Call, source: Path, target: Path, flag: int) -> bool:
    """Call the function; False where it is not known here, OSError where it fails."""
    function = getattr(ctypes.CDLL(None, use_errno=True), call.name, None)
    if function is None:
        return False
    # as os.rename announces itself to audit hooks
    sys.audit("os.rename", str(source), str(target), -1, -1)
    paths = os.fsencode(source), os.fsencode(target)
    if function(call.here, paths[0], call.here, paths[1], flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))
