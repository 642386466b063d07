"""`export` never holds a model: peak memory measured on one of half a GB in shards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambactl.checkpoint.load import empty_model
from mambactl.checkpoint.save import CheckpointWriter
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.mamba2 import mamba2_from_attention

CHILD = """
import sys
from pathlib import Path
from mambactl.options import ExportConfig
from mambactl.commands.export import run
def peak():
    # not ru_maxrss, which a child inherits from the process that started it
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
base = peak()
source, folder = sys.argv[1], Path(sys.argv[2])
for to, name in (("transformers", "hf"), ("gguf", "t.gguf")):
    run(ExportConfig(to=to, check=False, max_shard_gb=0.1), source, folder / name)
    print(peak() - base)
"""
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
    shapes = {
        name: (tuple(tensor.shape), torch.bfloat16)
        for name, tensor in empty_model(config).state_dict().items()
        if name != "lm_head.weight"
    }
    # bit patterns of bf16 numbers in [2^-5, 2^-4), so that making them costs little
    noise = torch.randint(0x3D00, 0x3D80, (8 * WIDTH * WIDTH,), dtype=torch.int16)
    with CheckpointWriter(folder, config, {}, None) as writer:
        writer.plan(shapes)
        for name, (shape, _) in shapes.items():
            values = noise[: torch.Size(shape).numel()]
            writer.write(name, values.view(torch.bfloat16).view(shape))
    return sum(2 * torch.Size(shape).numel() for shape, _ in shapes.values())


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
