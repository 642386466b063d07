"""A student that writes on a GPU: captured graphs read the weights of every step."""

import json

import pytest
import torch

from mambactl.commands.distill import run
from mambactl.decode.refresh import DecodingCopy
from mambactl.decode.sampler import SamplingParams
from mambactl.options import DistillConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIXED = ["mamba2", "attention", "mamba1", "mamba2_window", "mamba2_mixed"]
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13], [14]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_replay_with_the_weights_of_the_last_refresh(make_hybrid, dtype) -> None:
    model, other = (make_hybrid(MIXED, seed=seed).to("cuda") for seed in (4, 5))
    copy = DecodingCopy(model, {name for name, _ in model.named_parameters()}, dtype)
    fresh = DecodingCopy(other, (), dtype)
    greedy = SamplingParams(max_new_tokens=24)
    for each in (copy, fresh):
        each.reserve(4, 40)
    # the second reading of a length is captured too
    before = [copy.generate(PROMPTS, greedy, range(4)).tokens for _ in range(3)]
    assert before[0] == before[1] == before[2]
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        copy.refresh()
    assert torch.cuda.memory_allocated() == held
    after = copy.generate(PROMPTS, greedy, range(4)).tokens
    assert after == fresh.generate(PROMPTS, greedy, range(4)).tokens != before[0]


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_the_stage_trains(save_student, random_texts, tmp_path, capture, compiles) -> None:
    config = DistillConfig(
        device="cuda", data=[str(random_texts)], stages=["onpolicy"], max_steps=24, batch_size=4,
        max_length=64, onpolicy_tokens=16, onpolicy_share=0.5, warmup=1, lr=5e-3, rest_lr=2e-3,
        capture=capture, compile=compiles,
    )  # fmt: skip
    out = tmp_path / "out"
    run(config, str(save_student(tmp_path / "student")), out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(line["written_tokens"] > 0 for line in lines)
