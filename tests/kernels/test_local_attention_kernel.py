"""The fused attention to a window with sinks against its dense mask in fp64.

Scores are fp32 and products take operands in the dtype of q: 2e-6 of the largest value in fp32, in
a half 2^-7 or 2^-10, and no further in the mean than attention under the dense mask whose weights
are rounded to the half before they multiply the values, as in every fused kernel. (PyTorch takes
an unfused one with a mask and shared key heads, which rounds nothing but the result.)
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from mambactl.kernels import dispatch  # noqa: E402
from mambactl.kernels import local_attention as local  # noqa: E402
from mambactl.kernels.sequence import local_attention as kernel  # noqa: E402

pytestmark = pytest.mark.one_in(3)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NEAR = {FP32: 2e-6, BF16: 2**-7, FP16: 2**-10}
KINDS = [BF16, FP32, FP16]
# batch, query heads, key heads, channels
SHAPE = 2, 4, 2, 12
SPANS = [(7, 3), (1, 0), (33, 0), (16, 16), (64, 4), (1, 3)]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Every torch.empty is full of NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def draw(device):
    """draw(length, kind) -> q, k, v as views of one projection of drawn numbers."""

    def drawn(length, kind):
        g = torch.Generator().manual_seed(length)
        batch, heads, shared, width = SHAPE
        row = torch.randn(batch, length, (heads + 2 * shared) * width, generator=g)
        parts = row.to(kind).to(device).unflatten(-1, (-1, width)).transpose(1, 2)
        return parts.split([heads, shared, shared], 1)

    return drawn


def rounded_weights(q, k, v, mask):
    """Attention [B, T, H, P] with fp32 sums, weights in the dtype of q, divided at the end."""
    shared = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(shared, 1) for t in (k, v))
    scores = (q.float() @ k.mT) * q.shape[3] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    y = (weights.to(q.dtype).float() @ v) / weights.sum(-1, keepdim=True)
    return y.to(q.dtype).transpose(1, 2)


def check(found, q, k, v, mask):
    """`found` [B, T, H, P] is attention of q, k, v under the mask."""
    exact = dispatch.attention(q.double(), k.double(), v.double(), mask)
    assert found.dtype == q.dtype and found.shape == exact.shape
    scale = float(exact.abs().max())
    assert float((found.double() - exact).abs().max()) <= NEAR[q.dtype] * scale
    theirs = rounded_weights(q, k, v, mask)
    ours, theirs = (float((t.double() - exact).abs().mean()) for t in (found, theirs))
    assert ours <= 1.1 * theirs + 1e-7 * scale


@pytest.mark.parametrize("length", [100, 1, 64, 5])
@pytest.mark.parametrize("window, sinks", SPANS)
@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "fp32", "fp16"])
def test_whole_rows(draw, kind, window, sinks, length) -> None:
    q, k, v = draw(length, kind)
    mask = local.local_mask(length, window, sinks, None, q.device)
    check(kernel.attend(q, k, v, window, sinks), q, k, v, mask)


def held(t, start, length, window, sinks):
    """Rows [B, H, S + W - 1 + T, P] that a ring gives for tokens from `start` [B] on."""
    rows = []
    for b, begin in enumerate(start):
        at = [*range(sinks), *range(begin - window + 1, begin + length)]
        rows.append(t[b, :, torch.tensor(at, device=t.device).clamp(0, t.shape[2] - 1)])
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 40, 70])
@pytest.mark.parametrize("window, sinks", SPANS)
@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "fp32", "fp16"])
def test_rows_behind_others(draw, kind, window, sinks, length) -> None:
    """A row behind nothing or a few tokens, fewer than sinks, and one behind many."""
    for start in ([0, 90], [2, 31]):
        q, k, v = draw(max(start) + length, kind)
        whole = local.local_mask(q.shape[2], window, sinks, None, q.device)
        begin = torch.tensor(start, device=q.device)
        new = torch.stack([q[b, :, s : s + length] for b, s in enumerate(start)])
        parts = (held(t, start, length, window, sinks) for t in (k, v))
        found = kernel.attend(new, *parts, window, sinks, begin)
        for b, s in enumerate(start):
            mask = whole[:, :, s : s + length]
            row = (t[b : b + 1] for t in (new, k, v))
            check(found[b : b + 1], *row, mask)


@pytest.mark.parametrize("window, sinks", SPANS)
def test_the_mask_behind_others_is_that_of_whole_rows(draw, window, sinks) -> None:
    q, k, v = draw(90, FP32)
    start = torch.tensor([2, 50], device=q.device)
    new = torch.stack([q[b, :, s : s + 40] for b, s in enumerate(start.tolist())])
    parts = [held(t, start.tolist(), 40, window, sinks) for t in (k, v)]
    span = local.LocalSpan(window, sinks, 2)
    found = local.attend_behind(new, *parts, start, span, None, sequential=True)
    whole = dispatch.attention(q, k, v, local.local_mask(90, window, sinks, None, q.device))
    for b, s in enumerate(start.tolist()):
        torch.testing.assert_close(found[b], whole[b, s : s + 40], rtol=1e-5, atol=1e-5)


@pytest.fixture
def asked(monkeypatch):
    """The calls of the kernel."""
    calls = []
    attend = kernel.attend
    spy = lambda *args: calls.append(args) or attend(*args)  # noqa: E731
    monkeypatch.setattr(kernel, "attend", spy)
    return calls


def test_which_calls_the_kernel_serves(monkeypatch, asked, draw) -> None:
    monkeypatch.setattr(dispatch, "triton_missing", lambda device: None)
    monkeypatch.setattr(dispatch, "_no_cuda", lambda device: None)
    q, k, v = draw(40, FP32)
    packed = torch.zeros(2, 40, dtype=torch.long, device=q.device)
    wanted = local.local_attention(q.double(), k.double(), v.double(), 8, 2)
    refused = [
        local.local_attention(q, k, v, 8, 2, packed),
        local.local_attention(q.clone().requires_grad_(), k, v, 8, 2),
    ]
    assert not asked
    served = local.local_attention(q, k, v, 8, 2)
    assert len(asked) == 1
    for y in (*refused, served):
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    local.local_attention(q, k, v, 8, local.MOST_SINKS + 1)
    # short rows, one with a mask and one that sees all
    for window, served in ((30, 2), (38, 2)):
        local.local_attention(q, k, v, window, 2)
        assert len(asked) == served


def test_a_model_continues_a_prompt_through_the_kernel(
    monkeypatch, asked, make_hybrid, device
) -> None:
    """Chunks after the first too, but nothing that a rollback may take back."""
    from mambactl.models.cache import HybridCache

    model = make_hybrid(["mamba2_window"]).to(device)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 30), generator=draw).to(device)

    def logits(fuses, recording=False):
        monkeypatch.setattr(local, "fuses", lambda *tensors: fuses)
        cache = HybridCache(model.config, 2, ids.device, recording=recording)
        with torch.no_grad():
            parts = ids.split([18, 11, 1], 1)
            return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)

    wanted = logits(False)
    assert not asked
    for recording, calls in ((False, 2), (True, 1)):
        found = logits(True, recording)
        assert len(asked) == calls
        asked.clear()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
