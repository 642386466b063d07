"""Teachers with norms or biases of their own go through the whole program.

Their logits are the library's, they are converted and fitted layer by layer, and what comes out
is trained, saved, loaded and decoded.
"""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import write_sentences
from decode.engines import GREEDY, fused, plain, prompts_of

from mambactl.checkpoint.load import load_model, open_checkpoint
from mambactl.commands import convert, distill
from mambactl.errors import ModelError
from mambactl.models.mixers.attention import weights_of
from mambactl.models.packed import NotSupported
from mambactl.options import ConvertConfig, DistillConfig

LENGTH = 37
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 74, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
VARIANTS = {
    "plain": {},
    "odd": {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3},
    "one key head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "windows": WINDOWS,
    "yarn": {"rope_parameters": YARN, "rms_norm_eps": 1e-2},
}
# name of the family in the library -> fields that tests of everything else set
FAMILIES = {"Qwen2": {}, "Qwen3": {"head_dim": 12}}


def build(family: str, folder: Path, **fields) -> transformers.PreTrainedModel:
    """A random model of the library's own class, in `folder` too; no norm or bias is neutral."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **fields})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def teacher(family, tmp_path_factory, tiny_tokenizer) -> str:
    folder = tmp_path_factory.mktemp("teacher") / family
    build(family, folder, head_dim=16)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_sentences(tmp_path_factory.mktemp("text") / "fit.jsonl", 0, 80)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return model(ids, use_cache=False).logits


def assert_decodes(path: str) -> None:
    """The cache, and drafts that are taken back, change no token; nor do whole steps."""
    model, prompts = load_model(path), prompts_of([23, 1, 6])
    tokens = plain(model).generate(prompts, GREEDY).tokens
    assert plain(model, "ngram", 3).generate(prompts, GREEDY).tokens == tokens
    for prompt, found in zip(prompts, tokens, strict=True):
        with torch.no_grad():
            whole = model(torch.tensor([prompt + found]), use_cache=False).logits[0].argmax(-1)
        assert whole[len(prompt) - 1 : -1].tolist() == found
    if any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()):
        with pytest.raises(NotSupported, match="norms on queries and keys"):
            fused(model)
        return
    for draft, k in ((None, 0), ("ngram", 3)):
        assert fused(model, draft, k).generate(prompts, GREEDY).tokens == tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(family, variant, tmp_path) -> None:
    theirs = logits(build(family, tmp_path, **VARIANTS[variant]))
    error = (logits(load_model(str(tmp_path))) - theirs).abs().max() / theirs.abs().max()
    assert float(error) <= 2e-5


def test_a_window_in_some_layers_is_refused(family, tmp_path) -> None:
    build(family, tmp_path, **WINDOWS | {"max_window_layers": 2})
    with pytest.raises(ModelError, match="in some layers only"):
        load_model(str(tmp_path))


def test_what_a_file_leaves_out_is_the_familys(family, tmp_path) -> None:
    """Not Llama's: it begins and ends a text with tokens 1 and 2."""
    build(family, tmp_path, bos_token_id=None, eos_token_id=None)
    config = load_model(str(tmp_path)).config
    assert config.bos_token_id is None and config.eos_token_id is None


def test_the_teacher_decodes(teacher) -> None:
    assert_decodes(teacher)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_a_mixer_starts_from_its_attention(teacher, mixer, text, tmp_path) -> None:
    """The fit explains a part of what the attention puts out, and one distilled step runs."""
    options = ConvertConfig(form="portable", mixer=mixer, calibrate=[text], max_length=LENGTH)
    made = convert.run(options, teacher, tmp_path / "student")
    assert made.metrics["calibration_error"] < 0.9
    assert_decodes(made.path)
    steps = DistillConfig(
        device="cpu", data=[text], max_steps=2, batch_size=2, max_length=LENGTH
    )  # one of each stage
    trained = distill.run(steps, made.path, tmp_path / "trained.st")
    assert_decodes(trained.path)
    before, after = (load_model(path).state_dict() for path in (made.path, trained.path))
    assert before.keys() == after.keys()
    assert not torch.equal(*(s["model.layers.0.mamba.out_proj.weight"] for s in (before, after)))


