"""Memory nobody wrote holds NaN: whatever reads it would show."""

from collections.abc import Iterator

import pytest
import torch

from mambactl.models.cache import HybridCache


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, as PyTorch does in its deterministic mode."""
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = was


def decode(model, draw_ids, read) -> torch.Tensor:
    """Ragged prompts, drafts, rollbacks, a long block, and a batch that shrinks."""
    cache, ids = HybridCache(model.config, 3, recording=True), draw_ids(3, 200)
    logits = [read(model, cache, ids[:, :9], torch.tensor([9, 0, 4]))]
    for columns, counts, back in (
        (1, [1, 1, 1], 0), (5, [5, 0, 3], 0), (4, [4, 4, 4], 3), (1, [1, 1, 0], 0),
        (70, [70, 3, 0], 0), (6, [6, 6, 6], 6), (2, [2, 1, 2], 1),
    ):  # fmt: skip
        n_new = torch.tensor(counts)
        output = read(model, cache, ids[:, 20 : 20 + columns], n_new)
        logits.append(output[torch.arange(columns) < n_new[:, None]])
        cache.rollback((cache.lengths - back).clamp(min=0).maximum(cache.base))
    cache.reorder(torch.tensor([2, 0]))
    logits.append(read(model, cache, ids[:2, :3]))
    real = torch.arange(9) < torch.tensor([9, 0, 4])[:, None]
    logits[0] = logits[0][real]
    return torch.cat([t.flatten() for t in logits])


def test_nothing_reads_what_nobody_wrote(any_model, draw_ids, read, poison) -> None:
    assert torch.empty(3).isnan().all()
    poisoned = decode(any_model, draw_ids, read)
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert poisoned.isfinite().all()
    assert torch.equal(poisoned, decode(any_model, draw_ids, read))


def test_padding_tokens_never_show(any_model, draw_ids, read) -> None:
    """Columns from n_new on may hold any token."""
    n_new, outputs = torch.tensor([12, 0, 5]), []
    padding = torch.arange(12) >= n_new[:, None]
    for filler in (0, 50):
        cache = HybridCache(any_model.config, 3)
        ids = draw_ids(3, 12).masked_fill(padding, filler)
        first = read(any_model, cache, ids, n_new)[~padding]
        outputs.append((first, read(any_model, cache, draw_ids(3, 1))))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
