"""Calibration errors against the definition in a loop, and of models whose errors are known."""

import numpy as np
import pytest
import torch

from mambactl.evaluation.calibration import (
    BINS,
    COLUMNS,
    ERRORS,
    binned,
    calibration_errors,
    confidences,
)


def by_definition(confidence, right):
    error = 0.0
    for place in range(BINS):
        inside = (confidence * BINS).astype(int).clip(max=BINS - 1) == place
        if inside.any():
            gap = abs(confidence[inside].mean() - right[inside].mean())
            error += inside.mean() * gap
    return error


def errors(values):
    alone, count = np.zeros(len(values["right"]), int), np.array([len(values["right"])])
    return {name: calibration_errors(binned(values, alone, name), count)[0] for name in ERRORS}


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    size = 4000
    confidence, teacher = rng.uniform(0, 1, (2, size))
    return {
        "confidence": confidence,
        "right": (rng.uniform(0, 1, size) < confidence**2).astype(float),
        "guided": confidence * 0.5,
        "teacher_confidence": teacher,
        "teacher_right": (rng.uniform(0, 1, size) < teacher).astype(float),
    }


def test_errors_are_those_of_the_definition(values):
    found = errors(values)
    for name, (confidence, right) in ERRORS.items():
        assert found[name] == pytest.approx(by_definition(values[confidence], values[right]))
    # the mean of c - c^2 is 1/6, of c / 2 it is 1/4, and who draws by its confidence has none
    assert found["ece"] == pytest.approx(1 / 6, abs=0.03)
    assert found["ece_to_teacher"] == pytest.approx(1 / 4, abs=0.01)
    assert found["teacher_ece"] < 0.04


def test_sums_of_documents_make_the_whole(values):
    units = np.random.default_rng(1).integers(0, 9, len(values["right"]))
    sums = binned(values, units, "ece")
    assert sums.shape == (9, BINS)
    whole = calibration_errors(sums.sum(0)[None], np.array([len(units)]))[0]
    assert whole == pytest.approx(errors(values)["ece"])


def test_columns_are_read_off_the_distributions():
    q = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    p = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.7, 0.1]])
    tops, targets = (q.argmax(-1), p.argmax(-1)), torch.tensor([0, 1])
    found = confidences(q, p, tops, targets)
    named = dict(zip(COLUMNS, found.T.tolist(), strict=True))
    assert named["confidence"] == pytest.approx([0.7, 0.6])
    assert named["guided"] == pytest.approx([0.5, 0.1])
    assert named["teacher_confidence"] == pytest.approx([0.5, 0.7])
    assert (named["right"], named["teacher_right"]) == ([1, 0], [1, 1])
