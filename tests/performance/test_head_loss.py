"""Claims about a loss: its errors, and how much it computes."""

import pytest
import torch
from torch.nn import functional

from tests.performance.head_loss import Size, draw_inputs, head_loss, oracle

SIZE, CPU = Size(24, 16, 101), torch.device("cpu")


def plain(hidden, weight, targets, mask, teacher_hidden, teacher_weight):
    log_p, log_q = (
        (state.float() @ head.float().T).log_softmax(-1)
        for state, head in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    return functional.kl_div(log_p, log_q, log_target=True, reduction="sum")


def test_the_oracle_is_autograd_in_fp64():
    inputs = draw_inputs(SIZE, CPU, torch.float32, 0)
    leaves = [part.detach().double().requires_grad_() for part in inputs[:2]]
    teacher = [part.double() for part in inputs[4:]]
    log_p, log_q = ((a @ b.T).log_softmax(-1) for a, b in (leaves, teacher))
    value = functional.kl_div(log_p, log_q, log_target=True, reduction="sum")
    value.backward()
    found = oracle(inputs)
    for ours, wanted in zip(found, (value, *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert 1e-3 < value.item() / SIZE.tokens < 1


def test_the_numbers_of_a_right_loss_and_of_a_wrong_one():
    found = head_loss(plain, SIZE, CPU, torch.float32, 1, 2)
    assert (found["tokens"], found["hidden"], found["vocab"]) == SIZE
    products = 8 * SIZE.tokens * SIZE.hidden * SIZE.vocab
    assert found["flops_per_second"] * found["milliseconds"] == pytest.approx(1e3 * products)
    errors = [found[f"error_{name}"] for name in ("value", "hidden_gradient", "weight_gradient")]
    assert max(errors) < 1e-4 and found["peak_bytes"] >= 0
    wrong = head_loss(lambda *inputs: 1.25 * plain(*inputs), SIZE, CPU, torch.float32, 0, 1)
    for name in ("value", "hidden_gradient", "weight_gradient"):
        assert wrong[f"error_{name}"] == pytest.approx(0.25, rel=1e-3)


def test_inputs_are_fresh_and_hold_numbers_of_the_type():
    one, two = (draw_inputs(SIZE, CPU, torch.bfloat16, seed) for seed in (0, 1))
    assert not torch.equal(one.hidden, two.hidden)
    assert torch.equal(one.weight, one.weight.bfloat16().float())
    assert (one.hidden.dtype, one.teacher_weight.dtype) == (torch.float32, torch.bfloat16)
