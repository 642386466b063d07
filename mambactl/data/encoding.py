"""A row of data as tokens."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

# token ids of one text [n]
TokenIds: TypeAlias = Sequence[int] | np.ndarray


class Example(NamedTuple):
    """One document; `loss_mask[t]` says that token t is a target.

    input_ids: int32 [n]; loss_mask: bool [n].
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
