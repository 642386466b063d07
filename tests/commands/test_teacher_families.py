"""Teachers with norms or biases of their own go through the whole program.

Their logits are the library's, they are converted and fitted layer by layer, and what comes out
is trained, saved, loaded and decoded.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_config, write_sentences
from decode.engines import GREEDY, plain, prompts_of
from safetensors import safe_open

from mambactl.checkpoint.load import load_model, open_checkpoint
from mambactl.commands import convert, distill, export
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.errors import ModelError, UsageError
from mambactl.kernels.decode.cpu.cpu_ops import CpuOps
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.models.config import NEWER
from mambactl.models.mixers.attention import weights_of
from mambactl.options import ConvertConfig, DistillConfig, ExportConfig

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
FACTORS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.22,
           "logits_scaling": 0.3}  # fmt: skip
FAMILIES = {
    "Qwen2": {},
    "Olmo2": {},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "Granite": FACTORS,
    "Qwen3": {"head_dim": 12},
}
WITH_WINDOWS = {"Qwen2", "Qwen3"}


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
    """The cache, and drafts that are taken back, change no token; nor do whole steps, with the
    reference's operations or a CPU's.
    """
    model, prompts = load_model(path), prompts_of([23, 1, 6])
    tokens = plain(model).generate(prompts, GREEDY).tokens
    assert plain(model, "ngram", 3).generate(prompts, GREEDY).tokens == tokens
    for prompt, found in zip(prompts, tokens, strict=True):
        with torch.no_grad():
            whole = model(torch.tensor([prompt + found]), use_cache=False).logits[0].argmax(-1)
        assert whole[len(prompt) - 1 : -1].tolist() == found
    for draft, k in ((None, 0), ("ngram", 3)):
        for ops in (ReferenceOps(), CpuOps(bfloat16=False)):
            engine = FusedEngine(model, draft, k, ops)
            assert engine.generate(prompts, GREEDY).tokens == tokens


@pytest.mark.one_in(2)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(family, variant, tmp_path) -> None:
    if variant == "windows" and family not in WITH_WINDOWS:
        pytest.skip(f"{family} has no windows in all layers")
    theirs = logits(build(family, tmp_path, **VARIANTS[variant]))
    error = (logits(load_model(str(tmp_path))) - theirs).abs().max() / theirs.abs().max()
    assert float(error) <= 2e-5


def test_the_library_computes_what_is_exported(family, teacher, tmp_path) -> None:
    """The way back: its own class, with all keys, for the name that the family has."""
    made = export.run(ExportConfig(), teacher, tmp_path / "out")
    kind = getattr(transformers, f"{family}ForCausalLM")
    theirs, report = kind.from_pretrained(made.path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = logits(load_model(teacher))
    assert float((logits(theirs) - ours).abs().max() / ours.abs().max()) <= 2e-5
    mine, given = (safe_open(Path(f) / "model.safetensors", "pt") for f in (made.path, teacher))
    names = set(given.keys())
    assert set(mine.keys()) == names
    assert all(torch.equal(mine.get_tensor(n), given.get_tensor(n)) for n in names)


@pytest.mark.parametrize("family", ["Qwen2", "SmolLM3"])
def test_a_window_in_some_layers_is_refused(family, tmp_path) -> None:
    build(family, tmp_path, **WINDOWS | {"max_window_layers": 2})
    with pytest.raises(ModelError, match="in some layers only"):
        load_model(str(tmp_path))


def test_what_a_file_leaves_out_is_the_familys(family, tmp_path) -> None:
    """Not Llama's: it begins and ends a text with tokens 1 and 2."""
    if family == "Granite":
        pytest.skip("Granite's are Llama's")
    build(family, tmp_path, bos_token_id=None, eos_token_id=None)
    config = load_model(str(tmp_path)).config
    assert config.bos_token_id is None and config.eos_token_id is None


def test_the_teacher_decodes(teacher) -> None:
    assert_decodes(teacher)


@pytest.mark.one_in(5)
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


@pytest.mark.one_in(3)
@pytest.mark.parametrize("by", ["layer", "head"])
def test_a_fitted_window_decodes(teacher, by, text, tmp_path) -> None:
    fit = {"calibrate": [text], "max_length": LENGTH}
    # an odd number of heads is replaced: one layer keeps a part of them
    options = ConvertConfig(by=by, ratio=0.6, window=5, sinks=2, **fit)
    made = convert.run(options, teacher, tmp_path / "t.st")
    assert made.metrics["calibration_error"] < 1
    assert ("mamba2_mixed" in load_model(made.path).config.mixers) == (by == "head")
    assert_decodes(made.path)


def test_kept_heads_are_the_teachers(teacher, tmp_path) -> None:
    """Beside a window over the whole text the student is the teacher, and it trains."""
    options = ConvertConfig(keep_heads="0.1,1.0,3.1", by="head", window=LENGTH)
    made = convert.run(options, teacher, tmp_path / "t.st")
    student = load_model(made.path)
    assert student.config.mixers.count("mamba2_mixed") == 3
    torch.testing.assert_close(logits(student), logits(load_model(teacher)), rtol=0, atol=2e-5)
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    student.train().requires_grad_(True)
    loss = student(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= 1e-3 * parameter.grad
        assert student(ids, labels=ids).loss < loss


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("windows", [False, True])
def test_a_gpus_kernels_decode(family, exact, windows, tmp_path, tiny_tokenizer) -> None:
    """In the interpreter where there is no GPU; heads are as wide as the fused product needs."""
    ops = pytest.importorskip("mambactl.kernels.decode.triton.ops").TritonOps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    build(family, tmp_path / "t", head_dim=16, num_hidden_layers=2)
    path = str(tmp_path / "t")
    if windows:
        tiny_tokenizer.save_pretrained(tmp_path / "t")
        options = ConvertConfig(by="head", keep_heads="1.0", window=5, sinks=2)
        path = convert.run(options, path, tmp_path / "s").path
    model, prompts = load_model(path, device), prompts_of([9, 2])
    few = replace(GREEDY, max_new_tokens=4)
    tokens = plain(model).generate(prompts, few).tokens
    engine = FusedEngine(model, "ngram", 2, ops.for_model(model, exact))
    assert engine.generate(prompts, few).tokens == tokens


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
    """Heads are wide enough that their rms hardly varies; the map has the weights of the norms."""
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


def test_other_teachers_do_not_name_what_is_not_theirs(tiny_llama_dir) -> None:
    """A checkpoint without norms on heads, factors and so on is what it was before they
    were known.
    """
    config = load_model(str(tiny_llama_dir)).config
    assert not NEWER.keys() & config.to_dict().keys()
    assert not any(name in config.to_json_string() for name in NEWER)


def test_states_rotate_only_where_attention_does(tmp_path, tiny_tokenizer) -> None:
    build("SmolLM3", tmp_path / "s")
    tiny_tokenizer.save_pretrained(tmp_path / "s")
    rotary = ConvertConfig(by="layer", ratio=1, rotary=True)
    with pytest.raises(UsageError, match="the attention of layer 1 does not rotate"):
        convert.run(rotary, str(tmp_path / "s"), tmp_path / "t.st")
    assert not (tmp_path / "t.st").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"qk_norm": "some"}, {"unrotated_layers": [4]}, {"residual_multiplier": 0.0},
        {"embedding_multiplier": -1.0},
    ],
)  # fmt: skip
def test_values_without_a_meaning(fields) -> None:
    with pytest.raises(Exception, match=next(iter(fields))):
        tiny_config(["attention"] * 4, **fields)
