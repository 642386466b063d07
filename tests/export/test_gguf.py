"""GGUFs hold what llama.cpp's loader asks for, and are read back as the same model."""

from pathlib import Path

import gguf
import pytest
import torch

from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.commands.export import run
from mambactl.errors import CheckError
from mambactl.options import ExportConfig

ARCHITECTURES = {
    "hybrid": "granitehybrid",
    "native2": "mamba2",
    "native1": "mamba",
    "llama": "llama",
}
# keys that the loader of each architecture requires, without its name
DECODER = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.layer_norm_rms_epsilon", "vocab_size",
}  # fmt: skip
SSM = {"ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"}
REQUIRED = {
    "llama": DECODER | {"attention.head_count_kv", "rope.dimension_count", "rope.freq_base"},
    "granitehybrid": DECODER | SSM | {"ssm.group_count", "attention.head_count_kv"},
    "mamba2": DECODER | SSM | {"ssm.group_count"},
    "mamba": DECODER | SSM,
}
TEXT = "the 12 trees in the night, don't they? áß\n\n  end<|im_end|>"


def fields(path: Path) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Sizes of the tensors in the order of llama.cpp, the fastest first."""
    return {t.name: tuple(map(int, t.shape)) for t in gguf.GGUFReader(path).tensors}


def mamba2_shapes(width: int, inner: int, state: int, groups: int, heads: int) -> dict:
    """Shapes of a Mamba-2 layer of llama.cpp: `2 inner + 2 groups state + heads` rows."""
    channels = inner + 2 * groups * state
    return {
        "ssm_in.weight": (width, inner + channels + heads),
        "ssm_conv1d.weight": (4, channels),
        "ssm_conv1d.bias": (channels,),
        "ssm_dt.bias": (heads,),
        "ssm_a": (1, heads),
        "ssm_d": (1, heads),
        "ssm_norm.weight": (inner // groups, groups),
        "ssm_out.weight": (inner, width),
        "attn_norm.weight": (width,),
    }


MLP = {
    "ffn_norm.weight": (64,), "ffn_gate.weight": (64, 96), "ffn_up.weight": (64, 96),
    "ffn_down.weight": (96, 64),
}  # fmt: skip
ATTENTION = {
    "attn_norm.weight": (64,), "attn_q.weight": (64, 64), "attn_k.weight": (64, 32),
    "attn_v.weight": (64, 32), "attn_output.weight": (64, 64),
}  # fmt: skip
BIASES = {
    "attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,), "attn_output.bias": (64,),
}  # fmt: skip
OUTER = {"token_embd.weight": (64, 300), "output_norm.weight": (64,)}
HEAD = {"output.weight": (64, 300)}
# the mixer is twice as wide as the model, which its loader asserts
GRANITE = mamba2_shapes(64, 128, 16, 4, 4) | MLP
LAYERS = {
    "hybrid": [GRANITE, ATTENTION | MLP] * 2,
    "native2": [mamba2_shapes(64, 128, 8, 2, 8)] * 2,
    "native1": [
        {
            "ssm_in.weight": (64, 256), "ssm_conv1d.weight": (4, 128), "ssm_conv1d.bias": (128,),
            "ssm_x.weight": (128, 36), "ssm_dt.weight": (4, 128), "ssm_dt.bias": (128,),
            "ssm_a": (16, 128), "ssm_d": (128,), "ssm_out.weight": (128, 64),
            "attn_norm.weight": (64,),
        }
    ] * 2,
    "llama": [ATTENTION | BIASES | MLP] * 2,
}  # fmt: skip
WHOLE = {
    "hybrid": OUTER | {"rope_freqs.weight": (8,)},
    "native2": OUTER | HEAD,
    "native1": OUTER,
    "llama": OUTER | HEAD,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loader_finds_what_it_asks_for(name: str, exported) -> None:
    path = exported(name, to="gguf")
    found, architecture = fields(path), ARCHITECTURES[name]
    assert found["general.architecture"] == architecture
    assert found["general.file_type"] == gguf.LlamaFileType.ALL_F32
    own = {key.removeprefix(f"{architecture}.") for key in found}
    assert own >= REQUIRED[architecture]
    expected = dict(WHOLE[name])
    for index, layer in enumerate(LAYERS[name]):
        expected |= {f"blk.{index}.{part}": shape for part, shape in layer.items()}
    assert shapes(path) == expected
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == {gguf.GGMLQuantizationType.F32}


def test_a_layer_without_kv_heads_is_recurrent(exported) -> None:
    found = fields(exported("hybrid", to="gguf"))
    assert found["granitehybrid.attention.head_count_kv"] == [0, 2, 0, 2]
    assert found["granitehybrid.rope.scaling.finetuned"] is True
    # a divisor for every frequency: 1 for short waves, 8 for long ones
    factors = gguf.GGUFReader(exported("hybrid", to="gguf")).tensors[-1].data
    assert factors[0] == 1 and factors[-1] == 8 and sorted(factors) == factors.tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_our_reader_makes_the_same_model_of_it(name: str, exported, source) -> None:
    ids = torch.randint(3, 260, (1, 32), generator=torch.Generator().manual_seed(5))
    expected = load_model(source(name))(ids).logits
    found = load_model(str(exported(name, to="gguf")))(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_tokenizer_and_its_template_go_along(exported, source) -> None:
    path = exported("hybrid", to="gguf")
    found = fields(path)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    # ids that the tokenizer has no token for
    unused = found["tokenizer.ggml.token_type"].count(5)
    assert unused == 300 - len(load_tokenizer(source("hybrid")))
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD299]"
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    roles = [found[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "unknown")]
    assert roles == [1, 2, 0]
    assert found["tokenizer.ggml.add_bos_token"] is False
    ours, theirs = load_tokenizer(source("hybrid")), load_tokenizer(str(path))
    assert theirs(TEXT)["input_ids"] == ours(TEXT)["input_ids"]
    assert theirs.chat_template == ours.chat_template == found["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("bfloat16", "BF16"), ("float16", "F16"), ("q8_0", "Q8_0")],
)
@torch.no_grad()
def test_weights_are_rounded_and_small_tensors_are_not(
    dtype: str, kind: str, exported, source
) -> None:
    path = exported("hybrid", to="gguf", dtype=dtype)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    whole = {"ssm_a", "ssm_d", "ssm_conv1d", "ssm_dt", "ssm_norm", "norm", "rope_freqs"}
    for name, found in kinds.items():
        plain = any(part in name for part in whole)
        # what rounds the state more than once has 16 bits that are fine
        recurrent = any(part in name for part in ("ssm_in", "ssm_out"))
        assert found == ("F32" if plain else "F16" if recurrent else kind), name
    ids = torch.randint(3, 260, (1, 32), generator=torch.Generator().manual_seed(5))
    expected = load_model(source("hybrid"))(ids).logits.log_softmax(-1)
    found = load_model(str(path), dtype=torch.float32)(ids).logits.log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < kl < 0.02


def test_biases_of_dt_fold_and_others_are_refused(tmp_path, source, make_hybrid) -> None:
    from mambactl.checkpoint.save import save_model
    from mambactl.errors import ModelError

    model = load_model(source("biased"))
    config = ExportConfig(to="gguf", check=True)
    with pytest.raises(ModelError, match=r"has biases in .*in_proj.bias, which llama.cpp cannot"):
        run(config, source("biased"), tmp_path / "x.gguf")
    with torch.no_grad():
        mixer = model.model.layers[1].mixer
        mixer.in_proj.bias[: -mixer.sizes.n_heads] = 0
        mixer.out_proj.bias.zero_()
        assert mixer.in_proj.bias.any()
    save_model(model, tmp_path / "folded", {}, None)
    # compares what it computes
    run(config, str(tmp_path / "folded"), tmp_path / "folded.gguf")
    assert fields(tmp_path / "folded.gguf")["tokenizer.ggml.model"] == "none"


def test_a_comparison_that_fails_leaves_nothing(tmp_path, source, monkeypatch) -> None:
    from mambactl.export import to_gguf

    monkeypatch.setattr(to_gguf, "_decay", lambda A_log: -(A_log + 0.1).exp())
    with pytest.raises(CheckError, match=r"has logits that differ by"):
        run(ExportConfig(to="gguf"), source("hybrid"), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_its_lineage_lies_beside_it_and_is_known_as_ours(tmp_path, source) -> None:
    from mambactl.checkpoint.ownership import own_lineage, require_replaceable
    from mambactl.errors import OutputError

    out = tmp_path / "t.gguf"
    run(ExportConfig(to="gguf", check=False), source("native1"), out)
    assert own_lineage(tmp_path / "t.gguf.mambactl.json")["stage"] == "export"
    require_replaceable(out, force=True)
    (tmp_path / "t.gguf.mambactl.json").unlink()
    with pytest.raises(OutputError, match="was not written by mambactl"):
        require_replaceable(out, force=True)


def test_a_comparison_that_memory_does_not_hold_is_left_out(
    tmp_path, source, monkeypatch, capfd
) -> None:
    from mambactl.export import round_trip

    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 100 kB\n")
    monkeypatch.setattr(round_trip, "MEMORY", tmp_path / "meminfo")
    result = run(ExportConfig(to="gguf"), source("native1"), tmp_path / "x.gguf")
    assert "difference" not in result.metrics
    assert "not checked: the model takes" in capfd.readouterr().err
