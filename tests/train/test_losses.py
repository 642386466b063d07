"""The chunked losses against a dense fp64 oracle: values, gradients, masks, tied heads."""

import pytest
import torch
from torch.nn import functional

from mambactl.train.losses import Teacher, distillation_loss

BATCH, TIME, WIDTH, TEACHER_WIDTH, VOCAB = 3, 7, 5, 9, 37


def _problem(seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(BATCH, TIME, WIDTH, generator=draw, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64)
    teacher = Teacher(
        torch.randn(BATCH, TIME, TEACHER_WIDTH, generator=draw, dtype=torch.float64).to(dtype),
        torch.randn(VOCAB, TEACHER_WIDTH, generator=draw, dtype=torch.float64).to(dtype),
    )
    targets = torch.randint(VOCAB, (BATCH, TIME), generator=draw)
    mask = torch.rand(BATCH, TIME, generator=draw) > 0.3
    return hidden.to(dtype), weight.to(dtype), teacher, targets, mask


def _dense(hidden, weight, teacher, targets, mask, kl_weight, ce_weight, temperature):
    logits = (hidden @ weight.T)[mask]
    guide = (teacher.hidden.double() @ teacher.weight.double().T)[mask]
    kl = functional.kl_div(
        (logits / temperature).log_softmax(-1),
        (guide / temperature).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    ce = functional.cross_entropy(logits, targets[mask], reduction="sum")
    return kl_weight * temperature**2 * kl + ce_weight * ce


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize(
    ("kl_weight", "ce_weight", "temperature"), [(1.0, 0.0, 1.0), (0.3, 0.7, 2.5), (0.0, 1.0, 1.0)]
)
def test_value_and_gradients_match_the_dense_oracle(chunk, kl_weight, ce_weight, temperature):
    hidden, weight, teacher, targets, mask = _problem(0)
    hidden.requires_grad_()
    weight.requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    weights = {"kl_weight": kl_weight, "ce_weight": ce_weight, "temperature": temperature}

    losses = distillation_loss(hidden, weight, targets, mask, teacher, chunk=chunk, **weights)
    oracle = _dense(exact_hidden, exact_weight, teacher, targets, mask, **weights)
    (losses.total / mask.sum()).backward()
    (oracle / mask.sum()).backward()

    torch.testing.assert_close(losses.total.double(), oracle, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-6)


def test_kl_and_ce_are_reported_apart():
    hidden, weight, teacher, targets, mask = _problem(1)
    losses = distillation_loss(hidden, weight, targets, mask, teacher, kl_weight=0.5, ce_weight=2.0)
    exact = (hidden.double(), weight.double(), teacher, targets, mask)
    torch.testing.assert_close(losses.kl.double(), _dense(*exact, 1.0, 0.0, 1.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.ce.double(), _dense(*exact, 0.0, 1.0, 1.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.total, 0.5 * losses.kl + 2 * losses.ce)


def test_only_unmasked_tokens_count():
    hidden, weight, teacher, targets, _ = _problem(2)
    mask = torch.zeros(BATCH, TIME, dtype=torch.bool)
    mask[1, 3] = True
    hidden.requires_grad_()
    loss = distillation_loss(hidden, weight, targets, mask, teacher).total
    loss.backward()
    exact = (hidden.detach().double(), weight.double(), teacher, targets, mask)
    torch.testing.assert_close(loss.double(), _dense(*exact, 1.0, 0.0, 1.0), rtol=1e-5, atol=1e-6)
    assert hidden.grad[~mask].abs().max() == 0
    assert hidden.grad[1, 3].abs().max() > 0


def test_nothing_unmasked_is_zero():
    hidden, weight, teacher, targets, mask = _problem(3)
    loss = distillation_loss(hidden, weight, targets, torch.zeros_like(mask), teacher).total
    assert loss == 0


def test_a_tied_head_gets_both_gradients():
    _, weight, teacher, targets, mask = _problem(4)
    ids = torch.randint(VOCAB, (BATCH, TIME), generator=torch.Generator().manual_seed(5))
    tied = weight.clone().requires_grad_()
    exact = weight.double().requires_grad_()
    distillation_loss(tied[ids].tanh(), tied, targets, mask, teacher).total.backward()
    _dense(exact[ids].tanh(), exact, teacher, targets, mask, 1.0, 0.0, 1.0).backward()
    torch.testing.assert_close(tied.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_gradcheck_in_fp64():
    hidden, weight, teacher, targets, mask = _problem(6, torch.float64)

    def total(hidden, weight):
        return distillation_loss(
            hidden, weight, targets, mask, teacher, ce_weight=0.4, temperature=1.7, chunk=4
        ).total

    assert torch.autograd.gradcheck(total, (hidden.requires_grad_(), weight.requires_grad_()))


def test_no_tensor_of_all_logits_exists():
    tokens, vocab, chunk = 64, 501, 8
    largest = _largest_tensor(tokens, vocab, chunk)
    assert largest < tokens * vocab
    assert largest >= chunk * vocab


def _largest_tensor(tokens, vocab, chunk):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            self.largest = max([self.largest, *sizes])
            return out

    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    teacher = Teacher(torch.randn(tokens, 6), torch.randn(vocab, 6))
    targets, mask = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens, dtype=torch.bool)
    with Watch() as watch:
        distillation_loss(hidden, weight, targets, mask, teacher, chunk=chunk).total.backward()
    return watch.largest


def test_vocabularies_of_different_size_are_refused():
    hidden, weight, teacher, targets, mask = _problem(7)
    smaller = Teacher(teacher.hidden, teacher.weight[:-1])
    with pytest.raises(ValueError, match="vocabularies differ: 36 and 37"):
        distillation_loss(hidden, weight, targets, mask, smaller)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mixed_precision_on_a_gpu_keeps_fp32_logits():
    draw = torch.Generator().manual_seed(8)
    hidden = 4 * torch.randn(96, 64, generator=draw).bfloat16()
    weight = torch.randn(1009, 64, generator=draw).bfloat16()
    teacher = Teacher(
        4 * torch.randn(96, 64, generator=draw).bfloat16(),
        torch.randn(1009, 64, generator=draw).bfloat16(),
    )
    targets, mask = torch.randint(1009, (96,), generator=draw), torch.ones(96, dtype=torch.bool)
    leaf = hidden.float().cuda().requires_grad_()
    head = weight.float().cuda().requires_grad_()
    on_gpu = Teacher(teacher.hidden.cuda(), teacher.weight.cuda())
    with torch.autocast("cuda", torch.bfloat16):
        loss = distillation_loss(leaf, head, targets.cuda(), mask.cuda(), on_gpu, chunk=40).total
    loss.backward()

    exact, exact_head = hidden.double().requires_grad_(), weight.double().requires_grad_()
    oracle = _dense(exact, exact_head, teacher, targets, mask, 1.0, 0.0, 1.0)
    oracle.backward()
    assert float(loss) == pytest.approx(float(oracle), rel=1e-5)
    for got, wanted in ((leaf.grad, exact.grad), (head.grad, exact_head.grad)):
        distance = (got.double().cpu() - wanted).norm() / wanted.norm()
        assert got.dtype == torch.float32 and distance < 1e-2
