"""The next command finishes a stopped one; a file system without exchange included."""

import os
import signal
from pathlib import Path

import pytest

from mambactl.checkpoint import partial_folder, publishing
from mambactl.checkpoint.exchange import exchange, rename_new
from mambactl.checkpoint.partial_folder import DISPOSABLE
from mambactl.checkpoint.publishing import WorkFolder, settle, signals_deferred
from mambactl.errors import OutputError
from mambactl.files import LEDGER, PLOT

MARK = '{"stage": "sft"}'


class Killed(BaseException):
    """Stands for a kill: nothing of our own catches it."""


def checkpoint(path: Path, content: str) -> None:
    """Something that counts as ours, by its name as a folder or as rows."""
    if path.suffix == ".jsonl":
        path.write_text(content)
        return
    path.mkdir()
    (path / "config.json").write_text(content)
    (path / "mambactl.json").write_text(MARK)


def read(path: Path) -> str:
    return (path if path.is_file() else path / "config.json").read_text()


def finished(out: Path, force: bool = False) -> WorkFolder:
    """A run whose result is complete, with a state, a ledger and no plot."""
    work = WorkFolder(out, {"stage": "sft"})
    work.side = (LEDGER, PLOT)
    with work.held():
        work.begin(force)
        (work.path / LEDGER).write_text('{"phase": "sft"}\n')
        (work.path / "state.pt").touch()
        (work.path / "trainer").mkdir()
        checkpoint(work.path / f"x{out.suffix}", "new")
        (work.path / f"x{out.suffix}").rename(work.result)
        work.finish()
    return work


@pytest.fixture(params=["t", "t.jsonl"])
def out(request, tmp_path: Path) -> Path:
    return tmp_path / request.param


@pytest.fixture
def old(out: Path) -> Path:
    """An older result at `out`, its plot beside it."""
    checkpoint(out, "old")
    if out.is_file():
        for name, content in ((PLOT, "old"), (LEDGER, "old"), ("mambactl.json", MARK)):
            out.with_name(f"{out.name}.{name}").write_text(content)
    return out


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_published(out: Path) -> None:
    assert read(out) == "new"
    assert not out.with_name(f"{out.name}.partial").exists()
    assert (out / LEDGER if out.is_dir() else Path(f"{out}.{LEDGER}")).exists()
    assert not (out / PLOT if out.is_dir() else Path(f"{out}.{PLOT}")).exists()


def test_a_complete_result_is_published_with_its_ledger(out: Path) -> None:
    work = finished(out)
    assert work.complete and not work.published and not out.exists()
    settle(out)
    assert work.complete, "publishing is asked for, not done by the way"
    with work.held():
        work.publish()
    check_published(out)


@pytest.mark.parametrize("exchanging", [True, False])
@pytest.mark.parametrize("replaces", [True, False])
def test_after_out_appeared_the_next_command_clears(
    out: Path, request, monkeypatch, exchanging: bool, replaces: bool
) -> None:
    if replaces:
        request.getfixturevalue("old")
    if not exchanging:
        monkeypatch.setattr(publishing, "exchange", lambda *_: False)
    work = finished(out, force=replaces)
    with monkeypatch.context() as patch, pytest.raises(Killed), work.held():
        patch.setattr(WorkFolder, "_clear", lambda _: (_ for _ in ()).throw(Killed))
        work.publish()
    assert read(out) == "new" and work.published and work.path.exists()
    settle(out)
    check_published(out)


def test_without_exchange_a_folder_that_is_replaced_comes_back_or_has_its_successor(
    tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "t"
    checkpoint(out, "old")
    monkeypatch.setattr(publishing, "exchange", lambda *_: False)
    work = finished(out, force=True)
    real, calls = Path.rename, []

    def dies(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            os._exit(9)
        return real(self, target)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(Path, "rename", dies)
        try:
            with work.held():
                work.publish()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not out.exists() and read(work.path / "replaced") == "old"
    settle(out)
    check_published(out)


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "t"
    checkpoint(out, "old")
    monkeypatch.setattr(publishing, "exchange", lambda *_: False)
    work, real = finished(out, force=True), Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self == work.result:
            raise OSError(5, "Input/output error")
        return real(self, target)

    with monkeypatch.context() as patch, work.held():
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OutputError, match="Input/output error"):
            work.publish()
    assert read(out) == "old" and work.complete
    with work.held():
        work.publish()
    check_published(out)


def test_a_ledger_that_cannot_be_moved_stays_where_it_is(tmp_path: Path, capfd) -> None:
    out = tmp_path / "t.jsonl"
    work = finished(out)
    (tmp_path / f"t.jsonl.{LEDGER}" / "full").mkdir(parents=True)
    with work.held(), pytest.raises(OutputError, match="was not written by mambactl"):
        work.publish()
    work.side = ()
    with work.held():
        work.publish()
    assert read(out) == "new" and (work.path / LEDGER).exists()
    assert "is not written" in capfd.readouterr().err
    (tmp_path / f"t.jsonl.{LEDGER}" / "full").rmdir()
    (tmp_path / f"t.jsonl.{LEDGER}").rmdir()
    settle(out)
    check_published(out)


def test_what_appeared_meanwhile_is_not_replaced(out: Path) -> None:
    work = finished(out)
    checkpoint(out, "theirs")
    with work.held(), pytest.raises(OutputError, match="exists already"):
        work.publish()
    assert read(out) == "theirs" and work.complete
    # of somebody who comes between the look and the rename
    with pytest.raises(FileExistsError):
        rename_new(work.result, out)


def test_a_run_that_is_half_discarded_is_neither_resumed_nor_published(
    old: Path, monkeypatch
) -> None:
    work = finished(old, force=True)
    before = names(old.parent)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(partial_folder, "remove", lambda _: (_ for _ in ()).throw(Killed))
        work.discard()
    assert work.disposable and not work.complete and not work.published
    settle(old)
    assert names(old.parent) == before and read(old) == "old"
    with work.held():
        work.discard()
    assert names(old.parent) == before - {work.path.name}


def test_a_run_that_has_only_its_mark_goes_on_where_it_may_replace_out(old: Path) -> None:
    for force in (True, False):
        work = WorkFolder(old, {"stage": "sft"})
        with work.held():
            work.begin(force)
        settle(old)
        assert work.goes_on == work.path.exists() == force
        if force:
            work.discard()


def test_rests_of_nothing_go_where_out_is(old: Path) -> None:
    path = old.with_name(f"{old.name}.partial")
    path.mkdir()
    settle(old)
    assert not path.exists()
    with WorkFolder(old, DISPOSABLE).held():
        assert path.exists()
    settle(old.with_name("other"))


def test_a_signal_waits_until_the_block_is_done() -> None:
    done = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, lambda *_: done.append("delivered"))
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("block")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done == ["block", "delivered"]


@pytest.mark.parametrize("made", [("file", "file"), ("folder", "folder"), ("file", "folder")])
def test_names_are_exchanged_in_one_step(tmp_path: Path, made: tuple[str, str]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path, kind in zip((one, other), made, strict=True):
        path.write_text(path.name) if kind == "file" else path.mkdir()
    inodes = one.lstat().st_ino, other.lstat().st_ino
    if not exchange(one, other):
        pytest.skip("this file system exchanges no names")
    assert (other.lstat().st_ino, one.lstat().st_ino) == inodes
    with pytest.raises(FileNotFoundError):
        exchange(one, tmp_path / "none")
