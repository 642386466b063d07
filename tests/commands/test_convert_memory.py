"""The `convert` stage never holds a model: peak memory measured on one of a GiB in shards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.large_checkpoint import PEAK, write_random

from mambactl.checkpoint.load import open_checkpoint
from mambactl.models.config import HybridConfig

CHILD = (
    PEAK
    + """
from mambactl.options import ConvertConfig
from mambactl.commands.convert import run
base = peak()
source, shard, *outs = sys.argv[1:]
for out in outs:
    run(ConvertConfig(max_shard_gb=int(shard) / 1e9), source, Path(out))
    print(peak() - base)
"""
)
LAYERS, WIDTH, SHARD_BYTES = 36, 1024, 200 << 20


def write_large_llama(folder: Path) -> int:
    """A bf16 Llama of a bit over 1 GiB in several shards; returns the bytes of its tensors."""
    config = HybridConfig(
        vocab_size=4096, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    return write_random(folder, config, SHARD_BYTES)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_memory_does_not_grow_with_the_model(tmp_path) -> None:
    """A checkpoint of 16 GB must fit in one shard plus 1 GiB, so a small one in far less."""
    source, outs = tmp_path / "large", [tmp_path / "out", tmp_path / "out.st"]
    size = write_large_llama(source)
    assert size > 1 << 30 and len(list(source.glob("model-*.safetensors"))) >= 4
    command = [sys.executable, "-c", CHILD, str(source), str(SHARD_BYTES), *map(str, outs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for out, grown in zip(outs, map(int, done.stdout.split()), strict=True):
        # more than the largest tensor, or the measurement is wrong
        assert 8 * WIDTH * WIDTH < grown < SHARD_BYTES + (1 << 30), f"{grown >> 20} MiB"
        assert grown < 0.4 * size, f"{grown >> 20} MiB of {size >> 20}"
        with open_checkpoint(str(out)) as made, open_checkpoint(str(source)) as given:
            mixers = made.config["mixers"]
            assert mixers.count("mamba2_window") == mixers.count("attention") == LAYERS // 2
            last = f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"
            assert torch.equal(made.get(last), given.get(last))
    for file in [outs[1], *source.iterdir(), *outs[0].iterdir()]:
        file.unlink()
