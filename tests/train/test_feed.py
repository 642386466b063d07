"""Batches made ahead arrive in order, with their errors, and the thread ends with the run."""

import itertools
import threading

import pytest
import torch

from mambactl.data.pack import DEPTH, Batch, ahead, batches


def test_batches_are_those_of_the_source(rows) -> None:
    with ahead(batches(rows, 2, seed=0), pin=False) as feed:
        taken = list(itertools.islice(feed, 9))
    for ours, theirs in zip(taken, batches(rows, 2, seed=0), strict=False):
        for got, wanted in zip(ours, theirs, strict=True):
            assert got is wanted is None or torch.equal(got, wanted)


def test_no_more_is_made_than_fits_and_the_thread_ends(rows) -> None:
    made: list[Batch] = []

    def source():
        for batch in batches(rows, 2, seed=0):
            made.append(batch)
            yield batch

    before = threading.active_count()
    with ahead(source(), pin=False) as feed:
        next(feed)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    # one taken, those ready, and the one in the thread's hand
    assert len(made) <= DEPTH + 2


def test_an_error_of_the_source_is_raised_where_the_batch_is_wanted(rows) -> None:
    def source():
        yield next(batches(rows, 2, seed=0))
        raise ValueError("row 3")

    with ahead(source(), pin=False) as feed:
        next(feed)
        with pytest.raises(ValueError, match="row 3"):
            next(feed)
