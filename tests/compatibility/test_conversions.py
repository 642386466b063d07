"""Conversions to a state alone give what they gave before there was another default.

`make_conversions.py` says how the kept ones were made.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mambactl.cli.main import run

KEPT = Path(__file__).parent / "fixtures" / "conversions"
TEXT = Path(__file__).parent / "fixtures" / "text.jsonl"
MADE_WITH = json.loads((KEPT / "made-with.json").read_text("utf-8"))
FILES = ("config.json", "model.safetensors")
FIT = f"--calibrate {TEXT} --max-length 32"
# what was made -> ways to ask for it
ASKED = {
    "half": ("--form portable", "--by layer", "--form portable --by layer --mixer mamba2"),
    "all": ("--form portable --ratio 1", "--by layer --ratio 1"),
    "first-kept": ("--keep-attention 0", "--form portable --keep-attention 0"),
    "fitted": (f"--form portable --ratio 1 {FIT}", f"--by layer --ratio 1 {FIT}"),
    "reference": ("--init reference --ratio 1", "--form portable --init reference --ratio 1"),
    "mamba1": ("--mixer mamba1 --ratio 1", "--form portable --mixer mamba1 --ratio 1"),
    "rotary": ("--by layer --ratio 1 --rotary",),
    "window": (
        "--by layer --ratio 1 --window 7 --sinks 3",
        "--form faithful --by layer --ratio 1 --window 7 --sinks 3",
    ),
}
CASES = [(name, options) for name, spellings in ASKED.items() for options in spellings]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_it_makes_what_it_made(name, options, tmp_path) -> None:
    out = tmp_path / "out"
    command = ["convert", str(KEPT / "llama"), *options.split(), "--device", "cpu", "-q"]
    assert run([*command, "-o", str(out)]) == 0
    config, weights = ((out / file).read_bytes() for file in FILES)
    kept_config, kept_weights = ((KEPT / name / file).read_bytes() for file in FILES)
    assert _settings(config) == _settings(kept_config)
    if _as_then() and name != "fitted":
        assert weights == kept_weights
        return
    # on other machines logarithms may end in another bit, and sums of a fit are rounded otherwise
    made, kept = (load_file(folder / FILES[1]) for folder in (out, KEPT / name))
    assert list(made) == list(kept)
    with safe_open(out / FILES[1], "pt") as ours, safe_open(KEPT / name / FILES[1], "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
    for key, tensor in kept.items():
        bound = 1e-4 if name == "fitted" else 1e-6
        torch.testing.assert_close(made[key], tensor, rtol=bound, atol=bound)


def _settings(config: bytes) -> dict:
    """A configuration without its library, and without what names classes: that came later."""
    named = ("architectures", "auto_map", "layer_types", "transformers_version")
    return {key: value for key, value in json.loads(config).items() if key not in named}


def _as_then() -> bool:
    """Whether this machine computes the same elementary functions as the one that made them."""
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    } == MADE_WITH
