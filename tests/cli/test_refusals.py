"""Refusals of the real stages up front, with a code and without a traceback."""

import json
import shutil
from pathlib import Path

import pytest
import torch


@pytest.fixture
def llama(tiny_llama_dir: Path, tmp_path: Path) -> str:
    """A private copy that a test may damage."""
    return str(shutil.copytree(tiny_llama_dir, tmp_path / "llama"))


@pytest.mark.parametrize("command", [("convert",), ("bench",), ("generate", "-p", "the king")])
@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_unknown_devices(cli, llama, command, device) -> None:
    name, *rest = command
    for more in ([], ["--dry-run"]):
        done = cli(name, llama, *rest, *more, "--device", device)
        assert (done.code, done.out) == (2, ""), done.err
        assert f"unknown device {device!r}" in done.err
        assert "Traceback" not in done.err


def test_mps_is_refused_with_the_reason(cli, llama, monkeypatch) -> None:
    for available in (False, True):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=available: found)
        done = cli("convert", llama, "--device", "mps")
        assert (done.code, done.out) == (2, "")
        assert "MPS computes no float64, which the kernels sum in" in done.err
        assert "hint: use --device cpu" in done.err
        # and nobody gets it without asking
        assert ("not used: MPS computes" in cli("doctor", "--deep").out) is available


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_convert_asked_for_a_device_that_is_not_there(cli, llama) -> None:
    assert cli("convert", llama, "--device", "cuda").code == 6


@pytest.mark.parametrize("command", [("convert",), ("bench",), ("inspect",)])
def test_a_name_that_no_file_can_have(cli, command) -> None:
    done = cli(*command, "x" * 300)
    assert (done.code, done.out) == (3, "")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("file", "content", "command"),
    [
        ("config.json", b"\xff", ("convert",)),
        ("config.json", b"\xff", ("inspect",)),
        ("tokenizer.json", b"{}", ("generate", "-p", "the king")),
        ("tokenizer_config.json", b"{", ("generate", "-p", "the king")),
        ("generation_config.json", b"{", ("bench",)),
    ],
)
def test_damaged_files_are_named(cli, llama, file, content, command) -> None:
    (Path(llama) / file).write_bytes(content)
    name, *rest = command
    done = cli(name, llama, *rest)
    assert (done.code, done.out) == (3, "")
    assert file in done.err and "Traceback" not in done.err


def test_a_teacher_that_moved_is_called_the_teacher(cli, llama, tmp_path) -> None:
    assert cli("convert", llama, "-o", "t.st").code == 0
    shutil.move(llama, tmp_path / "elsewhere")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the old king went to the river"}))
    done = cli("eval", "t.st", "--data", "text.jsonl")
    assert done.code == 3
    assert "the teacher cannot be found" in done.err and "--teacher MODEL" in done.err


@pytest.mark.parametrize(
    "option", [("sft", "--lr"), ("dpo", "--beta"), ("generate", "--temperature")]
)
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_number_is_finite(cli, llama, option, value) -> None:
    command, flag = option
    done = cli(command, llama, flag, value, "--dry-run")
    assert (done.code, done.out) == (2, "")
    assert f"{flag[2:]}: input should be a finite number (got {value})" in done.err


def test_a_temperature_is_0_or_warm_enough(cli, llama) -> None:
    for value in ("1e-39", "0.0001", "-1"):
        done = cli("generate", llama, "-p", "the king", "--temperature", value, "--dry-run")
        assert (done.code, done.out) == (2, "")
        assert "temperature: 0 is greedy" in done.err
