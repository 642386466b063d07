"""Rows, growth and size of a cache."""

import pytest
import torch

from mambactl.models.cache import AttentionCache, HybridCache


@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 0, 2]])
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "rolled back"])
def test_reordered_rows_continue_their_own_text(
    any_model, draw_ids, read, uncached, assert_close, rows, pending
) -> None:
    ids, prompts = draw_ids(3, 40), torch.tensor([12, 4, 7])
    cache = HybridCache(any_model.config, 3, recording=True)
    read(any_model, cache, ids[:, :12], prompts)
    read(any_model, cache, ids.gather(1, prompts[:, None] + torch.arange(5)))
    if pending:
        cache.rollback(prompts + torch.tensor([1, 5, 0]))
    lengths = cache.lengths[rows]
    cache.reorder(torch.tensor(rows))
    assert cache.lengths.tolist() == lengths.tolist()
    assert cache.max_batch_size == len(rows)
    logits = read(any_model, cache, ids[rows].gather(1, lengths[:, None] + torch.arange(2)))
    for place, row in enumerate(rows):
        stop = int(lengths[place]) + 2
        assert_close(logits[place], uncached(any_model, ids[row : row + 1, :stop])[0, -2:])


def test_repeated_rows_go_separate_ways(mixed_model, draw_ids, read, uncached,
                                        assert_close) -> None:  # fmt: skip
    ids, after = draw_ids(1, 10), draw_ids(3, 4, seed=1)
    cache = HybridCache(mixed_model.config, 1)
    read(mixed_model, cache, ids)
    cache.reorder_cache(torch.tensor([0, 0, 0]))
    for place in range(4):
        logits = read(mixed_model, cache, after[:, place : place + 1])
    whole = torch.cat([ids.expand(3, -1), after], 1)
    assert_close(logits[:, 0], uncached(mixed_model, whole)[:, -1])


def test_recurrent_bytes_do_not_depend_on_the_text(make_hybrid, draw_ids, read) -> None:
    model = make_hybrid(["mamba2", "mamba1"])
    two, one = model.config.section("mamba2"), model.config.section("mamba1")
    floats = two.n_heads * two.head_dim * two.d_state + 3 * two.conv_dim
    floats += one.d_inner * one.d_state + 3 * one.d_inner
    cache = HybridCache(model.config, 2)
    assert cache.nbytes() == 0
    for length in (1, 80, 1, 3):
        read(model, cache, draw_ids(2, length))
        assert cache.nbytes() == 2 * 4 * floats
    cache.reorder(torch.tensor([1, 0]))
    assert cache.nbytes() == 2 * 4 * floats


def test_records_are_dropped_when_they_settle(make_hybrid, draw_ids, read) -> None:
    model = make_hybrid(["mamba2", "mamba1"])
    cache = HybridCache(model.config, 2, recording=True)
    read(model, cache, draw_ids(2, 5))
    sizes = []
    for _ in range(6):
        read(model, cache, draw_ids(2, 4))
        sizes.append(cache.nbytes())
        cache.rollback(cache.lengths - 2)
    assert len(set(sizes)) == 1
    for _ in range(2):
        read(model, cache, draw_ids(2, 4))
    assert cache.nbytes() > sizes[0]


def test_attention_bytes_are_those_of_the_slots(make_hybrid, draw_ids, read) -> None:
    model = make_hybrid(["attention"] * 2)
    per_slot = 2 * 2 * 3 * 2 * 16 * 4  # layers, keys and values, rows, heads, head dim, fp32
    cache = HybridCache(model.config, 3)
    read(model, cache, draw_ids(3, 10))
    assert cache.nbytes() == 10 * per_slot
    for _ in range(30):
        read(model, cache, draw_ids(3, 1))
        assert cache.nbytes() <= 2 * int(cache.lengths.max()) * per_slot
    assert cache.nbytes() >= 40 * per_slot


def test_attention_slots_survive_growth() -> None:
    keys = torch.randn(2, 3, 20, 4, generator=torch.Generator().manual_seed(0))
    cache, grown = AttentionCache(), 0
    for place in range(20):
        before = None if cache.keys is None else cache.keys.shape[2]
        token = keys[:, :, place : place + 1]
        held, values = cache.update(token, -token, torch.full((2, 1), place), place + 1)
        assert torch.equal(held, keys[:, :, : place + 1])
        assert torch.equal(values, -held)
        grown += cache.keys.shape[2] != before
    assert grown <= 6  # doubles: 1, 2, 4, 8, 16, 32


def test_rows_write_keys_at_their_own_positions() -> None:
    cache = AttentionCache()
    cache.update(torch.ones(2, 1, 3, 1), torch.ones(2, 1, 3, 1), torch.arange(3).expand(2, 3), 3)
    positions = torch.tensor([[3, 4], [1, 2]])
    new = torch.tensor([[5.0, 6.0], [7.0, 8.0]])[:, None, :, None]
    keys, _ = cache.update(new, new, positions, 5)
    assert keys[:, 0, :, 0].tolist() == [[1, 1, 1, 5, 6], [1, 7, 8, 0, 0]]


def test_a_new_cache_holds_nothing(mixed_model) -> None:
    cache = HybridCache(mixed_model.config, 2)
    assert not cache.is_initialized
    assert cache.get_seq_length() == cache.nbytes() == 0
    assert cache.get_max_cache_shape() == -1
