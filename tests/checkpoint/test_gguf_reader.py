"""A GGUF of a Llama computes what the Llama it was made from computes."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mambactl.checkpoint.gguf_reader import GgufReader
from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.errors import ModelError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PIECES = [*"abcdefghijklmnopqrstuvwxyz0123456789.,Ċ", "Ġ", "Ã", "©", "th", "Ġth", "12"]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order llama.cpp stores q and k in: rotary halves become adjacent pairs."""
    return np.concatenate(
        [
            np.stack([head[: len(head) // 2], head[len(head) // 2 :]], 1).reshape(head.shape)
            for head in np.split(weight, heads)
        ]
    )


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    quantised: bool = False,
    architecture: str = "llama",
    tensors: int = 0,
    more: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Path:
    """The model in files of up to `tensors` (0: in one), with `more` metadata."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(7 if quantised else 0)
    write_tokenizer(writer)
    more(writer)
    if config.rope_parameters["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = 500000.0 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if "q_proj" in name:
            data = interleaved(data, config.num_attention_heads)
        if "k_proj" in name:
            data = interleaved(data, config.num_key_value_heads)
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, index, part = stem.split(".", 3)
            stem = f"blk.{index}.{NAMES[part]}"
        else:
            stem = NAMES[stem]
        if quantised and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{stem}.weight", gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stem}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = SPECIAL + PIECES
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(PIECES))
    writer.add_token_merges(["t h", "Ġ th", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")


def tiny_llama(**overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": len(SPECIAL + PIECES),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 30000.0},
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **overrides})).eval()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6},
    ],
)
def test_gguf_equals_its_original(overrides: dict, tmp_path: Path) -> None:
    original = tiny_llama(**overrides)
    loaded = load_model(str(write_gguf(tmp_path / "m.gguf", original)))
    state = original.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for field in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "head_dim"):
        assert getattr(loaded.config, field) == getattr(original.config, field), field
    ids = torch.randint(0, 40, (2, 50), generator=torch.manual_seed(1))
    with torch.no_grad():
        difference = loaded(ids, use_cache=False).logits - original(ids, use_cache=False).logits
    assert difference.abs().max() <= 1e-5


def test_a_number_that_is_not_finite_is_named(tmp_path: Path) -> None:
    original = tiny_llama()
    name = "model.layers.1.self_attn.k_proj.weight"
    with torch.no_grad():
        original.get_parameter(name)[3, 5] = float("inf")
    with pytest.raises(ModelError, match=f"{name} holds NaN or infinite numbers"):
        load_model(str(write_gguf(tmp_path / "m.gguf", original)))


def test_quantised_gguf_is_close_and_bf16(tmp_path: Path) -> None:
    original = tiny_llama()
    path = write_gguf(tmp_path / "m.gguf", original, quantised=True)
    model = load_model(str(path))
    assert model.dtype == torch.bfloat16
    state = original.state_dict()
    for name, tensor in model.state_dict().items():
        assert (tensor.float() - state[name]).abs().max() <= 0.01 * state[name].abs().max(), name


def test_row_blocks_cover_large_tensors(tmp_path: Path, monkeypatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    whole = GgufReader(path).get("model.embed_tokens.weight")
    monkeypatch.setattr("mambactl.checkpoint.gguf_reader._ROWS", 7)
    assert torch.equal(GgufReader(path).get("model.embed_tokens.weight"), whole)


def test_tokenizer_splits_digits_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", tiny_llama())))
    assert tokenizer.tokenize("the 1212") == ["th", "e", "Ġ", "1", "2", "1", "2"]
    assert tokenizer.tokenize("a<|im_end|>") == ["a", "<|im_end|>"]
    text = "a then\n\né 12."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>hi"


def test_begin_token_is_added_when_the_file_says_so(tmp_path: Path, monkeypatch) -> None:
    plain = write_tokenizer

    def with_begin_token(writer: gguf.GGUFWriter) -> None:
        plain(writer)
        writer.add_add_bos_token(True)

    monkeypatch.setitem(globals(), "write_tokenizer", with_begin_token)
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", tiny_llama())))
    assert tokenizer("a").input_ids == [1, tokenizer.convert_tokens_to_ids("a")]


def test_a_model_in_several_files(tmp_path: Path) -> None:
    """Any of them stands for all; one that is missing is named."""
    whole = load_model(str(write_gguf(tmp_path / "m.gguf", tiny_llama()))).state_dict()
    write_gguf(tmp_path / "s.gguf", tiny_llama(), tensors=8)
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert [part.name for part in parts] == [f"s-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for part in (parts[0], parts[2]):
        found = load_model(str(part)).state_dict()
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert load_tokenizer(str(parts[1])).tokenize("the") == ["th", "e"]
    parts[1].unlink()
    with pytest.raises(ModelError, match="one of 3 files, and s-00002-of-00003.gguf is not there"):
        load_model(str(parts[0]))


def test_older_keys_and_the_end_of_an_answer(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("llama.rope.scale_linear", 4.0)
        writer.add_eot_token_id(5)

    path = str(write_gguf(tmp_path / "m.gguf", tiny_llama(), more=more))
    model = load_model(path)
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 30000.0}
    assert model.config.rope_parameters == parameters
    assert model.generation_config.eos_token_id == [2, 5]
    scaled = tiny_llama(rope_parameters=parameters)
    ids = torch.randint(0, 40, (1, 30), generator=torch.manual_seed(1))
    with torch.no_grad():
        difference = model(ids, use_cache=False).logits - scaled(ids, use_cache=False).logits
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("merges", "what"), [([], "it has no merges"), (["x y z", "q q"], "its tokenizer")]
)
def test_a_vocabulary_that_cannot_be_read(merges, what, tmp_path: Path, monkeypatch) -> None:
    plain = gguf.GGUFWriter.add_token_merges
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_token_merges",
        lambda writer, _: plain(writer, merges) if merges else None,
    )
    path = str(write_gguf(tmp_path / "m.gguf", tiny_llama()))
    with pytest.raises(ModelError, match=what) as refused:
        load_tokenizer(path)
    assert refused.value.hint


def test_other_architectures_and_damage_are_named(tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "q.gguf", tiny_llama(), architecture="qwen2")
    with pytest.raises(ModelError, match="qwen2"):
        load_model(str(other))
    broken = write_gguf(tmp_path / "b.gguf", tiny_llama())
    broken.write_bytes(broken.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="b.gguf"):
        load_model(str(broken))
    broken.write_bytes(b"not a gguf at all")
    with pytest.raises(ModelError, match="is not a GGUF"):
        load_model(str(broken))
