"""The working folder of a run: one process at a time, and what a disk refuses."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.errors import OutputError, ResourceError

IDENTITY = {"stage": "distill"}
AT_WORK = """
import sys
from pathlib import Path
from mambactl.checkpoint.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]), {"stage": "distill"})
with folder.open(False, False):
    folder.save_state({"step": 1})
    print("saved", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("out", ["folder", "one.st"])
def test_one_process_at_a_time(out: str, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", AT_WORK, str(tmp_path / out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = RunFolder(tmp_path / out, IDENTITY)
    try:
        assert child.stdout.readline() == "saved\n"
        for resume, force in [(True, False), (False, True), (False, False)]:
            with pytest.raises(OutputError, match="another process is writing"):
                folder.check(resume, force)
            with (
                pytest.raises(OutputError, match="another process is writing"),
                folder.open(resume, force),
            ):
                pass
        assert folder.load_state() == {"step": 1}
    finally:
        child.kill()
        child.communicate()
    with folder.open(True, False):
        assert folder.load_state() == {"step": 1}


def test_a_result_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", IDENTITY)
    folder.check(False, False)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"), folder.open(False, False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_discards_what_lies_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "one.st", IDENTITY)
    with folder.open(False, True):
        folder.save_state({"step": 1})
    with folder.open(False, True):
        assert folder.load_state() is None


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", IDENTITY)
    folder.path.mkdir()
    with folder.open(False, False):
        assert (folder.path / "run.json").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a place where nobody may write")
@pytest.mark.parametrize("out", ["/proc/x.st", "/proc/a/b/x"])
def test_a_place_that_cannot_be_written_is_refused_early(out: str) -> None:
    with pytest.raises(OutputError, match="cannot write .*/x.*partial"):
        RunFolder(Path(out), IDENTITY).check(False, False)


def test_check_leaves_no_trace(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "out", IDENTITY).check(False, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EFBIG, ResourceError),
        (errno.EROFS, OutputError),
        (errno.EACCES, OutputError),
    ],
)
def test_a_failed_save_keeps_the_former_state_and_no_rest(
    number: int, kind: type, monkeypatch, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "out", IDENTITY)

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with folder.open(False, False):
        folder.save_state({"step": 1})
        with monkeypatch.context() as patch, pytest.raises(kind) as caught:
            patch.setattr(torch, "save", fails)
            folder.save_state({"step": 2})
        assert folder.load_state() == {"step": 1}
        assert sorted(path.name for path in folder.path.iterdir()) == ["run.json", "state.pt"]
    assert ("free some disk space" in caught.value.hint) == (kind is ResourceError)


LIMITED = """
import resource, sys, torch
from pathlib import Path
from mambactl.errors import ResourceError
from mambactl.checkpoint.run_folder import RunFolder
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
folder = RunFolder(Path(sys.argv[1]), {"stage": "sft"})
try:
    with folder.open(False, False):
        folder.save_state({"step": 1})
        folder.save_state({"weights": torch.zeros(1 << 20)})
except ResourceError:
    print(sorted(path.name for path in folder.path.iterdir()))
"""


def test_the_kernel_refuses_in_the_middle_of_a_state(tmp_path: Path) -> None:
    """As on a full disk, which torch reports in its own way."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['run.json', 'state.pt']\n"


def test_a_torn_state_names_its_file_and_what_to_do(tmp_path) -> None:
    folder = RunFolder(tmp_path / "out", {"stage": "x"})
    with folder.open(resume=False, force=False):
        folder.save_state({"step": 3, "weights": torch.ones(100)})
    state = folder.path / "state.pt"
    whole = state.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\x80" * 50, b"no archive at all"):
        state.write_bytes(damaged)
        with pytest.raises(OutputError, match="state.pt cannot be used") as caught:
            folder.load_state()
        assert "--force" in caught.value.hint


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"\xff\xfe", b"[1]", b"{}", b"[" * 10**5])
def test_the_log_ends_where_it_is_damaged(tmp_path, line) -> None:
    folder = RunFolder(tmp_path / "out", {"stage": "x"})
    with folder.open(resume=False, force=False):
        folder.save_state({})
        folder.log({"step": 1})
        with folder.metrics.open("ab") as file:
            file.write(line + b"\n" + b'{"step": 3}\n')
        assert folder.read_log() == [{"step": 1}]
