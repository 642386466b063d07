"""Whole and tiny inputs that are damaged: a checkpoint of every format, and data for commands."""

import gzip
import json
import shutil
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "compatibility" / "fixtures"
# by what they are: the name in the folder where commands run
MODELS = {
    "llama": "model",
    "sharded": "model",
    "single file": "model.st",
    "ours": "model",
    "windows": "model",
    "pickled": "model",
    "gguf": "model.gguf",
    "state-spaces": "model",
    "two mixers": "model.st",
}
DATA = ("text.jsonl", "held-out.jsonl", "chats.jsonl", "pairs.jsonl")


def make_inputs(folder: Path) -> None:
    """A folder of every starting point, and one of data."""
    data = folder / "data"
    data.mkdir()
    for name in DATA:
        shutil.copy(FIXTURES / name, data)
    (data / "prompts.txt").write_text("the river\na stone house\n")
    makers = {
        "llama": lambda path: shutil.copytree(FIXTURES / "llama", path),
        "sharded": _sharded,
        "single file": lambda path: _unpacked("mamba2.st.gz", path),
        "ours": lambda path: shutil.copytree(FIXTURES / "converted", path),
        "windows": lambda path: shutil.copytree(FIXTURES / "mamba2_window", path),
        "pickled": _pickled,
        "gguf": _gguf,
        "state-spaces": _state_spaces,
        "two mixers": lambda path: _unpacked("mamba1_and_mamba2.st.gz", path),
    }
    for kind, name in MODELS.items():
        (folder / kind).mkdir()
        makers[kind](folder / kind / name)
        # the teacher that lineages name
        shutil.copytree(FIXTURES / "llama", folder / kind / "llama")


def _unpacked(name: str, path: Path) -> None:
    path.write_bytes(gzip.decompress((FIXTURES / name).read_bytes()))


def _sharded(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(FIXTURES / "llama", path)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2],
              "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for shard, inside in shards.items():
        save_file({name: weights[name] for name in inside}, path / shard, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(each.nbytes for each in weights.values())},
        "weight_map": {name: shard for shard, inside in shards.items() for name in inside},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled(path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(FIXTURES / "llama", path)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")


def _gguf(path: Path) -> None:
    from checkpoint.test_gguf_reader import tiny_llama, write_gguf

    write_gguf(path, tiny_llama())


def _state_spaces(path: Path) -> None:
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    vocabulary = json.loads((FIXTURES / "llama" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8,
            expand=2, state_size=8, n_groups=1, chunk_size=16, tie_word_embeddings=True,
        )
    )  # fmt: skip
    shutil.copytree(FIXTURES / "llama", path)
    (path / "model.safetensors").unlink()
    weights = dict(model.state_dict())
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    torch.save(weights, path / "pytorch_model.bin")
    settings = {"layer": "Mamba2", "headdim": 8, "d_state": 8}
    config = {"d_model": 16, "n_layer": 2, "vocab_size": vocabulary, "rms_norm": True}
    (path / "config.json").write_text(json.dumps({**config, "ssm_cfg": settings}))
