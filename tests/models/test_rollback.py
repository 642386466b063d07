"""Rollback: bitwise the cache that never went further, for every length and every row."""

import pytest
import torch
from torch import Tensor

from mambactl.models.cache import (
    MAX_SEQUENTIAL,
    AttentionCache,
    HybridCache,
    MixedCache,
    RecurrentCache,
)

PROMPTS = torch.tensor([5, 1, 9])
SINGLES, BLOCK = 3, 5
AFTER = SINGLES + BLOCK


@pytest.fixture
def ids(draw_ids) -> Tensor:
    return draw_ids(3, 200)


@pytest.fixture
def prompted(any_model, ids, read) -> HybridCache:
    """A recording cache that holds the ragged prompts."""
    return prompt(any_model, ids, read)


def prompt(model, ids: Tensor, read) -> HybridCache:
    cache = HybridCache(model.config, len(ids), recording=True)
    lengths = PROMPTS[: len(ids)]
    read(model, cache, ids[:, : int(lengths.max())], lengths)
    return cache


def go_further(model, cache: HybridCache, ids: Tensor, read, targets: Tensor | None = None) -> None:
    """Single steps as a draft model's, then a block; up to targets [B] tokens after the prompts.

    Calls that would add no token to any row are left out.
    """
    start = cache.lengths
    targets = torch.full_like(start, AFTER) if targets is None else targets
    for columns in [1] * SINGLES + [BLOCK]:
        n_new = (start + targets - cache.lengths).clamp(0, columns)
        if bool(n_new.any()):
            index = cache.lengths[:, None] + torch.arange(columns)
            read(model, cache, ids.gather(1, index), n_new)


def assert_same_keys(left: AttentionCache, right: AttentionCache, lengths: Tensor) -> None:
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(left.keys[row, :, :length], right.keys[row, :, :length])
        assert torch.equal(left.values[row, :, :length], right.values[row, :, :length])


def assert_same_content(a: HybridCache, b: HybridCache) -> None:
    """Equal lengths, states, conv windows, keys and values, bit for bit."""
    assert a.lengths.tolist() == b.lengths.tolist()
    for left, right in zip(a.layers, b.layers, strict=True):
        if not isinstance(left, RecurrentCache):
            assert_same_keys(left, right, a.lengths)
            continue
        if isinstance(left, MixedCache):
            assert_same_keys(left.kept, right.kept, a.lengths)
        assert torch.equal(left.live, right.live)
        windows = (
            layer.conv_inputs(cache.cursor(None), 3) for layer, cache in ((left, a), (right, b))
        )
        assert torch.equal(*windows)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shift", range(AFTER + 1))
def test_every_length_in_every_row(any_model, ids, read, shift, batch) -> None:
    ids = ids[:batch]
    targets = (torch.arange(batch) * 4 + shift) % (AFTER + 1)
    if batch > 1:
        # the longest row sets how many key slots a call reads: it goes to the end in both
        targets[-1] = AFTER
    further, never = (prompt(any_model, ids, read) for _ in range(2))
    go_further(any_model, further, ids, read)
    further.rollback(PROMPTS[:batch] + targets)
    go_further(any_model, never, ids, read, targets)
    other = ids.flip(1)
    for columns, counts in ((1, [1, 1, 1]), (4, [3, 0, 4]), (1, [1, 1, 1])):
        n_new = torch.tensor(counts[:batch])
        logits, expected = (
            read(any_model, cache, other[:, :columns], n_new) for cache in (further, never)
        )
        real = torch.arange(columns) < n_new[:, None]
        assert torch.equal(logits[real], expected[real])
        assert_same_content(further, never)


def test_rejected_drafts_never_show(any_model, ids, prompted, read, uncached, assert_close) -> None:
    """Draft and reject for a while; what remains equals reading the kept tokens at once."""
    kept = [ids[b, :n].tolist() for b, n in enumerate(PROMPTS.tolist())]
    for turn in range(6):
        block = torch.randint(3, 97, (3, 4), generator=torch.Generator().manual_seed(turn))
        logits = read(any_model, prompted, block, torch.tensor([4, 2, 4]))
        accepted = torch.tensor([[0, 2, 4], [1, 1, 3], [4, 0, 0]])[turn % 3]
        prompted.rollback(prompted.lengths - torch.tensor([4, 2, 4]) + accepted)
        for row, count in enumerate(accepted.tolist()):
            kept[row] += block[row, :count].tolist()
            if count:
                alone = uncached(any_model, torch.tensor([kept[row]]))[0, -count:]
                assert_close(logits[row, :count], alone)
    assert prompted.lengths.tolist() == [len(row) for row in kept]


