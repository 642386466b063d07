"""Blocks of a window with sinks give what its dense mask gives."""

import pytest
import torch

from mambactl.kernels.dispatch import attention
from mambactl.kernels.local_attention import LEAST_BLOCK, local_attention, local_mask

pytestmark = pytest.mark.one_in(3)

HEADS, KV_HEADS, WIDTH = 4, 2, 16


def draw(length: int, generator: torch.Generator) -> list[torch.Tensor]:
    """q, k and v that require gradients."""
    options = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(2, count, length, WIDTH, **options) for count in heads]


@pytest.mark.parametrize("sinks", [0, 3, 24])
@pytest.mark.parametrize("window", [1, 7, LEAST_BLOCK, 21])
@pytest.mark.parametrize("documents", [None, 0.03, 0.2])
def test_blocks_equal_the_dense_mask(window, sinks, documents) -> None:
    """Values and gradients, whole rows and packed ones, lengths around every border."""
    generator = torch.Generator().manual_seed(window)
    for length in (1, 9, 2 * LEAST_BLOCK, 2 * LEAST_BLOCK + 1, 100):
        inputs = draw(length, generator)
        seq_idx = None
        if documents is not None:
            # numbers that come back later are other documents
            changes = torch.rand(2, length, generator=generator) < documents
            seq_idx = changes.cumsum(1) % 2
        y = local_attention(*inputs, window, sinks, seq_idx)
        mask = local_mask(length, window, sinks, seq_idx, y.device)
        expected = attention(*inputs, mask)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        weight = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        found, wanted = (torch.autograd.grad((t * weight).sum(), inputs) for t in (y, expected))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_mask_is_window_and_sinks_of_the_document() -> None:
    seq_idx = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
    mask = local_mask(10, 2, 1, seq_idx, seq_idx.device)[0, 0]
    seen = [[key for key in range(10) if mask[query, key]] for query in range(10)]
    assert seen[:6] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]
    assert seen[6:] == [[6], [6, 7], [6, 7, 8], [6, 8, 9]]


def test_a_text_within_the_window_is_plain_causal_attention() -> None:
    inputs = draw(12, torch.Generator().manual_seed(0))
    assert torch.equal(local_attention(*inputs, 10, 2), attention(*inputs))
    assert not torch.allclose(local_attention(*inputs, 9, 2), attention(*inputs))
