"""A row of data as tokens."""

from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """One document; `loss_mask[t]` says that token t is a target.

    input_ids: int32 [n]; loss_mask: bool [n].
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
