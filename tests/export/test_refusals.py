"""Models that a form cannot hold are refused before anything is written, with the way out."""

import pytest

from mambactl.commands.export import plan, run
from mambactl.errors import ModelError, ResourceError, UsageError
from mambactl.export import round_trip
from mambactl.options import ExportConfig

PORTABLE = "convert TEACHER --form portable"


@pytest.mark.parametrize(
    ("name", "to", "what", "hint"),
    [
        ("kept", "transformers", "keeps heads, which GraniteMoeHybrid cannot hold", PORTABLE),
        ("windowed", "transformers", "has windows of attention", PORTABLE),
        ("rotary", "transformers", "states that rotate with the position", PORTABLE),
        ("mamba1", "transformers", "has a Mamba-1 mixer in layer 0", PORTABLE),
        ("recurrent", "transformers", "has no attention layer", "--keep-attention"),
        ("recurrent", "gguf", "has no attention layer", "--keep-attention"),
        ("kept", "gguf", "keeps heads, which granitehybrid cannot hold", PORTABLE),
        ("mamba1", "gguf", "has a Mamba-1 mixer", PORTABLE),
        ("biased", "gguf", "has biases in model.layers.1.mamba", "--init reference"),
        ("mistral", "gguf", "has a sliding window of 8", None),
        ("qwen2", "gguf", "has biases on", None),
        ("qwen3", "gguf", "has norms on heads", None),
        ("behind", "transformers", "has norms behind its mixers", None),
        ("olmo2", "gguf", "has norms", None),
        ("smollm3", "gguf", "has layers without rotary positions", None),
        ("granite", "gguf", "has embedding_multiplier and attention_multiplier and", None),
        ("factors", "mambainllama", "has embedding_multiplier and", None),
        ("still", "mambainllama", "has layers without rotary positions", None),
        ("hybrid", "mamba-ssm", "has attention or MLPs", "--to transformers"),
        ("native1", "mambainllama", "has layers without MLP", None),
        ("llama", "mambainllama", "has no recurrent layer", "--to transformers"),
        ("windowed", "mambainllama", "has windows of attention", PORTABLE),
        ("kept", "mambainllama", "keeps heads", PORTABLE),
    ],
)
def test_what_a_form_cannot_hold(name, to, what, hint, source, tmp_path) -> None:
    config, out = ExportConfig(to=to), tmp_path / f"x{ExportConfig(to=to).ending}"
    with pytest.raises(ModelError, match=what) as refused:
        run(config, source(name), out)
    assert hint is None or hint in refused.value.hint
    with pytest.raises(ModelError, match=what):
        plan(config, source(name))
    assert list(tmp_path.iterdir()) == []


def test_the_fused_layout_scales_no_positions(source, tmp_path) -> None:
    with pytest.raises(ModelError, match="scales its rotary positions") as refused:
        run(ExportConfig(to="mambainllama", layout="fused"), source("hybrid"), tmp_path / "x")
    assert "--layout hf" in refused.value.hint


@pytest.mark.parametrize(
    ("options", "out", "what"),
    [
        ({"dtype": "q8_0"}, "x", "q8_0 is a type of GGUF alone"),
        ({"to": "gguf"}, "x", "writes a .gguf file"),
        ({}, "x.gguf", "writes a folder"),
        ({"to": "mamba-ssm"}, "x.st", "writes a folder"),
    ],
)
def test_options_of_another_form(options, out, what, source, tmp_path) -> None:
    with pytest.raises(UsageError, match=what):
        run(ExportConfig(**options), source("llama"), tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_a_name_is_refused(tiny_llama_dir, tmp_path) -> None:
    with pytest.raises(ModelError, match="has a tokenizer of the kind WordLevel"):
        run(ExportConfig(to="gguf"), str(tiny_llama_dir), tmp_path / "x.gguf")


def test_a_version_that_computes_something_else_checks_nothing(
    source, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(round_trip, "version", lambda package: "5.22.2")
    with pytest.raises(ResourceError, match="5.22.2 loads this form and computes") as caught:
        run(ExportConfig(), source("hybrid"), tmp_path / "out")
    assert 'pip install "transformers>=5.23"' in caught.value.hint
    assert "--no-check" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    run(ExportConfig(check=False), source("hybrid"), tmp_path / "out")
    assert "transformers 5.23 or newer" in (tmp_path / "out" / "README.md").read_text()
    # what every version computes is checked in any
    assert run(ExportConfig(), source("native1"), tmp_path / "native").metrics["difference"]
