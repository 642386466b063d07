"""Work done once for all layers or heads, with the results of doing it for each."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from mambactl.data.pack import Batch
from mambactl.kernels.local_attention import local_attention
from mambactl.kernels.reference import rotated, skip
from mambactl.models import hybrid
from mambactl.models.key_ring import WindowSettings
from mambactl.models.mixers import windowed
from mambactl.models.mixers.attention import RMSNorm
from mambactl.train.optimization import AlignmentObjective

# what finds documents, windows and sinks, and nothing else of a layer
FINDING = ("cummax", "arange", "bitwise_and", "eq", "lt", "le", "ge", "gt")


class Counted(TorchDispatchMode):
    """Counts of the runs of every operator."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_windows_are_found_once_for_all_layers(make_hybrid, draw_ids) -> None:
    counts = []
    for layers in (1, 4):
        model = make_hybrid(["mamba2_window"] * layers, mamba2_window=WindowSettings(16, 2))
        documents = torch.arange(80).expand(2, 80) // 30
        # rows of another seq_idx do more in the recurrence, whose own work is left out
        with Counted() as counted, torch.no_grad():
            hidden, context = model.model.enter(draw_ids(2, 80), seq_idx=documents)
            for layer in model.model.layers:
                layer.mixer.window(hidden, context, None)
        counts.append([counted.found[name] for name in FINDING])
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


def test_so_they_are_for_the_layers_of_a_student_that_is_aligned(
    make_hybrid, draw_ids, monkeypatch
) -> None:
    student = make_hybrid(["mamba2_window"] * 3, mamba2_window=WindowSettings(16, 2))
    teacher = make_hybrid(["attention"] * 3)
    found = []
    for module in (hybrid, windowed):
        wanted = module.local_keys
        monkeypatch.setattr(
            module, "local_keys", lambda *a, w=wanted: found.append(w(*a)) or found[-1]
        )
    ids, documents = draw_ids(2, 80), torch.arange(80).expand(2, 80) // 30
    positions = torch.arange(80).expand(2, 80) % 30
    every = torch.ones_like(ids).bool()
    batch = Batch(ids, documents.int(), positions, every, every)
    AlignmentObjective(student, teacher).backward(batch, 160)
    assert len(found) == 1


@pytest.mark.parametrize("others", [["attention"], ["mamba2_window"]])
def test_the_context_of_another_model_changes_no_window(make_hybrid, draw_ids, others) -> None:
    """Alignment gives a student's mixers what the teacher's blocks get."""
    model = make_hybrid(["mamba2_window"], mamba2_window=WindowSettings(16, 2))
    other = make_hybrid(others, mamba2_window=WindowSettings(5, 1))
    ids, documents = draw_ids(2, 80), torch.arange(80).expand(2, 80) // 30
    hidden, context = model.model.enter(ids, seq_idx=documents)
    _, foreign = other.model.enter(ids, seq_idx=documents)
    window = model.model.layers[0].mixer.window
    with torch.no_grad():
        assert torch.equal(window(hidden, foreign, None), window(hidden, context, None))


def test_masked_attention_has_as_many_heads_of_keys_as_of_queries(monkeypatch) -> None:
    """Otherwise CUDA has no kernel for it that does not keep all scores."""
    seen = []

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((q.shape[1], k.shape[1], attn_mask is None))
        return attend(q, k, v, attn_mask=attn_mask, **options)

    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k = torch.randn(1, 6, 100, 8), torch.randn(1, 2, 100, 8)
    local_attention(q, k, k, 16, 2)
    assert seen == [(2, 2, False)]


def test_queries_and_keys_turn_as_those_of_llama() -> None:
    """To the bit, and gradients as well."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 7, 8, generator=draw, requires_grad=True)
    angles = torch.randn(2, 7, 4, generator=draw).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = apply_rotary_pos_emb(q, q, cos, sin)[0]
    y = rotated(q, cos.unsqueeze(1), sin.unsqueeze(1))
    assert torch.equal(y, expected)
    weight = torch.randn(y.shape, generator=draw)
    ours, theirs = (torch.autograd.grad((t * weight).sum(), q)[0] for t in (y, expected))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_the_norm_rounds_where_that_of_llama_does(weights, states) -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(32, 1e-5), LlamaRMSNorm(32, 1e-5)
    for norm in (ours, theirs):
        norm.weight.data = torch.linspace(0.5, 2, 32).to(weights)
    x = (3 * torch.randn(4, 5, 32, generator=draw)).to(states)
    found, wanted = ours(x), theirs(x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_heads_that_share_x_are_not_copied_for_the_skip(make_hybrid) -> None:
    mixer = make_hybrid(["mamba2"]).model.layers[0].mixer
    s = mixer.sizes
    assert s.n_heads > s.x_heads
    with torch.no_grad():
        mixer.D.copy_(torch.randn(s.n_heads))
    x = torch.randn(2, 5, s.x_heads, s.head_dim)
    with Counted() as counted:
        y = skip(x, mixer.D)
    assert torch.equal(y, mixer.D[:, None] * mixer._heads(x))
    assert set(counted.found) <= {"view", "mul", "unsqueeze", "_unsafe_view", "detach"}
