"""Data sets with weights: each gives its share of the tokens."""

from collections.abc import Callable, Sequence

import numpy as np

from mambactl.data.encoding import Example
from mambactl.data.sources import Document
from mambactl.errors import UsageError
from mambactl.options import split_weight

# encodes documents until so many tokens (None: all of them) are there
Encoder = Callable[[Sequence[Document], int | None], list[Example]]


def names(specs: Sequence[str]) -> list[str]:
    """Data sets without their weights."""
    return [split_weight(spec)[0] for spec in specs]


def shares(specs: Sequence[str]) -> list[float] | None:
    """Share of the tokens of every data set, None where no weights are given.

    Raises UsageError for weights that some have and others lack, and for a weight of 0.
    """
    found = [split_weight(spec)[1] for spec in specs]
    weights = [weight for weight in found if weight is not None]
    if not weights:
        return None
    if len(weights) < len(found):
        lacking = specs[found.index(None)]
        raise UsageError(
            f"{lacking} has no weight and other data has one", f"give it one: --data {lacking}=0.5"
        )
    if not all(weights):
        raise UsageError("a weight of data is 0", "give it a positive one, or leave that data out")
    return [weight / sum(weights) for weight in weights]


def mixed(
    specs: Sequence[str],
    documents: Sequence[Document],
    encode: Encoder,
    max_tokens: int | None,
    max_length: int | None = None,
    epochs: float | None = None,
) -> list[Example]:
    """Examples of the data sets `specs`, by weight where they have any, until `max_tokens`.

    A set that is too small for its share is repeated in the same order, as often as the largest
    needs to be seen once; with `epochs` the smallest for its share is seen so often. Of an example
    only `max_length` tokens count, for rows that cut the rest.
    """
    parts = shares(specs)
    if parts is None:
        return encode(documents, max_tokens)
    found = []
    for number, share in enumerate(parts):
        own = [document for document in documents if document.part == number]
        budget = None if max_tokens is None else round(share * max_tokens)
        found.append(encode(own, budget))
    sizes = [np.array([len(e.input_ids[:max_length]) for e in examples]) for examples in found]
    for spec, size in zip(specs, sizes, strict=True):
        if not size.sum():
            raise UsageError(f"{spec} gives no token to the mixture", "leave it out")
    wholes = [size.sum() / share for size, share in zip(sizes, parts, strict=True)]
    total = max(wholes) if epochs is None else epochs * min(wholes)
    total = total if max_tokens is None else min(total, max_tokens)
    return [
        example
        for examples, size, share in zip(found, sizes, parts, strict=True)
        for example in _repeated(examples, size, share * total)
    ]


def _repeated(examples: Sequence[Example], sizes: np.ndarray, tokens: float) -> list[Example]:
    """Examples over and over until their sum is as close to `tokens` as it comes, one at least."""
    rounds, rest = divmod(tokens, sizes.sum())
    sums = np.concatenate([[0], sizes.cumsum()])
    count = int(np.abs(sums - rest).argmin())
    whole = [*examples] * int(rounds)
    return [*whole, *examples[: count if whole else max(1, count)]]
