"""Small models in every form that can be exported, with a tokenizer of bytes."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

VOCABULARY = 300
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
# as wide as its heads, so that mixers are as wide as the model
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCABULARY}
NATIVE2 = {
    "n_heads": 8, "head_dim": 16, "d_state": 8, "x_heads": 8, "b_groups": 2, "c_groups": 2,
    "norm_groups": 2,
}  # fmt: skip
NATIVE1 = {"d_inner": 128, "dt_rank": 4, "d_state": 16, "native": True}


def mamba2(biased: bool) -> dict:
    """Settings of a Mamba-2 mixer in place of the attention of these models."""
    from conftest import tiny_config

    from mambactl.models.mixers.mamba2 import mamba2_from_attention

    return asdict(mamba2_from_attention(tiny_config(["attention"], **SIZES), biased))


def mamba1(repeat_width: int) -> dict:
    """Settings of a Mamba-1 mixer in place of that attention."""
    from conftest import tiny_config

    from mambactl.models.mixers.mamba1 import mamba1_from_attention

    base = tiny_config(["attention"], **SIZES)
    made = mamba1_from_attention(base, repeat_width=16, proj_bias=False)
    return asdict(made) | {"repeat_width": repeat_width}


def byte_tokenizer():
    """A tokenizer that merges bytes, cuts digits apart and has a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a")]
    words = [*special, *letters, *("".join(pair) for pair in pairs)]
    model = models.BPE({word: index for index, word in enumerate(words)}, pairs)
    backend = Tokenizer(model)
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[1], eos_token=special[2],
        unk_token=special[0], pad_token=special[0],
    )  # fmt: skip
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    return fast


# name -> mixers and fields of a model
FACTORS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4,
           "logits_scaling": 0.25}  # fmt: skip
MODELS: dict[str, tuple[list[str], Callable[[], dict]]] = {
    "hybrid": (
        ["mamba2", "attention"] * 2,
        lambda: {"mamba2": mamba2(False), "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "biased": (
        ["attention", "mamba2"],
        lambda: {"mamba2": mamba2(True), "attention_bias": ["q", "k", "v"]},
    ),
    "recurrent": (["mamba2"] * 2, lambda: {"mamba2": mamba2(False)}),
    "mamba1": (["mamba1", "attention"], lambda: {"mamba1": mamba1(16)}),
    # heads of 32 channels that share x and B, not groups of 16
    "mamba1-heads": (
        ["mamba1", "attention"],
        lambda: {"mamba1": mamba1(32) | {"d_inner": 128, "x_dim": 64}, "head_dim": 32},
    ),
    "native2": (["mamba2"] * 2, lambda: {"mamba2": NATIVE2, "has_mlp": False}),
    "native1": (
        ["mamba1"] * 2,
        lambda: {"mamba1": NATIVE1, "has_mlp": False, "tie_word_embeddings": True},
    ),
    "llama": (["attention"] * 2, lambda: {"attention_bias": True}),
    "mistral": (["attention"] * 2, lambda: {"sliding_window": 8}),
    "qwen2": (["attention"] * 2, lambda: {"attention_bias": ["q", "k", "v"]}),
    "qwen3": (["attention"] * 2, lambda: {"qk_norm": True, "head_dim": 32}),
    "smollm3": (["attention"] * 4, lambda: {"unrotated_layers": [1, 3]}),
    "olmo2": (["attention"] * 2, lambda: {"qk_norm": "all", "post_norm": True}),
    "granite": (["attention"] * 2, lambda: dict(FACTORS)),
    "factors": (["mamba2", "attention"], lambda: {"mamba2": mamba2(True), **FACTORS}),
    "still": (["mamba2", "attention"], lambda: {"mamba2": mamba2(True), "unrotated_layers": [1]}),
    "behind": (["mamba2", "attention"], lambda: {"mamba2": mamba2(True), "post_norm": True}),
    "windowed": (["mamba2_window", "attention"], lambda: {"mamba2": mamba2(True)}),
    "kept": (["mamba2_mixed", "attention"], dict),
    "rotary": (["mamba2", "attention"], lambda: {"mamba2": mamba2(True) | {"rotary": True}}),
}


@pytest.fixture(scope="session")
def source(tmp_path_factory, make_hybrid) -> Callable[[str], str]:
    """source(name) -> the checkpoint of a model in `MODELS`, made when it is first asked for."""
    from mambactl.checkpoint.provenance import lineage
    from mambactl.checkpoint.save import save_model
    from mambactl.checkpoint.side_files import read_side_files

    folder = tmp_path_factory.mktemp("sources")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    files = read_side_files(folder / "tokenizer")

    def make(name: str) -> str:
        path = folder / name
        if not path.exists():
            mixers, fields = MODELS[name]
            model = make_hybrid(mixers, **SIZES | {"eos_token_id": 2} | fields())
            save_model(model, path, files, lineage("convert", None, None, None, {}, 0, {}))
        return str(path)

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory, source) -> Callable[..., Path]:
    """exported(name, **options) -> that model in another form, without a comparison."""
    from mambactl.commands.export import run
    from mambactl.options import ExportConfig

    folder = tmp_path_factory.mktemp("exported")

    def make(name: str, **options) -> Path:
        config = ExportConfig(check=False, **options)
        words = "-".join([name, *map(str, options.values())])
        out = folder / f"{words}{config.ending}"
        if not out.exists():
            run(config, source(name), out)
        return out

    return make
