"""Foreign formats compute what their own implementation computes."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from mambactl.checkpoint.load import load_model, open_strict
from mambactl.errors import ModelError

LENGTH = 37


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that a misplaced tensor changes the logits visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(noise * 0.5)
            elif "norm" in name or name.endswith(".D"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.copy_(noise * 0.5 - 1)
            else:
                parameter.copy_(noise * 0.6 * max(parameter.shape[-1], 4) ** -0.5)
    return model.float().eval()


def logits_match(model: PreTrainedModel, folder: Path, tolerance: float) -> None:
    model.save_pretrained(folder)
    ids = torch.randint(3, model.config.vocab_size, (2, LENGTH), generator=torch.manual_seed(1))
    with torch.no_grad():
        theirs = model(ids, use_cache=False).logits
        ours = load_model(str(folder))(ids, use_cache=False).logits
    assert theirs.std() > 0.05
    assert (theirs - ours).abs().max() <= tolerance


ATTENTION_SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
LLAMA_VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "eps": {"rms_norm_eps": 1e-2},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", LLAMA_VARIANTS)
def test_llama_equals_transformers(variant: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**ATTENTION_SIZES, **LLAMA_VARIANTS[variant])
    logits_match(randomise(transformers.LlamaForCausalLM(config)), tmp_path / "m", 1e-5)


@pytest.mark.parametrize("window", [None, 8])
def test_mistral_equals_transformers(window: int | None, tmp_path: Path) -> None:
    config = transformers.MistralConfig(**ATTENTION_SIZES, sliding_window=window)
    logits_match(randomise(transformers.MistralForCausalLM(config)), tmp_path / "m", 1e-5)


def test_old_rope_spelling_is_read(tmp_path: Path) -> None:
    """Published configs still say rope_theta and rope_scaling."""
    rope = LLAMA_VARIANTS["llama3-rope"]["rope_parameters"]
    config = transformers.LlamaConfig(**ATTENTION_SIZES, rope_parameters=rope)
    randomise(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    old = {k: v for k, v in raw.pop("rope_parameters").items() if k != "rope_theta"}
    raw |= {"rope_theta": 500.0, "rope_scaling": old}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_model(str(tmp_path)).config.rope_parameters == rope


MAMBA2_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "num_hidden_layers": 3,
    "expand": 2,
    "chunk_size": 16,
    "pad_token_id": 0,
}


GROUPED = pytest.mark.since_transformers("5.23", "norms all groups together")


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=GROUPED)])
@pytest.mark.parametrize("bias", [False, True])
def test_mamba2_equals_transformers(groups: int, bias: bool, tmp_path: Path) -> None:
    config = transformers.Mamba2Config(**MAMBA2_SIZES, n_groups=groups, use_bias=bias)
    logits_match(randomise(transformers.Mamba2ForCausalLM(config)), tmp_path / "m", 1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_mamba1_equals_transformers(bias: bool, tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=97, hidden_size=32, state_size=8, num_hidden_layers=3, use_bias=bias
    )
    logits_match(randomise(transformers.MambaForCausalLM(config)), tmp_path / "m", 1e-4)


def as_state_spaces(model: PreTrainedModel, folder: Path, config: dict) -> None:
    """The original repository layout: pickled weights, own config keys, head repeated."""
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state["backbone.embedding.weight"] = state.pop("backbone.embeddings.weight")
    state.setdefault("lm_head.weight", state["backbone.embedding.weight"])
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_state_spaces_format_equals_transformers(layer: str, tmp_path: Path) -> None:
    common = {"d_model": 32, "n_layer": 2, "vocab_size": 90, "rms_norm": True}
    if layer == "Mamba1":
        model = transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)
        )
        config = {**common, "ssm_cfg": {}}
    else:
        sizes = {**MAMBA2_SIZES, "vocab_size": 96, "num_hidden_layers": 2, "n_groups": 1}
        model = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**sizes, tie_word_embeddings=True)
        )
        config = {**common, "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 16}}
    as_state_spaces(randomise(model), tmp_path, config)
    ids = torch.randint(0, 90, (2, LENGTH), generator=torch.manual_seed(1))
    with torch.no_grad():
        ours = load_model(str(tmp_path))(ids, use_cache=False).logits
        theirs = model(ids, use_cache=False).logits
    assert (theirs - ours).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification",
        ),
        ({"model_type": "odd", "auto_map": {"AutoModel": "evil.Odd"}}, "evil.Odd"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantised"),
        ({"ssm_cfg": {}, "d_model": 8, "n_layer": 1, "attn_layer_idx": [3]}, "attn_layer_idx"),
    ],
)
def test_unsupported_architectures_are_named(
    config: dict, named: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").symlink_to(tiny_llama_dir / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=named) as caught:
        open_strict(str(tmp_path))
    if "quantised" not in named and "attn" not in named:
        assert "LlamaForCausalLM" in caught.value.hint


REMOTE_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OddConfig(LlamaConfig):
    model_type = "odd"
class Odd(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_code_in_a_checkpoint_runs_only_when_trusted(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "odd", tmp_path / "code-ran"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tiny_llama_dir / "model.safetensors")
    (folder / "odd.py").write_text(REMOTE_CODE.format(marker=str(marker)))
    raw = json.loads((tiny_llama_dir / "config.json").read_text())
    raw |= {
        "model_type": "odd",
        "architectures": ["Odd"],
        "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"},
    }
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="odd.Odd"):
        load_model(str(folder))
    assert not marker.exists()
    model = load_model(str(folder), trust_remote_code=True)
    assert marker.exists()
    assert type(model).__name__ == "Odd"


@pytest.mark.parametrize(
    ("family", "fields"),
    [("Mamba", {}), ("Mamba2", {"num_heads": 6, "head_dim": 11, "n_groups": 2})],
)
def test_a_native_model_of_an_odd_width(family: str, fields: dict, tmp_path: Path) -> None:
    sizes = {"hidden_size": 33, "state_size": 6, "num_hidden_layers": 2, "vocab_size": 97}
    config = getattr(transformers, f"{family}Config")(**sizes, **fields)
    logits_match(randomise(getattr(transformers, f"{family}ForCausalLM")(config)), tmp_path, 1e-5)
