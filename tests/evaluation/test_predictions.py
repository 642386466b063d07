"""Statistics of measured predictions: intervals, tests, buckets, and which units are drawn."""

import json

import numpy as np
import pytest

from mambactl.evaluation.calibration import COLUMNS
from mambactl.evaluation.predictions import LONG_BUCKET_STARTS, MEANS, Predictions
from mambactl.evaluation.statistics import Bootstrap
from mambactl.metrics import group

SCALARS = [metric.name for metric in group("fidelity") if metric.bound]


def predictions(documents=12, rows=2, tokens=30, better=0.0):
    rng = np.random.default_rng(0)
    shape = (documents, rows, tokens)
    level = rng.uniform(0.5, 1.5, (documents, 1, 1))
    columns = {name: (level * rng.uniform(0, 1, shape)).ravel() for name in MEANS}
    columns |= {name: rng.uniform(0, 1, shape).ravel() for name in COLUMNS}
    other = columns | {"kl": columns["kl"] - better}
    document, row, token = (place.ravel() for place in np.indices(shape))
    # with a document that has no prediction
    document = document + (document >= 3)
    values = {"student": columns, "against": other}
    return Predictions(values, token, document, document * rows + row)


def test_a_summary_holds_every_number_and_its_interval():
    found = predictions().summary("student", Bootstrap(0.95, 300, 0))
    assert set(SCALARS) <= set(found) and found["resampled"] == "documents"
    for name in (*MEANS, "perplexity", "teacher_perplexity", "perplexity_ratio"):
        low, high = found["intervals"][name]
        assert low < found[name] < high, name
    assert set(SCALARS) - set(found["intervals"]) == {"kl_p95"}
    assert json.loads(json.dumps(found)) == found
    assert "intervals" not in predictions().summary("student", Bootstrap(0.95, 0, 0))
    assert "intervals" not in predictions(1, 1).summary("student", Bootstrap())


def test_few_documents_are_drawn_by_row():
    one = predictions(documents=1, rows=20)
    assert one.resampled == "rows" and len(np.unique(one.units())) == 20
    many = predictions()
    # numbered without a gap, though a document has no prediction
    assert np.unique(many.units()).tolist() == list(range(12))
    wide = predictions().summary("student", Bootstrap(0.95, 500, 0))["intervals"]["kl"]
    narrow = mean_interval_of_tokens(many)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def mean_interval_of_tokens(found):
    kl = found.values["student"]["kl"]
    half = 1.96 * kl.std() / np.sqrt(len(kl))
    return kl.mean() - half, kl.mean() + half


def test_a_paired_test_sees_a_small_constant_difference():
    found = predictions(better=0.01).compare("student", "against", Bootstrap(0.95, 500, 0))
    kl = found["tests"]["kl"]
    assert kl["difference"] == pytest.approx(0.01) and kl["p"] < 0.01
    assert kl["interval"] == pytest.approx([0.01, 0.01])
    assert (kl["wins"], kl["losses"]) == (0, 12)
    assert found["tests"]["ce"]["p"] == 1 and found["resampled"] == "documents"
    assert json.loads(json.dumps(found)) == found


def test_samples_are_means_of_units():
    found = predictions()
    kept = found.summary("student", samples=True)["samples"]
    assert kept["unit"] == [0, 1, 2, *range(4, 13)] and kept["tokens"] == [60] * 12
    inside = found.documents == 5
    assert kept["kl"][4] == pytest.approx(found.values["student"]["kl"][inside].mean())
    assert np.average(kept["ce"], weights=kept["tokens"]) == pytest.approx(
        found.summary("student")["ce"]
    )


def test_perplexity_by_position_in_doublings():
    found = predictions(tokens=300).summary("student", starts=LONG_BUCKET_STARTS)["by_position"]
    assert {label: bucket["tokens"] for label, bucket in found.items()} == {
        "0-63": 64 * 24, "64-127": 64 * 24, "128-255": 128 * 24, "256-511": 44 * 24,
    }  # fmt: skip
    values, place = predictions(tokens=300).values["student"], predictions(tokens=300).positions
    inside = (place >= 128) & (place < 256)
    bucket = found["128-255"]
    assert bucket["perplexity"] == pytest.approx(np.exp(values["ce"][inside].mean()))
    assert bucket["teacher_perplexity"] == pytest.approx(
        np.exp(values["teacher_ce"][inside].mean())
    )
