"""States that turn with the position, beside kept heads and windows: made, trained and decoded."""

import pytest
import torch
from conftest import write_sentences
from decode.engines import GREEDY, fused, plain, prompts_of

from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_model
from mambactl.commands import convert, distill
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.kernels.decode.cpu.cpu_ops import CpuOps
from mambactl.options import ConvertConfig, DistillConfig

SPAN = {"window": 5, "sinks": 2, "device": "cpu"}
KEPT = {"by": "head", "keep_heads": "0.1,1.0,1.1,2.0"}


@pytest.fixture(scope="module")
def llama(save_llama) -> str:
    """A Llama of four layers and two KV heads, with biases."""
    return save_llama(attention_bias=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_sentences(tmp_path_factory.mktemp("text") / "text.jsonl", 0, 60)


@pytest.fixture(scope="module")
def windows(llama, text, tmp_path_factory) -> str:
    """Every layer a window beside a state that turns, aligned."""
    folder = tmp_path_factory.mktemp("windows")
    made = ConvertConfig(by="layer", ratio=1, rotary=True, **SPAN)
    convert.run(made, llama, folder / "made")
    distill.run(trained(text, ["align"]), str(folder / "made"), folder / "aligned")
    return str(folder / "aligned")


def trained(text: str, stages: list[str]) -> DistillConfig:
    return DistillConfig(
        device="cpu", data=[text], stages=stages, max_steps=6, batch_size=2, max_length=48,
        warmup=1, align_steps=3 if len(stages) > 1 else None,
    )  # fmt: skip


@pytest.mark.parametrize("origin", ["made", "taken"])
def test_made_trained_and_decoded(llama, text, windows, tmp_path, origin) -> None:
    fields = {"made": {"rotary": True}, "taken": {"mixers_from": windows}}[origin]
    converted = ConvertConfig(**KEPT, **SPAN, **fields)
    result = convert.run(converted, llama, tmp_path / "student")
    assert describe(result.path)["rotary"]
    config = load_model(result.path).config
    assert config.mixers == ["mamba2_mixed", "attention", "mamba2_mixed", "mamba2_window"]
    turns = [config.layer(index).settings.mamba2.rotary for index in (0, 2, 3)]
    assert turns == [True] * 3
    stages = ["align", "logits"]
    found = distill.run(trained(text, stages), result.path, tmp_path / "out").metrics
    assert found["logits"]["last_loss"] < found["logits"]["first_loss"]

    model = load_model(str(tmp_path / "out"), dtype=torch.float32)
    # turning matters: the same weights in states that stay say something else
    ids = torch.tensor(prompts_of([40]))
    prompts = prompts_of([1, 17, 40])
    expected = plain(model).generate(prompts, GREEDY).tokens
    on_cpu = FusedEngine(model, "ngram", 3, CpuOps(bfloat16=False))
    for engine in (fused(model), fused(model, model, 2), on_cpu):
        assert engine.generate(prompts, GREEDY).tokens == expected
    with torch.no_grad():
        turned = model(ids, use_cache=False).logits
        for index in (0, 2, 3):
            mixer = model.model.layers[index].mixer
            mixer.sizes = mixer.sizes.__class__(**vars(mixer.sizes) | {"rotary": False})
        still = model(ids, use_cache=False).logits
    assert float((turned - still).abs().max()) > 1e-4
