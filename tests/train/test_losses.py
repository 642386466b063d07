"""The chunked losses against a dense fp64 oracle: values, gradients, masks, tied heads."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambactl.train import losses as module
from mambactl.train.losses import SampledTeacher, Teacher, distillation_loss

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


def _dense(
    hidden, weight, teacher, targets, mask, kl_weight, ce_weight, temperature,
    divergence="forward", beta=0.5,
):  # fmt: skip
    logits = (hidden @ weight.T)[mask]
    guide = (teacher.hidden.double() @ teacher.weight.double().T)[mask]
    log_p = (logits / temperature).log_softmax(-1)
    log_q = (guide / temperature).log_softmax(-1)
    if divergence == "jsd":
        log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
        found = beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
    else:
        found = _kl(log_q, log_p) if divergence == "forward" else _kl(log_p, log_q)
    ce = functional.cross_entropy(logits, targets[mask], reduction="sum")
    return kl_weight * temperature**2 * found + ce_weight * ce


def _kl(log_a, log_b):
    return functional.kl_div(log_b, log_a, log_target=True, reduction="sum")


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


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("temperature", "ce_weight", "beta"), [(1.0, 0.0, 0.5), (0.6, 0.4, 0.1)])
def test_every_divergence_matches_the_dense_oracle(divergence, temperature, ce_weight, beta):
    hidden, weight, teacher, targets, mask = _problem(9)
    setting = {
        "kl_weight": 0.8, "ce_weight": ce_weight, "temperature": temperature,
        "divergence": divergence, "beta": beta,
    }  # fmt: skip
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss = distillation_loss(*leaves, targets, mask, teacher, chunk=4, **setting).total
    oracle = _dense(*exact, teacher, targets, mask, **setting)
    loss.backward()
    oracle.backward()
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-5, atol=1e-6)
    for leaf, wanted in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)


def test_jsd_has_both_kls_as_its_limits():
    """GKD, arXiv 2306.13649: JSD(beta) / beta -> forward KL for beta -> 0, and the reverse at 1."""
    hidden, weight, teacher, targets, mask = _problem(10, torch.float64)
    problem = (hidden, weight, targets, mask, teacher)
    for beta, side, divergence in ((1e-9, 1e-9, "forward"), (1 - 1e-9, 1e-9, "reverse")):
        jsd = distillation_loss(*problem, divergence="jsd", beta=beta).kl / side
        torch.testing.assert_close(
            jsd, distillation_loss(*problem, divergence=divergence).kl, rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("kinds", [("float32", "float32"), ("bfloat16", "bfloat16"),
                                   ("float32", "bfloat16"), ("bfloat16", "float32")])  # fmt: skip
def test_autocast_rounds_no_logit_on_a_cpu(kinds):
    """The oracle works on the same inputs, so only gradients of a 16-bit type are rounded."""
    hidden, weight, teacher, targets, mask = _problem(11)
    leaves = [
        part.to(getattr(torch, kind)).requires_grad_()
        for part, kind in zip((4 * hidden, weight), kinds, strict=True)
    ]
    teacher = Teacher(teacher.hidden.bfloat16(), teacher.weight.bfloat16())
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(*leaves, targets, mask, teacher, ce_weight=0.5).total
    loss.backward()
    oracle = _dense(*exact, teacher, targets, mask, 1.0, 0.5, 1.0)
    oracle.backward()
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-5, atol=0)
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        tolerance = 1e-4 if leaf.dtype == torch.float32 else 2**-8
        scale = float(wanted.grad.abs().max())
        torch.testing.assert_close(
            leaf.grad.double(), wanted.grad, rtol=tolerance, atol=tolerance * scale / 10
        )


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("kind", "bound"), [(torch.float16, 5e-4), (torch.bfloat16, 3e-3)])
def test_operands_in_16_bits(monkeypatch, kind, bound, divergence):
    """The arithmetic of CUDA with fp32 weights under autocast (fp16) and with bf16 ones, done here.

    fp16 keeps the gradients within 1e-3 of fp64, relative in the 2-norm; bf16 cannot.
    """
    draw = torch.Generator().manual_seed(12)
    inputs = [torch.randn(n, 48, generator=draw).bfloat16().float() for n in (40, 301, 40, 301)]
    inputs[2:] = [
        (0.9 * ours + 0.1 * b).bfloat16() for ours, b in zip(*_halves(inputs), strict=True)
    ]
    teacher, targets = Teacher(*inputs[2:]), torch.randint(301, (40,), generator=draw)
    mask = torch.ones(40, dtype=torch.bool)
    plain = module._setting

    def narrow(*args):
        setting = plain(*args)
        scale = 256.0 if kind == torch.float16 else 1.0
        # groups of two chunks, so that products are added up
        return setting._replace(
            dtype=kind, terms=setting.terms._replace(scale=scale), group=2 * setting.chunk
        )

    monkeypatch.setattr(module, "_setting", narrow)
    leaves = [part.clone().requires_grad_() for part in inputs[:2]]
    exact = [part.double().requires_grad_() for part in inputs[:2]]
    loss = distillation_loss(*leaves, targets, mask, teacher, chunk=7, divergence=divergence).total
    loss.backward()
    oracle = _dense(*exact, teacher, targets, mask, 1.0, 0.0, 1.0, divergence)
    oracle.backward()
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)
    for leaf, wanted in zip(leaves, exact, strict=True):
        error = float((leaf.grad.double() - wanted.grad).norm() / wanted.grad.norm())
        assert 1e-5 < error < bound


def _halves(parts):
    return parts[:2], parts[2:]


def test_samples_are_cross_entropy_less_the_entropy():
    hidden, weight, _, targets, mask = _problem(13)
    draw = torch.Generator().manual_seed(14)
    ids = torch.randint(VOCAB, (BATCH, TIME, 6), generator=draw, dtype=torch.int32)
    masses, entropy = torch.rand(BATCH, TIME, 6, generator=draw), torch.rand(BATCH, TIME)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    teacher, setting = SampledTeacher(ids, masses, entropy), {"ce_weight": 0.3, "temperature": 2.0}
    losses = distillation_loss(*leaves, targets, mask, teacher, chunk=4, **setting)
    losses.total.backward()
    log_p = ((exact[0] @ exact[1].T) / 2).log_softmax(-1).gather(-1, ids.long())
    kl = 4 * ((-(masses * log_p).sum(-1) - entropy)[mask]).sum()
    ce = functional.cross_entropy((exact[0] @ exact[1].T)[mask], targets[mask], reduction="sum")
    (kl + 0.3 * ce).backward()
    torch.testing.assert_close(losses.kl.double(), kl, rtol=1e-5, atol=0)
    for leaf, wanted in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",), ("hidden", "weight")])
def test_no_gradient_is_made_of_what_is_frozen(frozen):
    hidden, weight, teacher, targets, mask = _problem(15)
    leaves = {"hidden": hidden, "weight": weight}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    with _Watch() as watch:
        loss = distillation_loss(
            hidden, weight, targets, mask, teacher, chunk=int(mask.sum())
        ).total
    # a product for the logits of each model, and one for each gradient
    assert watch.products == 4 - len(frozen)
    assert loss.requires_grad == (len(frozen) < 2)
    if loss.requires_grad:
        loss.backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name in frozen)


def test_what_cannot_be_meant_is_refused():
    problem = _problem(16)
    samples = SampledTeacher(torch.zeros(BATCH, TIME, 1).long(), *torch.ones(2, BATCH, TIME, 1))
    for wrong, sentence in (
        ({"divergence": "chi2"}, "unknown divergence 'chi2': one of forward, reverse, jsd"),
        ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0"),
        ({"divergence": "reverse", "teacher": samples}, "estimate the forward KL, not reverse"),
    ):
        fields = {"teacher": problem[2], **wrong}
        with pytest.raises(ValueError, match=sentence):
            distillation_loss(problem[0], problem[1], problem[3], problem[4], **fields)


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
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    teacher = Teacher(torch.randn(tokens, 6), torch.randn(vocab, 6))
    targets, mask = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens, dtype=torch.bool)
    with _Watch() as watch:
        distillation_loss(hidden, weight, targets, mask, teacher, chunk=chunk).total.backward()
    assert chunk * vocab <= watch.largest < tokens * vocab


class _Watch(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, and matrix products."""

    largest = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return out