def test_a_window_starts_as_its_attention(teacher, tmp_path) -> None:
    """Under a window over the whole text the student is the teacher."""
    options = ConvertConfig(by="layer", window=LENGTH, ratio=1)
    made = convert.run(options, teacher, tmp_path / "t.st")
    torch.testing.assert_close(
        logits(load_model(made.path)), logits(load_model(teacher)), rtol=0, atol=2e-5
    )
    with open_checkpoint(teacher) as source, open_checkpoint(made.path) as student:
        for name in source.names():
            other = name.replace("self_attn.", "mamba.window.")
            same = name if name in student.names() else other
            assert torch.equal(source.get(name), student.get(same)), name


def test_a_fitted_window_decodes(teacher, text, tmp_path) -> None:
    options = ConvertConfig(by="layer", window=5, sinks=2, calibrate=[text], max_length=LENGTH)
    made = convert.run(options, teacher, tmp_path / "t.st")
    assert made.metrics["calibration_error"] < 1
    assert_decodes(made.path)


def test_biases_are_copied_where_there_are_any(tmp_path, tiny_tokenizer) -> None:
    """Qwen2 has three, and none behind its heads."""
    build("Qwen2", tmp_path / "q")
    tiny_tokenizer.save_pretrained(tmp_path / "q")
    made = convert.run(
        ConvertConfig(ratio=1, init="reference"), str(tmp_path / "q"), tmp_path / "t"
    )
    with open_checkpoint(str(tmp_path / "q")) as source, open_checkpoint(made.path) as student:
        for index in range(4):
            given = f"model.layers.{index}.self_attn"
            rows = torch.cat([source.get(f"{given}.{n}_proj.bias") for n in "vkq"])
            bias = student.get(f"model.layers.{index}.mamba.in_proj.bias")
            assert torch.equal(bias[48 : 48 + len(rows)], rows)
            assert not student.get(f"model.layers.{index}.mamba.out_proj.bias").any()


def test_norms_on_heads_become_a_linear_map(tmp_path) -> None:
    """Of heads wide enough that their rms hardly varies; the weights of the norms are in it."""
    build("Qwen3", tmp_path, head_dim=512, hidden_size=768, attention_bias=True)
    block = load_model(str(tmp_path)).model.layers[0]
    mixer, weights = block.mixer, weights_of(block.mixer, block.input_layernorm.weight)
    hidden = torch.randn(64, 768, generator=torch.Generator().manual_seed(1))
    hidden = block.input_layernorm(hidden)[None]
    for name, norm in (("q", mixer.q_norm), ("k", mixer.k_norm)):
        with torch.no_grad():
            raw = getattr(mixer, f"{name}_proj")(hidden).unflatten(-1, (-1, 512))
            wanted, found = norm(raw), weights.heads(name, hidden, 512)
        assert float((found - wanted).norm() / wanted.norm()) < 0.1
        assert float((raw - wanted).norm() / wanted.norm()) > 0.25


def test_a_student_without_attention_needs_no_norm(tmp_path, tiny_tokenizer) -> None:
    """It decodes in whole steps; its configuration still says what it was made from."""
    build("Qwen3", tmp_path / "q")
    tiny_tokenizer.save_pretrained(tmp_path / "q")
    made = convert.run(
        ConvertConfig(form="portable", ratio=1), str(tmp_path / "q"), tmp_path / "t.st"
    )
    assert load_model(made.path).config.qk_norm
    assert_decodes(made.path)


def test_other_teachers_do_not_name_the_norms(tiny_llama_dir) -> None:
    """A checkpoint without them is what it was before there were any."""
    config = load_model(str(tiny_llama_dir)).config
    assert "qk_norm" not in config.to_dict() and "qk_norm" not in config.to_json_string()
