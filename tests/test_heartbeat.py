"""A log that does not fall silent."""

import re
import threading
import time

import pytest

from mambactl import console, heartbeat
from mambactl.console import doing, log, progress, set_verbosity

SILENCE = 0.1


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Silence is a tenth of a second, and the log is that of a command."""
    monkeypatch.setattr(heartbeat, "SILENCE", SILENCE)
    monkeypatch.setattr(heartbeat, "LOOK", SILENCE / 10)
    # of servers that other tests run in this process
    monkeypatch.setitem(console._bars, "open", 0)
    console.stderr.cache_clear()
    set_verbosity(1)
    yield
    set_verbosity(0)
    console.stderr.cache_clear()


def said_of(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_innermost_work_is_named(capsys) -> None:
    with heartbeat.heartbeat("distill"):
        time.sleep(3 * SILENCE)
        with doing("reading rows"), doing(lambda: "tokenising: 3 of 9 rows"):
            time.sleep(3 * SILENCE)
    lines = said_of(capsys)
    assert len(lines) >= 4
    assert all(re.fullmatch(r"still at work: .+?( \(\d+ s\))?", line) for line in lines)
    assert (
        lines[0].startswith("still at work: distill (0 s)")
        and "still at work: tokenising: 3 of 9" in lines[-1]
    )
    time.sleep(2 * SILENCE)
    assert said_of(capsys) == [] and "heartbeat" not in {t.name for t in threading.enumerate()}


def test_work_that_has_just_begun_has_no_seconds(capsys, monkeypatch) -> None:
    monkeypatch.setattr(heartbeat, "LOOK", SILENCE)
    with heartbeat.heartbeat("distill"):
        time.sleep(1.5 * SILENCE)
    assert said_of(capsys) == ["still at work: distill"]


def test_nothing_is_said_where_something_else_is(capsys) -> None:
    with heartbeat.heartbeat("distill"):
        for _ in range(30):
            time.sleep(SILENCE / 10)
            log("a line")
    assert set(said_of(capsys)) == {"a line"}


def test_a_step_that_takes_long_shows_how_far_it_is(capsys) -> None:
    with heartbeat.heartbeat("distill"), progress("align", 200) as task:
        task.advance(3)
        time.sleep(3 * SILENCE)
    assert said_of(capsys)[-1].startswith("still at work: align: 3/200 (")


def test_one_block_in_another_speaks_once(capsys) -> None:
    with heartbeat.heartbeat("outer"), heartbeat.heartbeat("inner"):
        names = [thread.name for thread in threading.enumerate()]
        time.sleep(2.5 * SILENCE)
    assert names.count("heartbeat") == 1
    assert said_of(capsys)[0].startswith("still at work: inner (")


@pytest.mark.parametrize("level", [0, console.SILENT])
def test_a_quiet_command_stays_quiet(capsys, level) -> None:
    set_verbosity(level)
    with heartbeat.heartbeat("distill"):
        time.sleep(3 * SILENCE)
    assert said_of(capsys) == []


def test_a_bar_that_moves_by_itself_needs_no_lines(monkeypatch) -> None:
    monkeypatch.setitem(console._bars, "open", 1)
    monkeypatch.setitem(console._heard, "at", time.monotonic() - 100)
    assert console.silent_since() == 0
    monkeypatch.setitem(console._bars, "open", 0)
    assert console.silent_since() > 99


def test_the_real_interval_is_below_ten_seconds() -> None:
    assert console.PLAIN_INTERVAL < 10


def test_a_failure_ends_it() -> None:
    with pytest.raises(KeyError), heartbeat.heartbeat("distill"):
        raise KeyError
    assert console.activity() == ""
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
