"""The origin of a checkpoint: kept as it was given, recognised by what lies there."""

import json
import shutil
from pathlib import Path

import pytest

from mambactl.checkpoint import resolve


@pytest.mark.parametrize("given", ["smollm2-135m", "~/llama", "./llama"])
def test_a_finished_conversion_is_done_for_resume(
    cli, tiny_llama_dir: Path, tmp_path: Path, monkeypatch, given: str
) -> None:
    home = tmp_path / "llama"
    shutil.copytree(tiny_llama_dir, home)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(resolve, "kept_embedded", lambda: home)
    command = ["convert", given, "-o", "c", "--ratio", "0.5", "--init", "reference"]
    assert cli(*command).code == 0
    made = json.loads((tmp_path / "c" / "mambactl.json").read_text())
    named = given if given in ("smollm2-135m",) else str(home)
    assert made["source"] == made["parent"]["path"] == named
    again = cli(*command, "--resume")
    assert again.code == 0, again.err
    assert "nothing to do" in again.err

    # other weights of the same shapes are another parent
    weights = home / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other = cli(*command, "--resume")
    assert other.code == 5
    assert "made differently: parent" in other.err