def test_vocabularies_of_different_size_are_refused():
    hidden, weight, teacher, targets, mask = _problem(7)
    smaller = Teacher(teacher.hidden, teacher.weight[:-1])
    with pytest.raises(ValueError, match="vocabularies differ: 36 and 37"):
        distillation_loss(hidden, weight, targets, mask, smaller)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("kind", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("vocab", [1009, 4096 + 8])
def test_mixed_precision_on_a_gpu(monkeypatch, divergence, kind, bound, vocab):
    """Weights of fp32 or bf16 under autocast, several groups, and no wait for the device."""
    draw = torch.Generator().manual_seed(8)
    hidden = 4 * torch.randn(96, 64, generator=draw).bfloat16()
    weight = torch.randn(vocab, 64, generator=draw).bfloat16()
    other = 0.1 * torch.randn(96, 64, generator=draw)
    teacher = Teacher((hidden + other).bfloat16(), weight + weight.roll(1, 0) / 16)
    targets = torch.randint(vocab, (96,), generator=draw)
    mask = torch.rand(96, generator=draw) > 0.2
    leaves = [part.to(kind).cuda().requires_grad_() for part in (hidden, weight)]
    on_gpu, inputs = Teacher(*(part.cuda() for part in teacher)), (targets.cuda(), mask.cuda())
    monkeypatch.setattr(module, "GROUP_BYTES", 64 * vocab * 2)

    def loss():
        with torch.autocast("cuda", torch.bfloat16):
            return distillation_loss(
                *leaves, *inputs, on_gpu, ce_weight=0.2, chunk=32, divergence=divergence
            ).total

    # compiles
    loss()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = loss()
        found.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = [part.double().requires_grad_() for part in (hidden, weight)]
    oracle = _dense(*exact, teacher, targets, mask, 1.0, 0.2, 1.0, divergence)
    oracle.backward()
    assert found.item() == pytest.approx(oracle.item(), rel=1e-5)
    assert leaves[0].grad[~mask.cuda()].abs().max() == 0
    for leaf, wanted in zip(leaves, exact, strict=True):
        distance = (leaf.grad.double().cpu() - wanted.grad).norm() / wanted.grad.norm()
        assert leaf.grad.dtype == kind and distance < bound
