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
FILES = ("config.json", "model.safetensors")
# parameters that are logarithms
LOGARITHMS = ("A_log", "dt_bias")
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
    config, kept_config = ((folder / FILES[0]).read_bytes() for folder in (out, KEPT / name))
    assert _settings(config) == _settings(kept_config)
    made, kept = (load_file(folder / FILES[1]) for folder in (out, KEPT / name))
    assert list(made) == list(kept)
    with safe_open(out / FILES[1], "pt") as ours, safe_open(KEPT / name / FILES[1], "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
    for key, tensor in kept.items():
        if name == "fitted":
            # sums are rounded otherwise on other machines, which a fit makes more of
            bound = 1e-4 * float(tensor.abs().max())
            torch.testing.assert_close(made[key], tensor, rtol=0, atol=bound)
        elif key.endswith(LOGARITHMS):
            # their last bit depends on the machine
            torch.testing.assert_close(made[key], tensor, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(made[key], tensor)


def _settings(config: bytes) -> dict:
    """A configuration without its library, and without what names classes: that came later."""
    named = ("architectures", "auto_map", "layer_types", "transformers_version")
    return {key: value for key, value in json.loads(config).items() if key not in named}
