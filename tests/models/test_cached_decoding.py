"""Reading tokens through a cache, in any pieces and with any padding, changes no logit."""

import pytest
import torch

from mambactl.models.cache import MAX_SEQUENTIAL, HybridCache

LENGTHS = [23, 1, 70, 9]


@pytest.mark.parametrize("recording", [False, True], ids=["plain", "recording"])
def test_pieces_equal_one_forward(
    any_model, draw_ids, uncached, read, assert_close, recording
) -> None:
    ids = draw_ids(2, 100)
    expected = uncached(any_model, ids)
    for pieces in ([100], [17, 1, 1, 5, 76], [1, 1, 98], [66, 34]):
        cache = HybridCache(any_model.config, 2, recording=recording)
        logits = torch.cat([read(any_model, cache, part) for part in ids.split(pieces, 1)], 1)
        assert_close(logits, expected)
        assert cache.lengths.tolist() == [100, 100]


@pytest.mark.parametrize("recording", [False, True], ids=["plain", "recording"])
def test_rows_of_their_own_lengths_equal_each_row_alone(
    any_model, draw_ids, uncached, read, assert_close, recording
) -> None:
    ids = draw_ids(4, 90)
    cache = HybridCache(any_model.config, 4, recording=recording)
    place = torch.zeros(4, dtype=torch.long)
    calls = [LENGTHS, [1, 1, 0, 1], [0, 5, 3, 2], [1, 1, 1, 1], [0, 0, 1, 0], [4, 66, 0, 1]]
    for counts in calls:
        n_new, columns = torch.tensor(counts), max(counts)
        index = (place[:, None] + torch.arange(columns)).clamp(max=89)
        logits = read(any_model, cache, ids.gather(1, index), n_new)
        for row, count in enumerate(counts):
            if count:
                stop = int(place[row]) + count
                alone = uncached(any_model, ids[row : row + 1, :stop])[0, -count:]
                assert_close(logits[row, :count], alone)
        place += n_new
        assert cache.lengths.tolist() == place.tolist()
    assert max(max(counts) for counts in calls[1:]) > MAX_SEQUENTIAL


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(any_model, draw_ids, uncached, read, assert_close, side) -> None:
    ids = draw_ids(4, 80)
    width = max(LENGTHS)
    for filler in (0, 55):
        padded = torch.full((4, width), filler)
        mask = torch.zeros(4, width, dtype=torch.long)
        spans = [slice(width - n, width) if side == "left" else slice(0, n) for n in LENGTHS]
        for row, (span, n) in enumerate(zip(spans, LENGTHS, strict=True)):
            padded[row, span], mask[row, span] = ids[row, :n], 1
        cache = HybridCache(any_model.config, 4)
        with torch.no_grad():
            first = any_model(padded, attention_mask=mask, past_key_values=cache).logits
        bare = uncached(any_model, padded, attention_mask=mask)
        after = read(
            any_model, cache, torch.stack([ids[b, n] for b, n in enumerate(LENGTHS)])[:, None]
        )
        for row, (span, n) in enumerate(zip(spans, LENGTHS, strict=True)):
            alone = uncached(any_model, ids[row : row + 1, : n + 1])[0]
            assert_close(first[row, span], alone[:n])
            assert_close(bare[row, span], alone[:n])
            assert_close(after[row, 0], alone[n])


def test_a_row_of_nothing_but_padding_stays_empty(mixed_model, draw_ids, uncached, read,
                                                  assert_close) -> None:  # fmt: skip
    ids = draw_ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0] = 0
    cache = HybridCache(mixed_model.config, 2)
    with torch.no_grad():
        mixed_model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.lengths.tolist() == [0, 12]
    logits = read(mixed_model, cache, ids[:, :5])
    assert_close(logits[0], uncached(mixed_model, ids[:1, :5])[0])


def test_hidden_states_and_kept_logits_follow_the_padding(mixed_model, draw_ids, uncached) -> None:
    ids, mask = draw_ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        outputs = mixed_model(
            ids, attention_mask=mask, use_cache=False, output_hidden_states=True, logits_to_keep=2
        )
        alone = mixed_model(ids[:1, 4:], use_cache=False, output_hidden_states=True)
    assert torch.equal(outputs.logits, uncached(mixed_model, ids, attention_mask=mask)[:, -2:])
    assert len(outputs.hidden_states) == len(mixed_model.config.mixers) + 1
    for padded, plain in zip(outputs.hidden_states, alone.hidden_states, strict=True):
        torch.testing.assert_close(padded[0, 4:], plain[0], rtol=1e-4, atol=1e-4)


def test_embeddings_can_replace_tokens(mixed_model, draw_ids, uncached) -> None:
    ids = draw_ids(2, 7)
    embedded = mixed_model.model.embed_tokens(ids)
    with torch.no_grad():
        logits = mixed_model(inputs_embeds=embedded, use_cache=False).logits
    assert torch.equal(logits, uncached(mixed_model, ids))


def test_a_full_attention_matrix_is_refused(mixed_model, draw_ids) -> None:
    with pytest.raises(ValueError, match="2-D attention mask"):
        mixed_model(draw_ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5))
