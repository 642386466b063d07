"""A training run that ends without a chance to save: its record fails at a line."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from mambactl.checkpoint.run_folder import RunFolder


@contextmanager
def abrupt_stop(when: Callable[[int, Mapping[str, object]], bool]) -> Iterator[None]:
    """Expect the block to fail at the first line for which `when(number, line)` is true."""
    log, count = RunFolder.log, [0]

    def fails(self: RunFolder, line: Mapping[str, object]) -> None:
        if when(count[0], line):
            raise RuntimeError("abrupt")
        count[0] += 1
        log(self, line)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunFolder, "log", fails)
        with pytest.raises(RuntimeError, match="abrupt"):
            yield
