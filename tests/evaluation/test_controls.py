"""Controls equal models built to be what they claim, and leave no trace."""

import copy

import pytest
import torch

from mambactl.errors import UsageError
from mambactl.evaluation.controls import ablated, windowed_attention
from mambactl.models.key_ring import WindowSettings

LENGTH, WINDOW, SINKS = 40, 7, 3


@pytest.fixture(scope="module")
def teacher(make_hybrid):
    return make_hybrid(["attention"] * 3, seed=1)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids, **keywords):
    return model(ids, use_cache=False, **keywords).logits


def test_a_window_without_sinks_is_sliding_window_attention(teacher, make_hybrid, ids):
    expected = make_hybrid(["attention"] * 3, seed=1, sliding_window=WINDOW)
    with windowed_attention(teacher, range(3), WINDOW, 0):
        found = logits(teacher, ids)
    torch.testing.assert_close(found, logits(expected, ids), rtol=1e-4, atol=1e-4)
    assert float((found - logits(teacher, ids)).abs().max()) > 0.1


def test_a_window_that_holds_everything_changes_nothing_and_none_stays(teacher, ids):
    before = logits(teacher, ids)
    with windowed_attention(teacher, [0, 2], LENGTH, 0):
        torch.testing.assert_close(logits(teacher, ids), before, rtol=1e-4, atol=1e-4)
    with windowed_attention(teacher, [0, 2], 1, 0):
        assert float((logits(teacher, ids) - before).abs().max()) > 0.1
    assert torch.equal(logits(teacher, ids), before)


def test_only_window_and_sinks_are_seen(make_hybrid, ids):
    model = make_hybrid(["attention"], seed=2)
    hidden = model.model.embed_tokens(ids).detach().requires_grad_()
    with windowed_attention(model, [0], WINDOW, SINKS):
        model(inputs_embeds=hidden, use_cache=False).logits[:, -1].square().sum().backward()
    seen = hidden.grad.abs().sum((0, 2)) > 0
    wanted = torch.zeros(LENGTH, dtype=torch.bool)
    wanted[:SINKS] = wanted[-WINDOW:] = True
    assert torch.equal(seen, wanted)


def test_packed_documents_have_their_own_sinks(teacher, ids):
    """Two documents in one row give what each gives alone."""
    first, second = ids[:1, :18], ids[:1, 18:]
    places = torch.cat([torch.arange(18), torch.arange(LENGTH - 18)])[None]
    number = (torch.arange(LENGTH) >= 18).int()[None]
    with windowed_attention(teacher, range(3), WINDOW, SINKS):
        whole = logits(teacher, ids[:1], position_ids=places, seq_idx=number)
        parts = torch.cat([logits(teacher, first), logits(teacher, second)], 1)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_padded_rows_equal_their_own_documents(teacher, ids):
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    with windowed_attention(teacher, range(3), WINDOW, SINKS):
        padded = logits(teacher, ids, attention_mask=mask)[1, :25]
        alone = logits(teacher, ids[1:, :25])[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


MIXED, WINDOWED = ["mamba2", "attention", "mamba1"], ["mamba2_window", "attention"]


@pytest.mark.parametrize(
    ("mixers", "branch", "silent"),
    [
        (MIXED, "recurrent", "mamba.out_proj"),
        (MIXED, "attention", "self_attn.o_proj"),
        (WINDOWED, "recurrent", "mamba.out_proj"),
        (WINDOWED, "window", "mamba.window.o_proj"),
    ],
)
def test_an_ablated_branch_is_one_whose_output_projection_is_zero(
    make_hybrid, ids, mixers, branch, silent
):
    model = make_hybrid(mixers, seed=3, mamba2_window=WindowSettings(WINDOW, SINKS))
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if silent in name:
                parameter.zero_()
    before = logits(model, ids)
    with ablated(model, branch):
        found = logits(model, ids)
    torch.testing.assert_close(found, logits(expected, ids), rtol=1e-5, atol=1e-5)
    assert float((found - before).abs().max()) > 0.1
    assert torch.equal(logits(model, ids), before)


def test_a_window_that_is_not_there_cannot_be_silenced(make_hybrid):
    with (
        pytest.raises(UsageError, match="no window layer to ablate"),
        ablated(make_hybrid(["mamba2", "attention"]), "window"),
    ):
        pass


def test_what_is_not_there_cannot_be_controlled(teacher, make_hybrid):
    with (
        pytest.raises(UsageError, match="no recurrent layer to ablate"),
        ablated(teacher, "recurrent"),
    ):
        pass
    hybrid = make_hybrid(["mamba2", "attention"])
    with (
        pytest.raises(UsageError, match=r"no attention in the layers \[0\]"),
        windowed_attention(hybrid, [0, 1], 4, 0),
    ):
        pass
    with pytest.raises(ValueError, match="no cache"), windowed_attention(hybrid, [1], 4, 0):
        hybrid(torch.ones(1, 4, dtype=torch.long), use_cache=True)
