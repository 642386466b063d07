"""Make the checkpoints that later versions must still make where asked for that form.

They come from commit 292ce5c, the last one without forms: a state alone, by layer, was what it
made, and windows in whole layers with --window. To make others:

    git worktree add ../old 292ce5c
    OMP_NUM_THREADS=1 PYTHONPATH=../old python tests/compatibility/make_conversions.py NEW_FOLDER
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tiny_inputs import write_llama

TEXT = Path(__file__).parent / "fixtures" / "text.jsonl"
# what a conversion is kept in
FILES = ("config.json", "model.safetensors")
# name -> options as that version spelled them
CONVERSIONS: dict[str, tuple[str, ...]] = {
    "half": (),
    "all": ("--ratio", "1"),
    "first-kept": ("--keep-attention", "0"),
    "fitted": ("--ratio", "1", "--calibrate", "text.jsonl", "--max-length", "32"),
    "reference": ("--ratio", "1", "--init", "reference"),
    "mamba1": ("--ratio", "1", "--mixer", "mamba1"),
    "rotary": ("--ratio", "1", "--rotary"),
    "window": ("--ratio", "1", "--window", "7", "--sinks", "3"),
}


def main() -> None:
    """Make the source and every conversion of it in the folder that is named."""
    from mambactl.cli.main import run

    target = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        shutil.copy(TEXT, "text.jsonl")
        write_llama(Path("llama"), seed=16, heads=2, head_dim=16)
        for name, options in CONVERSIONS.items():
            if run(["convert", "llama", *options, "--device", "cpu", "-o", name]) != 0:
                raise SystemExit(f"{name} could not be made")
            (target / name).mkdir(parents=True)
            for file in FILES:
                shutil.copy(Path(name) / file, target / name / file)
        shutil.copytree("llama", target / "llama")


if __name__ == "__main__":
    main()
