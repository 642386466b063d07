"""The runner notices every kind of broken promise."""

import dataclasses
from collections.abc import Iterator

import pytest
from hostile import runner
from hostile.runner import CommandLine, Sandbox, faults

LIMITS = {
    "CPU_SECONDS": 1,
    "WALL_SECONDS": 30,
    "IDLE_SECONDS": 1,
    "MEMORY": 128 << 20,
    "ADDRESS_SPACE": 512 << 20,
}
COMMAND = CommandLine(("convert", "model"))


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Iterator[Sandbox]:
    """A sandbox whose commands are forked from a process without libraries."""
    box = Sandbox(tmp_path_factory.mktemp("misbehaviour").resolve(), libraries=False)
    yield box
    box.close()


@pytest.fixture
def found(box, monkeypatch):
    """found("burns") -> the faults of a command of that name."""
    for name, value in LIMITS.items():
        monkeypatch.setattr(runner, name, value)

    def find(name: str, **fields: object) -> list[str]:
        box.empty()
        (box.work / "input").write_text("x")
        command = dataclasses.replace(COMMAND, **fields)
        return faults(command, box.run(command, f"hostile.misbehaviour:{name}"), box.root)

    return find


@pytest.mark.parametrize("name", ["nothing", "refuses", "writes_to_out"])
def test_what_keeps_its_promises_passes(found, name) -> None:
    assert found(name) == []


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("raises", "a traceback"),
        ("raises", "exit code 1"),
        ("two_errors", "2 messages"),
        ("silent", "0 messages"),
        ("fails_with_output", "text on stdout"),
        ("unknown_code", "exit code 9"),
        ("two_lines", "more than one line"),
        ("escapes", "control character"),
        ("writes_upwards", "'outside' was changed"),
        ("changes_an_input", "'work/input' was changed"),
        ("writes_at_home", "'home/settings' was changed"),
        ("runs_code", "code of an input ran"),
        ("burns", "1 s of CPU time"),
        ("waits", "waits for ever"),
        ("waits_in_a_thread", "waits for ever"),
        ("waits_for_a_child", "waits for ever"),
        ("grows", "GiB of memory"),
        ("exhausts", "a traceback"),
        ("out_of_memory", "out of memory on a small input"),
        ("crashes", "killed by signal 6"),
    ],
)
def test_a_broken_promise_is_named(found, name, named) -> None:
    assert [fault for fault in found(name) if named in fault]


def test_a_command_that_goes_on_for_ever(found, monkeypatch) -> None:
    monkeypatch.setattr(runner, "WALL_SECONDS", 1)
    assert found("dawdles") == ["no end after 1 s"]


def test_codes_that_a_case_asks_for(found) -> None:
    assert found("refuses", codes=frozenset({3})) == []
    assert found("refuses", codes=frozenset({7})) != []
    assert found("nothing", codes=frozenset({3})) != []
