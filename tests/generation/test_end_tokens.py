"""Tokens that end a text, and answers that go on behind them."""

import pytest

from mambactl.generation import decoding
from mambactl.options import GenerateConfig, SpecDecodeConfig


@pytest.mark.parametrize("kind", [GenerateConfig, SpecDecodeConfig])
def test_ignored_end_tokens_end_nothing(kind, tiny_llama_dir) -> None:
    """Whatever names them: the model, its generation config or its tokenizer."""
    ends = []
    for ignored in (False, True):
        config = kind(prompt="red", device="cpu", ignore_eos=ignored)
        prompts = decoding.read(config)
        setup = decoding.prepare(config, str(tiny_llama_dir), prompts)
        ends.append(setup.params.eos_token_ids)
    assert ends[0] and ends[1] == ()


@pytest.mark.parametrize(("dtype", "rounded"), [("auto", True), ("float32", False)])
def test_weights_are_read_as_they_are_where_a_type_is_asked_for(
    dtype, rounded, tiny_llama_dir
) -> None:
    config = GenerateConfig(prompt="red", device="cpu", dtype=dtype)
    setup = decoding.prepare(config, str(tiny_llama_dir), decoding.read(config))
    assert setup.rounded == rounded
