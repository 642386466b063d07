"""Calibration: a model's confidence in its top token against how often that token is right.

Expected calibration error (Guo et al., arXiv 1706.04599, eq. 3): predictions are put into `BINS`
bins of equal width by the probability of their top token; with a bin's mean confidence and the
share of it that is right, the error is the mean of |confidence - right| over bins, each weighing
as many predictions as it holds. Three of them:

ece            the student, right where its top token is the text's next one
teacher_ece    the teacher, in the same way: what the student is meant to be like
ece_to_teacher the student, "right" being the probability the teacher gives that token: what `ece`
               would be on text that the teacher wrote, with no noise of the text in it
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

BINS = 15
# what is kept of every prediction
COLUMNS = ("confidence", "right", "guided", "teacher_confidence", "teacher_right")
ERRORS = {
    "ece": ("confidence", "right"),
    "teacher_ece": ("teacher_confidence", "teacher_right"),
    "ece_to_teacher": ("confidence", "guided"),
}


def confidences(q: Tensor, p: Tensor, tops: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """The `COLUMNS` [N, 5] of student and teacher probabilities [N, V] and top tokens [N]."""
    ours, theirs = (top[:, None] for top in tops)
    parts = [
        q.gather(-1, ours)[:, 0],
        (tops[0] == targets).float(),
        p.gather(-1, ours)[:, 0],
        p.gather(-1, theirs)[:, 0],
        (tops[1] == targets).float(),
    ]
    return torch.stack(parts, -1)


def binned(values: Mapping[str, np.ndarray], units: np.ndarray, error: str) -> np.ndarray:
    """Sums [U, BINS] per unit and bin of the calibration gap, confidence - right."""
    confidence, right = (values[name] for name in ERRORS[error])
    count = int(units.max()) + 1
    index = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    flat = np.bincount(units * BINS + index, weights=confidence - right, minlength=count * BINS)
    return flat.reshape(count, BINS)


def calibration_errors(gaps: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Errors [R] from summed gaps [R, BINS] over `count` [R] predictions in all bins.

    The weight of a bin times its gap of means is its summed gap over all predictions.
    """
    return np.abs(gaps).sum(-1) / count
