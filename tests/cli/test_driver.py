"""The GPU's driver: started beside the imports of commands that compute on it, and of no others."""

import ctypes
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from mambactl.cli import driver

WAIT = 60.0
NO_DEVICE = 100


class StandIn:
    """A driver without a GPU; `imported` is set when what runs beside it is through."""

    def __init__(self, code: int = 0):
        self.calls: list[str] = []
        self.imported = Event()
        self.begun = Event()
        self.code = code

    def cuInit(self, flags: int) -> int:
        self.begun.set()
        assert self.imported.wait(WAIT)
        self.calls.append("init")
        return self.code

    def cuDeviceGet(self, device: object, number: int) -> int:
        self.calls.append(f"device {number}")
        return 0

    def cuDevicePrimaryCtxRetain(self, context: object, device: object) -> int:
        self.calls.append("context")
        return 0


def test_the_driver_starts_beside_imports_and_is_awaited(monkeypatch) -> None:
    found = StandIn()
    monkeypatch.setattr(ctypes, "CDLL", {driver.DRIVER: found}.__getitem__)
    with driver.starting(True):
        assert found.begun.wait(WAIT)
        assert found.calls == []
        found.imported.set()
    assert found.calls == ["init", "device 0", "context"]


def test_a_driver_that_fails_is_left_to_torch(monkeypatch, recwarn) -> None:
    found = StandIn(NO_DEVICE)
    found.imported.set()
    monkeypatch.setattr(ctypes, "CDLL", {driver.DRIVER: found}.__getitem__)
    with driver.starting(True):
        pass
    assert found.calls == ["init"]

    def missing(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with driver.starting(True):
        pass
    # pytest turns what ends a thread into a warning
    assert not recwarn.list


def test_an_interrupted_import_does_not_wait_for_the_driver(monkeypatch) -> None:
    found = StandIn()
    monkeypatch.setattr(ctypes, "CDLL", {driver.DRIVER: found}.__getitem__)
    with pytest.raises(KeyboardInterrupt), driver.starting(True):
        raise KeyboardInterrupt
    assert found.calls == []
    found.imported.set()


# command line -> whether its process starts the driver
COMMANDS = {
    ("generate", "t.st", "-p", "hi"): True,
    ("generate", "t.st", "-p", "hi", "--device", "cuda"): True,
    ("chat", "t.st"): True,
    ("serve", "t.st"): True,
    ("spec-decode", "--draft", "ngram", "--target", "t.st"): True,
    ("generate", "t.st", "-p", "hi", "--device", "cpu"): False,
    ("generate", "t.st", "-p", "hi", "--device", "cuda:1"): False,
    ("generate", "t.st", "-p", "hi", "--dry-run"): False,
    ("distill", "t.st", "--data", "rows.jsonl"): False,
    ("convert", "t.st"): False,
}


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_that_start_the_driver(cli, fake_stage, monkeypatch, words) -> None:
    started: list[bool] = []
    monkeypatch.setattr(driver, "_built_for_gpus", lambda: True)
    monkeypatch.setattr(driver, "_start", lambda: started.append(True))
    fake_stage(words[0].replace("-", "_"))
    done = cli(*words)
    assert done.code == 0, done.err
    assert bool(started) is COMMANDS[words]


def test_torch_for_processors_alone_starts_none(monkeypatch, tmp_path: Path) -> None:
    origin = tmp_path / "torch" / "__init__.py"
    monkeypatch.setattr(driver, "find_spec", lambda name: SimpleNamespace(origin=str(origin)))
    assert not driver._built_for_gpus()
    library = origin.parent / "lib" / "libtorch_cuda.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert driver._built_for_gpus()
