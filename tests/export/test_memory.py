"""`export` never holds a model: peak memory measured on one of half a GB in shards."""

import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.large_checkpoint import PEAK, write_random

from mambactl.models.config import HybridConfig
from mambactl.models.mixers.mamba2 import mamba2_from_attention

CHILD = (
    PEAK
    + """
from mambactl.options import ExportConfig
from mambactl.commands.export import run
base = peak()
source, folder = sys.argv[1], Path(sys.argv[2])
for to, name in (("transformers", "hf"), ("gguf", "t.gguf")):
    run(ExportConfig(to=to, check=False, max_shard_gb=0.1), source, folder / name)
    print(peak() - base)
"""
)
LAYERS, WIDTH = 20, 1024


def write_hybrid(folder: Path) -> int:
    """A bf16 hybrid of random weights, half Mamba-2; returns the bytes of its tensors."""
    sizes = {
        "vocab_size": 4096, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    mixer = mamba2_from_attention(HybridConfig(**sizes), proj_bias=False)
    config = HybridConfig(**sizes).with_mixers(["mamba2", "attention"] * 10, mamba2=mixer)
    return write_random(folder, config)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    size = write_hybrid(tmp_path / "source")
    assert size > 480 << 20
    command = [sys.executable, "-c", CHILD, str(tmp_path / "source"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.split()]
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) >= 5
    # a mapped file counts until it is opened again, every 256 MiB
    assert max(peaks) < 400 << 20, [peak >> 20 for peak in peaks]
