"""Documents packed in one row neither see nor change each other."""

import pytest
import torch
from torch import Tensor

from mambactl.models.cache import HybridCache

CUTS = [0, 13, 14, 16, 50, 80]


def number(*names: int) -> Tensor:
    """seq_idx [1, T] that gives the documents between CUTS these numbers."""
    lengths = torch.tensor(CUTS).diff()
    return torch.tensor(names).repeat_interleave(lengths)[None]


def restarting() -> Tensor:
    """position_ids [1, T] that begin at 0 in every document."""
    return torch.cat([torch.arange(n) for n in torch.tensor(CUTS).diff()])[None]


@pytest.fixture
def apart(any_model, draw_ids, uncached) -> Tensor:
    """Logits [1, T, V] of every document on its own."""
    ids = draw_ids(1, CUTS[-1])
    spans = zip(CUTS, CUTS[1:], strict=False)
    return torch.cat([uncached(any_model, ids[:, start:stop]) for start, stop in spans], 1)


@pytest.mark.parametrize(
    "how",
    [
        {"seq_idx": number(0, 1, 2, 3, 4)},
        {"seq_idx": number(5, 6, 5, 6, 5)},
        {"position_ids": restarting()},
        {"seq_idx": number(0, 1, 2, 3, 4), "position_ids": restarting()},
    ],
    ids=["numbers", "returning numbers", "positions", "both"],
)
@pytest.mark.parametrize("use_cache", [False, None], ids=["uncached", "default"])
def test_packed_equals_apart(any_model, draw_ids, assert_close, apart, how, use_cache) -> None:
    ids = draw_ids(1, CUTS[-1])
    with torch.no_grad():
        outputs = any_model(ids, use_cache=use_cache, **how)
        whole = any_model(ids, use_cache=False).logits
    assert_close(outputs.logits, apart)
    assert outputs.past_key_values is None
    assert not torch.allclose(whole[:, 20:], apart[:, 20:], atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_rows_may_be_padded(any_model, draw_ids, uncached, assert_close, apart, side):
    ids, length = draw_ids(1, CUTS[-1]), CUTS[-1] + 7
    span = slice(7, length) if side == "left" else slice(0, CUTS[-1])
    padded, mask, seq_idx, positions = torch.zeros(4, 1, length, dtype=torch.long)
    padded[:, span], mask[:, span] = ids, 1
    seq_idx[:, span], positions[:, span] = number(3, 4, 3, 5, 6), restarting()
    for how in ({"seq_idx": seq_idx}, {"position_ids": positions}):
        logits = uncached(any_model, padded, attention_mask=mask, **how)
        assert_close(logits[:, span], apart)


def test_positions_of_padding_are_no_documents(mixed_model, draw_ids, assert_close, uncached):
    """generate() numbers padding too, and must still get its cache."""
    ids, mask = draw_ids(1, 9), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        outputs = mixed_model(ids, attention_mask=mask, position_ids=positions)
    assert outputs.past_key_values.lengths.tolist() == [6]
    assert_close(outputs.logits[:, 3:], uncached(mixed_model, ids[:, 3:]))


def test_a_packed_row_takes_no_cache(mixed_model, draw_ids) -> None:
    cache = HybridCache(mixed_model.config, 1)
    with pytest.raises(ValueError, match="packed"):
        mixed_model(draw_ids(1, 80), seq_idx=number(0, 1, 2, 3, 4), past_key_values=cache)


def test_windows_of_attention_count_tokens_not_positions(make_hybrid, draw_ids, uncached,
                                                         assert_close) -> None:  # fmt: skip
    model = make_hybrid(["attention", "mamba2"], sliding_window=6)
    ids = draw_ids(1, CUTS[-1])
    packed = uncached(model, ids, position_ids=restarting())
    for start, stop in zip(CUTS, CUTS[1:], strict=False):
        assert_close(packed[:, start:stop], uncached(model, ids[:, start:stop]))
