"""The runner notices every kind of broken promise."""

import dataclasses
from collections.abc import Iterator

import pytest
from hostile import runner
from hostile.runner import CommandLine, Sandbox, faults

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
    for name, value in (("CPU_SECONDS", 1), ("WALL_SECONDS", 2), ("MEMORY", 128 << 20),
                        ("ADDRESS_SPACE", 512 << 20)):  # fmt: skip
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
        ("waits", "no end after 2 s"),
        ("waits_in_a_thread", "no end after 2 s"),
        ("grows", "GiB of memory"),
        ("exhausts", "a traceback"),
        ("out_of_memory", "out of memory on a small input"),
        ("crashes", "killed by signal 6"),
    ],
)
def test_a_broken_promise_is_named(found, name, named) -> None:
    assert [fault for fault in found(name) if named in fault]


def test_a_command_that_computes_for_ever(found, monkeypatch) -> None:
    # other work takes the machine's time as well
    monkeypatch.setattr(runner, "WALL_SECONDS", 30)
    assert found("burns") == ["1 s of CPU time"]


def test_codes_that_a_case_asks_for(found) -> None:
    assert found("refuses", codes=frozenset({3})) == []
    assert found("refuses", codes=frozenset({7})) != []
    assert found("nothing", codes=frozenset({3})) != []
