"""Intervals cover as often as they say, and a paired test finds what is there and nothing else."""

import math

import numpy as np
import pytest

from mambactl.evaluation.statistics import (
    Bootstrap,
    estimate,
    mean_difference_of,
    mean_intervals,
    paired,
    ratios,
    unit_sums,
)


def documents(rng, units=40, spread=1.0, noise=1.0):
    """Values whose documents differ: (values [N], document of each [N]); the true mean is 2."""
    sizes = rng.integers(5, 30, units)
    units_of = np.repeat(np.arange(units), sizes)
    level = rng.normal(0, spread, units)[units_of]
    return 2 + level + rng.normal(0, noise, len(units_of)), units_of


def test_sums_by_unit():
    values, units = np.arange(8.0).reshape(4, 2), np.array([1, 0, 1, 1])
    assert unit_sums(values, units).tolist() == [[2, 3], [10, 13]]


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = naive = 0
    for trial in range(300):
        values, units = documents(rng)
        counts = np.bincount(units)
        sums = unit_sums(values[:, None], units)
        low, high = mean_intervals(sums, counts, Bootstrap(0.9, 400, trial))[0]
        inside += low <= 2 <= high
        # tokens taken for independent
        half = 1.645 * values.std() / math.sqrt(len(values))
        naive += abs(values.mean() - 2) <= half
    # standard error of a share of 0.9 of 300: 0.017
    assert 0.83 <= inside / 300 <= 0.95
    assert naive / 300 < 0.6


def test_an_interval_narrows_with_documents_and_widens_with_confidence():
    rng = np.random.default_rng(1)

    def width(units, confidence):
        values, of = documents(rng, units)
        low, high = mean_intervals(
            unit_sums(values[:, None], of), np.bincount(of), Bootstrap(confidence, 1000, 0)
        )[0]
        return high - low

    assert width(1000, 0.95) == pytest.approx(width(40, 0.95) / 5, rel=0.35)
    assert width(40, 0.5) < width(40, 0.99) / 2


def test_a_known_difference_is_found_through_the_noise_of_documents():
    rng = np.random.default_rng(2)
    values, units = documents(rng, spread=3.0, noise=0.2)
    better = values - 0.1 + rng.normal(0, 0.2, len(values))
    sums = [{"kl": np.bincount(units, weights=each)} for each in (better, values)]
    found = paired(*sums, np.bincount(units), Bootstrap(0.99, 2000, 0))["kl"]
    low, high = found["interval"]
    assert low <= -0.1 <= high < 0 and found["p"] < 0.01
    assert found["difference"] == pytest.approx((better - values).mean())
    assert found["wins"] > found["losses"] and found["units"] == 40
    # apart, either's own interval holds the other's mean: only pairing sees it
    low, high = mean_intervals(
        unit_sums(values[:, None], units), np.bincount(units), Bootstrap(0.95, 2000, 0)
    )[0]
    assert low < better.mean() < high


def test_no_difference_is_found_no_more_often_than_chance():
    rng = np.random.default_rng(3)
    ps = []
    for trial in range(300):
        values, units = documents(rng, units=30)
        other = values + rng.normal(0, 0.3, 30)[units]
        sums = [{"kl": np.bincount(units, weights=each)} for each in (values, other)]
        ps.append(paired(*sums, np.bincount(units), Bootstrap(0.95, 300, trial))["kl"]["p"])
    assert np.mean(np.array(ps) < 0.05) < 0.11
    assert 0.4 < np.mean(ps) < 0.6


def test_equal_models_have_no_difference_and_one_document_says_nothing():
    sums, counts = {"kl": np.array([1.0, 2.0, 5.0])}, np.array([2, 3, 4])
    found = paired(sums, sums, counts, Bootstrap(0.95, 200, 0))["kl"]
    assert (found["difference"], found["interval"], found["p"]) == (0, [0, 0], 1)
    one = paired({"kl": np.array([1.0])}, {"kl": np.array([2.0])}, np.array([2]), Bootstrap())["kl"]
    assert (one["difference"], one["interval"], one["p"]) == (-0.5, None, None)