def test_lengths_out_of_reach_are_refused(mixed_model, ids, read) -> None:
    cache = prompt(mixed_model, ids, read)
    go_further(mixed_model, cache, ids, read)
    for wrong in (PROMPTS - torch.tensor([0, 0, 1]), cache.lengths + torch.tensor([0, 1, 0])):
        with pytest.raises(ValueError, match="permanent"):
            cache.rollback(wrong)
    cache.rollback(PROMPTS + 4)
    read(mixed_model, cache, ids[:, :1])
    with pytest.raises(ValueError, match="permanent"):
        cache.rollback(PROMPTS + 3)


def test_rollbacks_without_a_forward_between_add_up(mixed_model, ids, read) -> None:
    twice, once = (prompt(mixed_model, ids, read) for _ in range(2))
    for cache in (twice, once):
        go_further(mixed_model, cache, ids, read)
    twice.rollback(PROMPTS + torch.tensor([6, 7, 8]))
    for cache in (twice, once):
        cache.rollback(PROMPTS + torch.tensor([2, 7, 0]))
    assert torch.equal(*(read(mixed_model, cache, ids[:, 50:51]) for cache in (twice, once)))
    assert_same_content(twice, once)


def test_mark_after_a_rollback_keeps_the_shorter_text(mixed_model, ids, read) -> None:
    marked, plain = (prompt(mixed_model, ids, read) for _ in range(2))
    for cache in (marked, plain):
        go_further(mixed_model, cache, ids, read)
        cache.rollback(PROMPTS + 2)
    marked.mark()
    assert torch.equal(*(read(mixed_model, cache, ids[:, 50:51]) for cache in (marked, plain)))


def test_mark_makes_everything_permanent(mixed_model, ids, read) -> None:
    marked, plain = (prompt(mixed_model, ids, read) for _ in range(2))
    for cache in (marked, plain):
        go_further(mixed_model, cache, ids, read)
    marked.mark()
    for cache in (marked, plain):
        read(mixed_model, cache, ids[:, 50:52])
    with pytest.raises(ValueError, match="permanent"):
        marked.rollback(marked.lengths - 3)
    marked.rollback(marked.lengths - 1)
    plain.rollback(plain.lengths - 1)
    assert torch.equal(*(read(mixed_model, cache, ids[:, 60:61]) for cache in (marked, plain)))


def test_a_cache_that_records_nothing_cannot_go_back(mixed_model, ids, read) -> None:
    cache = HybridCache(mixed_model.config, 3)
    read(mixed_model, cache, ids[:, :4])
    with pytest.raises(ValueError, match="recording=True"):
        cache.rollback(cache.lengths - 1)
    cache.mark()
    assert cache.lengths.tolist() == [4, 4, 4]


@pytest.mark.parametrize("back", [0, 3], ids=["straight", "after a rollback"])
def test_a_long_block_becomes_permanent(
    any_model, ids, prompted, read, uncached, assert_close, back
) -> None:
    go_further(any_model, prompted, ids, read)
    prompted.rollback(prompted.lengths - back)
    block = MAX_SEQUENTIAL + 6
    index = prompted.lengths[:, None] + torch.arange(block + 1)
    tokens = ids.gather(1, index)
    n_new = torch.tensor([block, 40, 0])
    read(any_model, prompted, tokens[:, :block], n_new)
    with pytest.raises(ValueError, match="permanent"):
        prompted.rollback(prompted.lengths - 1)
    logits = read(any_model, prompted, tokens.gather(1, n_new[:, None]))
    for row, length in enumerate(prompted.lengths.tolist()):
        assert_close(logits[row, 0], uncached(any_model, ids[row : row + 1, :length])[0, -1])
    prompted.rollback(prompted.lengths - 1)
    again = read(any_model, prompted, tokens.gather(1, n_new[:, None]))
    assert torch.equal(again, logits)


def test_recording_can_end(any_model, ids, prompted, read, uncached, assert_close) -> None:
    read(any_model, prompted, ids.gather(1, PROMPTS[:, None] + torch.arange(2)))
    prompted.recording = False
    for _ in range(2):
        logits = read(any_model, prompted, ids.gather(1, prompted.lengths[:, None]))
    for row, length in enumerate(prompted.lengths.tolist()):
        assert_close(logits[row, 0], uncached(any_model, ids[row : row + 1, :length])[0, -1])


def test_crop_shortens_rows_and_columns(mixed_model, ids, read, uncached, assert_close) -> None:
    cache = HybridCache(mixed_model.config, 3, recording=True)
    for place in range(8):
        read(mixed_model, cache, ids[:, place : place + 1])
    for argument, length in ((9, 8), (6, 6), (-2, 4)):
        cache.crop(argument)
        assert cache.lengths.tolist() == [length] * 3
        assert cache.get_seq_length() == length
    logits = read(mixed_model, cache, ids[:, 4:5])
    assert_close(logits[:, 0], uncached(mixed_model, ids[:, :5])[:, -1])
