"""Work that is driven from outside: one item at a time, errors where they are read, and an end."""

import gc
import subprocess
import sys
import threading

import pytest

from mambactl.generation.on_demand import on_demand


def counting(seen: list[int], end: int = 1000):
    def work(listen) -> None:
        for number in range(end):
            seen.append(number)
            if listen(number):
                seen.append(-1)
                return

    return work


def test_items_arrive_in_order_and_work_waits_between_them() -> None:
    seen: list[int] = []
    items = on_demand(counting(seen, 3))
    assert seen == []
    assert next(items) == 0 and seen == [0]
    assert next(items) == 1 and seen == [0, 1]
    assert list(items) == [2] and seen == [0, 1, 2]


def test_closing_ends_the_work() -> None:
    seen: list[int] = []
    items = on_demand(counting(seen))
    next(items)
    items.close()
    assert seen == [0, -1]
    assert not any(thread.name == "on_demand" for thread in threading.enumerate())


def test_a_generator_that_nobody_holds_ends_the_work() -> None:
    seen: list[int] = []
    for number in on_demand(counting(seen)):
        if number == 2:
            break
    gc.collect()
    assert seen == [0, 1, 2, -1]


def test_an_error_of_the_work_is_raised_by_the_generator() -> None:
    def work(listen) -> None:
        listen(1)
        raise KeyError("broken")

    items = on_demand(work)
    assert next(items) == 1
    with pytest.raises(KeyError, match="broken"):
        next(items)


def test_a_program_may_end_with_items_unread() -> None:
    code = (
        "from mambactl.generation.on_demand import on_demand\n"
        "items = on_demand(lambda listen: [listen(n) for n in range(10)])\n"
        "assert next(items) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