def test_a_seed_decides_the_draws(monkeypatch):
    rng = np.random.default_rng(4)
    values, units = documents(rng)
    sums, counts = unit_sums(values[:, None], units), np.bincount(units)
    first, again, other = (
        mean_intervals(sums, counts, Bootstrap(0.95, 300, seed)) for seed in (5, 5, 6)
    )
    assert first == again != other
    # in parts of seven draws
    monkeypatch.setattr("mambactl.evaluation.statistics.DRAWN_ELEMENTS", 7 * len(counts))
    in_parts = mean_intervals(sums, counts, Bootstrap(0.95, 300, 5))
    assert np.allclose(in_parts, first, rtol=1e-12)


def recalled(rng, rows=64, asked=16, level=0.5, share=0.9):
    """Values that a teacher and a student recall of each row [R]; rows differ in difficulty."""
    easy = np.clip(level + rng.normal(0, 0.25, rows), 0, 1)
    theirs = rng.binomial(asked, easy)
    return rng.binomial(theirs, share).astype(float), theirs.astype(float)


def test_intervals_of_a_mean_ratio_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(5)
    inside = 0
    for trial in range(100):
        tests = [recalled(rng, level=level) for level in (0.7, 0.4, 0.2)]
        mean = ratios(*zip(*tests, strict=True), Bootstrap(0.9, 300, trial)).mean
        low, high = mean.interval
        inside += low <= 0.9 <= high
        assert low < mean.value < high
    # standard error of a share of 0.9 of 100: 0.03
    assert 0.8 <= inside / 100 <= 0.97


def test_rows_of_a_ratio_are_drawn_in_pairs_and_tests_apart():
    ours, theirs = recalled(np.random.default_rng(6))
    bootstrap = Bootstrap(0.95, 2000, 0)

    def width(found):
        return found.interval[1] - found.interval[0]

    alone = ratios([ours], [theirs], bootstrap)
    assert alone.each[0].value == alone.mean.value == ours.sum() / theirs.sum()
    # rows of other difficulty against each other
    unpaired = ratios([ours], [np.sort(theirs)], bootstrap)
    assert width(alone.mean) < width(unpaired.mean) / 2
    # the same numbers as four tests of their own: the mean is twice as sure
    four = ratios([ours] * 4, [theirs] * 4, bootstrap)
    assert width(four.mean) == pytest.approx(width(alone.mean) / 2, rel=0.15)
    assert len({tuple(each.interval) for each in four.each}) == 4


def test_a_ratio_over_nothing_is_none_and_few_rows_have_no_interval():
    some, none = np.array([1.0, 0, 0, 2]), np.zeros(4)
    found = ratios([some, none, some], [some, none, np.array([4.0, 0, 0, 0])], Bootstrap())
    assert [each.value for each in found.each] == [1, None, 0.75]
    # one row alone holds what the teacher recalls: some draws are without it
    assert [each.interval for each in found.each] == [None, None, None]
    assert (found.mean.value, found.mean.interval) == (0.875, None)
    nothing = ratios([some], [none], Bootstrap())
    assert (nothing.mean.value, nothing.mean.interval) == (None, None)
    assert ratios([some], [some], Bootstrap(replicates=0)).mean.interval is None


def test_a_mean_of_differences_counts_every_test_once():
    rng = np.random.default_rng(7)
    sums = [
        np.column_stack([np.ones(n), right + 0.25, right])
        for n in (40, 400) for right in [rng.integers(0, 2, n)]
    ]  # fmt: skip
    sums[1][:, 1] -= 0.5
    found = estimate(sums, mean_difference_of, Bootstrap(0.95, 500, 0))
    assert [each.value for each in found.each] == pytest.approx([0.25, -0.25])
    # pairs that always differ by as much are sure
    assert found.each[0].interval == pytest.approx([0.25, 0.25])
    assert found.mean.value == pytest.approx(0, abs=1e-12)
