"""Batches of one data set, dealt to the processes of a run one by one, to whoever is free.

Answers end at any length: batches that were counted off in advance would leave the process with
the short ones idle. A number in the run's store is all that has to be shared for it.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from itertools import count
from typing import cast

from mambactl.errors import UsageError
from mambactl.json_values import JsonObject
from mambactl.present import present
from mambactl.ranks import is_main, processes, rank, store

# seconds between two looks at the store; blocking calls of it would hear no signal
POLL = 0.05
# bytes of a value in the store, which takes 8 MiB
PART = 1 << 22


class Deal:
    """Shared counters of a run's processes: facts to agree on, the next batch, answers done.

    One process makes no store. All of them make their deals in the same order.
    """

    def __init__(self) -> None:
        self.store = store() if processes() > 1 else None
        self._done = 0

    def agreed(self, name: str, value: JsonObject) -> JsonObject:
        """The main process's value, on every process."""
        if self.store is None:
            return value
        if is_main():
            self.store.set(name, json.dumps(value))
            return value
        self._await(name)
        return json.loads(self.store.get(name))

    def day(self, found: date | None) -> date | None:
        """The day on which the main process says that the run began."""
        shown = self.agreed("day", {"day": found and found.isoformat()})["day"]
        return None if shown is None else date.fromisoformat(shown)

    def left(self, run: str, found: Sequence[int]) -> list[int]:
        """Numbers of the batches that are left, as the main process found them.

        Raises UsageError in a process whose `run`, a digest of all that decides it, is another.
        """
        begun = self.agreed("begun", {"run": run, "left": list(found)})
        if begun["run"] != run:
            raise UsageError(
                f"process {rank()} of the run reads other rows or another model than the first one",
                "every process needs the same files",
            )
        return begun["left"]

    def numbers(self, left: Sequence[int]) -> Iterator[int]:
        """Batches for this process, of those that are left: the next one when it asks for it."""
        for index in count():
            if self.store is not None:
                index = self.store.add("claimed", 1) - 1
            if index >= len(left):
                return
            yield left[index]

    def done(self, more: int = 0) -> int:
        """Count `more` as done by this process; returns what all have done since its last call."""
        before = self._done
        self._done = before + more if self.store is None else self.store.add("done", more)
        return self._done - before

    def put(self, name: str, body: bytes) -> None:
        """Leave bytes for the other processes."""
        store, parts = present(self.store), -(-len(body) // PART)
        for part in range(parts):
            # it takes bytes as it takes texts, and its types do not say so
            store.set(f"{name}/{part}", cast(str, body[part * PART : (part + 1) * PART]))
        store.set(name, str(parts))

    def get(self, name: str, meanwhile: Callable[[], None] = lambda: None) -> bytes:
        """Bytes that another process left, once they are there; the last reader clears them."""
        self._await(name, meanwhile)
        store = present(self.store)
        names = [f"{name}/{part}" for part in range(int(store.get(name)))]
        body = b"".join(map(store.get, names))
        if store.add(f"{name}/read", 1) == processes() - 1:
            for each in (*names, name):
                store.delete_key(each)
        return body

    def _await(self, name: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        while not present(self.store).check([name]):
            meanwhile()
            time.sleep(POLL)

    def leave(self) -> None:
        """Say that this process has done its part; it asks the store for nothing any more."""
        if self.store is not None and not is_main():
            self.store.add("left", 1)

    def others(self) -> Iterator[None]:
        """Looks of the main process at the others until all have left: it holds the store.

        The launcher ends a run of which a process failed.
        """
        # others ask for nothing any more: the main process may be gone
        waits = self.store is not None and is_main()
        while waits and present(self.store).add("left", 0) < processes() - 1:
            yield
            time.sleep(POLL)
