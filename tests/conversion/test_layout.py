"""Layers that keep attention: the published lists, other shares, and wrong requests."""

import pytest

from mambactl.conversion.replace import attention_bytes, attention_to_keep, kept_attention
from mambactl.errors import UsageError


@pytest.mark.parametrize(
    ("layers", "ratio", "kept"),
    [
        (32, 0.25, [i for i in range(32) if i not in (0, 4, 8, 12, 16, 20, 24, 28)]),
        (32, 0.5, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31]),
        (32, 0.75, [3, 7, 11, 15, 19, 23, 27, 31]),
        (32, 0.875, [7, 15, 23, 31]),
        (32, 1.0, []),
        (28, 0.5, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27]),
        (30, 0.5, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29]),
        (30, 0.75, [3, 7, 11, 15, 19, 23, 27]),
        (30, 2 / 3, [2, 5, 8, 11, 14, 17, 20, 23, 26, 29]),
        (5, 0.0, [0, 1, 2, 3, 4]),
    ],
)
def test_published_patterns(layers, ratio, kept) -> None:
    assert kept_attention(layers, ratio) == kept


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.99, 0.01])
@pytest.mark.parametrize("layers", [1, 2, 7, 16, 28, 30, 32, 80])
def test_any_share_is_met_to_a_layer(layers, ratio) -> None:
    kept = kept_attention(layers, ratio)
    assert kept == sorted(set(kept))
    assert all(0 <= index < layers for index in kept)
    assert abs(layers - len(kept) - ratio * layers) <= 1
    gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_released_patterns_nest() -> None:
    patterns = [set(kept_attention(32, ratio)) for ratio in (0.25, 0.5, 0.75, 0.875, 1.0)]
    for more, fewer in zip(patterns, patterns[1:], strict=False):
        assert fewer < more


def test_explicit_layers_win() -> None:
    assert kept_attention(8, 0.5, keep=[6, 0, 6]) == [0, 6]
    assert kept_attention(8, 0.5, keep=[]) == []


@pytest.mark.parametrize("ratio", [-0.1, 1.01, 50, float("nan"), float("inf")])
def test_a_ratio_out_of_range_is_refused(ratio) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        kept_attention(32, ratio)


@pytest.mark.parametrize("keep", [[32], [-1], [3, 99]])
def test_layers_out_of_range_are_named(keep) -> None:
    with pytest.raises(UsageError, match=str(keep[-1])):
        kept_attention(32, 0.5, keep=keep)


def test_how_many_layers_stay(make_hybrid) -> None:
    """By ratio, counting what is attention already; by budget, what fits."""
    llama = make_hybrid(["attention"] * 8).config
    assert [attention_to_keep(llama, ratio, None, 2) for ratio in (0, 0.5, 0.75, 1)] == [8, 4, 2, 0]
    half = llama.with_mixers(["mamba2", "attention"] * 4)
    assert [attention_to_keep(half, ratio, None, 2) for ratio in (0, 0.5, 0.75)] == [4, 4, 2]
    # keys and values, two heads of 16 numbers
    size = attention_bytes(llama, 2)
    assert size == 2 * 2 * 16 * 2 == attention_bytes(llama, 4) // 2
    budgets = (0, size - 1, size, 5 * size + 1, 100 * size)
    assert [attention_to_keep(llama, 0.5, budget, 2) for budget in budgets] == [0, 0, 1, 5, 8]
