"""Mamba-2 beside a window of attention: two parts that both learn, in a cache of fixed size.

That cached decoding, rollback, packing and padding change nothing is tested with all layouts.
"""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from mambactl.models.cache import HybridCache, WindowedCache
from mambactl.models.config import HybridConfig
from mambactl.models.key_ring import WindowSettings

WINDOW, SINKS = 7, 3


def test_the_output_is_the_sum_of_both_parts(windowed_model, draw_ids) -> None:
    model = windowed_model.model
    hidden, context = model.enter(draw_ids(2, 30))
    mixer = model.layers[0].mixer
    with torch.no_grad():
        whole = mixer(hidden, context, None)
        recurrent = mixer.out_proj(mixer.features(hidden, context))
        near = mixer.window(hidden, context, None)
    torch.testing.assert_close(whole, recurrent + near)
    assert float(recurrent.abs().max()) > 0.1 and float(near.abs().max()) > 0.1


def test_the_cache_stays_as_long_as_it_is(make_hybrid, draw_ids, read) -> None:
    model = make_hybrid(["mamba2_window"] * 2, mamba2_window=WindowSettings(WINDOW, SINKS), seed=3)
    ids, sizes = draw_ids(2, 90), []
    cache = HybridCache(model.config, 2)
    for piece in ids.split([2, 50, 1, 1, 36], 1):
        read(model, cache, piece)
        sizes.append(cache.nbytes())
    assert len(set(sizes)) == 1
    assert all(layer.keys.shape[2] == WINDOW + SINKS for layer in cache.layers)


def test_drafts_take_as_much_of_the_ring_as_may_be_taken_back(
    windowed_model, draw_ids, read
) -> None:
    cache = HybridCache(windowed_model.config, 1, recording=True)
    read(windowed_model, cache, draw_ids(1, 40))
    for turn in range(12):
        read(windowed_model, cache, draw_ids(1, 5, seed=turn))
        cache.rollback(cache.lengths - turn % 5)
    ring = cache.layers[0]
    assert isinstance(ring, WindowedCache)
    assert ring.keys.shape[2] == SINKS + WINDOW - 1 + 5


@pytest.mark.parametrize("sinks", [0, 2, 11])
@pytest.mark.parametrize("window", [1, 2, 30])
def test_any_window_decodes_as_it_reads(
    make_hybrid, draw_ids, read, uncached, assert_close, window, sinks
) -> None:
    """Token by token with drafts that are taken back, windows longer than the text, no sinks."""
    span = WindowSettings(window, sinks)
    model = make_hybrid(["mamba2_window"], mamba2_window=span, seed=4)
    ids, wrong = draw_ids(2, 24), draw_ids(2, 6, seed=9)
    expected = uncached(model, ids)
    cache, logits = HybridCache(model.config, 2, recording=True), []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 9), (9, 10), (10, 22), (22, 24)):
        logits.append(read(model, cache, ids[:, start:stop]))
        cache.mark()
        read(model, cache, wrong)
        cache.rollback(cache.lengths - wrong.shape[1])
    assert_close(torch.cat(logits, 1), expected)


SIZES = {
    **{"n_heads": 4, "head_dim": 16, "d_state": 16, "x_heads": 2, "b_groups": 2},
    **{"c_groups": 4, "norm_groups": 4},
}


def test_settings_are_needed_and_kept() -> None:
    with pytest.raises(StrictDataclassError, match="no `mamba2_window` settings"):
        HybridConfig(num_hidden_layers=1, mixers=["mamba2_window"], mamba2=SIZES)
    with pytest.raises(StrictDataclassError, match="no `mamba2` settings"):
        HybridConfig(num_hidden_layers=1, mixers=["mamba2_window"], mamba2_window={"window": 3})
