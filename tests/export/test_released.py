"""The formats of mamba_ssm and of the checkpoints that were released with arXiv 2408.15237."""

import json
from pathlib import Path

import pytest
import torch

from mambactl.checkpoint.load import load_model
from mambactl.checkpoint.safetensors_reader import FolderReader
from mambactl.commands.export import run
from mambactl.options import ExportConfig

# the fields of the package's MambaConfig, which takes no other
PACKAGE_FIELDS = {
    "d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg",
    "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings",
}  # fmt: skip
RELEASED_FIELDS = {
    "d_model", "ssm_cfg", "rms_norm_eps", "vocab_size", "d_inner", "d_xb", "intermediate_size",
    "hidden_act", "n_layer", "attn_layers",
}  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True, mmap=True)


def config_of(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("native1", {"layer": "Mamba1", "dt_rank": 4, "d_state": 16}),
        ("native2", {"layer": "Mamba2", "headdim": 16, "ngroups": 2, "chunk_size": 64}),
    ],
)
@torch.no_grad()
def test_mamba_ssm_finds_every_tensor(name: str, own: dict, exported, source) -> None:
    folder = exported(name, to="mamba-ssm")
    config, found = config_of(folder), weights(folder)
    assert config.keys() == PACKAGE_FIELDS
    assert config["ssm_cfg"].items() >= (own | {"expand": 2, "d_conv": 4}).items()
    assert config["pad_vocab_size_multiple"] == 1 and config["vocab_size"] == 300
    assert found["backbone.embedding.weight"].shape == (300, 64)
    # the package wants the head also where it is the embedding
    head, tied = found["lm_head.weight"], config["tie_embeddings"]
    assert (head.data_ptr() == found["backbone.embedding.weight"].data_ptr()) == tied
    mixer = {key.removeprefix("backbone.layers.0.") for key in found if ".layers.0." in key}
    shared = {"in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "out_proj.weight"}
    rest = {"x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
    rest = rest if name == "native1" else {"dt_bias", "norm.weight"}
    assert mixer == {"norm.weight", *(f"mixer.{part}" for part in shared | rest)}
    ids = torch.arange(3, 35)[None]
    assert torch.equal(load_model(str(folder))(ids).logits, load_model(source(name))(ids).logits)


PARTS = {"in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down", "dt_proj", "out_proj"}


@pytest.mark.parametrize("layout", ["hf", "fused"])
@pytest.mark.parametrize("name", ["hybrid", "mamba1", "mamba1-heads", "recurrent"])
@torch.no_grad()
def test_a_released_layout_computes_the_same(
    name: str, layout: str, exported, source, tmp_path
) -> None:
    if (name, layout) == ("hybrid", "fused"):
        pytest.skip("that layout has no scaled rotation")
    model = load_model(source(name))
    folder = exported(name, to="mambainllama", layout=layout)
    config = config_of(folder, "mamba_config.json")
    assert config.keys() == RELEASED_FIELDS
    assert config["attn_layers"] == model.config.attention_layers
    assert config_of(folder)["architectures"] == ["LlamaForCausalLM"]
    ids = torch.randint(3, 260, (2, 32), generator=torch.Generator().manual_seed(5))
    found = load_model(str(folder), dtype=torch.float32)(ids).logits
    assert (found - model(ids).logits).abs().max() < 1e-4 * found.abs().max()


def test_layouts_have_the_released_names(exported) -> None:
    separate = weights(exported("mamba1", to="mambainllama", layout="hf"))
    mixer = {key.split(".mamba.")[1] for key in separate if ".mamba." in key}
    linear = {f"{part}.weight" for part in PARTS}
    assert mixer == linear | {"dt_proj.bias", "conv1d.weight", "conv1d.bias", "A_log", "D"}
    assert separate["model.layers.0.mamba.in_proj_x.weight"].shape == (32, 64)
    assert "model.layers.1.self_attn.q_proj.weight" in separate
    with FolderReader(exported("mamba1", to="mambainllama", layout="fused")) as joined:
        # rows [z, x, B, C, dt] and [q, k, v]
        assert joined.shape("model.layers.0.mamba.in_proj.weight") == (64 + 32 + 32 + 64 + 4, 64)
        assert joined.shape("model.layers.1.mha.in_proj.weight") == (64 + 32 + 32, 64)
        assert joined.shape("model.layers.1.mha.out_proj.weight") == (64, 64)
        assert not any("self_attn" in name for name in joined.names())
    second = weights(exported("hybrid", to="mambainllama", layout="hf"))
    # heads that share x and B have them once: [z, x, B, C, dt]
    assert second["model.layers.0.mamba.in_proj.weight"].shape == (64 + 32 + 32 + 64 + 4, 64)
    assert second["model.layers.0.mamba.conv1d.weight"].shape == (128, 1, 4)
    ssm = config_of(exported("hybrid", to="mambainllama", layout="hf"), "mamba_config.json")
    assert ssm["ssm_cfg"] == {"expand": 1, "ngroups": 4, "d_state": 16}


def test_the_comparison_reads_what_was_written(source, tmp_path) -> None:
    result = run(ExportConfig(to="mambainllama"), source("mamba1-heads"), tmp_path / "out")
    assert result.metrics["difference"]["prompts"] == 4
    assert result.metrics["difference"]["texts"] == 0
