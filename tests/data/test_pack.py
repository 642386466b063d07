"""Packed rows hold every document once, apart from each other, in an order that resumes."""

from itertools import islice

import numpy as np
import pytest
import torch

from mambactl.data.format import Example
from mambactl.data.pack import batches, collate, pack
from mambactl.errors import UsageError

LENGTH = 32


def _examples(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [
        Example(draw.integers(1, 97, n).astype(np.int32), draw.random(n) > 0.2) for n in lengths
    ]


def _documents(rows):
    for row in rows:
        for number in np.unique(row.seq_idx[row.valid]):
            here = row.valid & (row.seq_idx == number)
            yield row.input_ids[here], row.loss_mask[here], row.position_ids[here]


def test_every_document_appears_once_and_whole():
    examples = _examples([5, 31, 2, 17, 9, 9, 30, 3, 12, 20])
    rows = pack(examples, LENGTH)
    assert len(rows) < len(examples)
    found = {tuple(ids): (mask, places) for ids, mask, places in _documents(rows)}
    assert len(found) == len(examples)
    for ids, mask in examples:
        got_mask, places = found[tuple(ids)]
        assert places.tolist() == list(range(len(ids)))
        assert not got_mask[0]
        assert np.array_equal(got_mask[1:], mask[1:])


def test_long_documents_are_cut_and_nothing_else_is_lost():
    (example,) = _examples([3 * LENGTH + 7])
    rows = pack([example], LENGTH)
    pieces = sorted((ids for ids, _, _ in _documents(rows)), key=len, reverse=True)
    assert [len(piece) for piece in pieces] == [LENGTH] * 3 + [7]
    assert sum(len(piece) for piece in pieces) == len(example.input_ids)


def test_padding_is_one_more_document_that_never_counts():
    rows = pack(_examples([20, 7]), LENGTH)
    (row,) = rows
    assert row.valid.sum() == 27
    assert row.seq_idx.tolist() == [0] * 20 + [1] * 7 + [2] * 5
    assert not row.loss_mask[~row.valid].any()
    assert row.position_ids[27:].tolist() == list(range(5))
    assert (np.diff(row.seq_idx) >= 0).all()


def test_without_packing_rows_are_documents_cut_at_the_length():
    examples = _examples([40, 3, 10])
    rows = pack(examples, LENGTH, packing=False)
    assert [int(row.valid.sum()) for row in rows] == [LENGTH, 3, 10]
    assert np.array_equal(rows[0].input_ids, examples[0].input_ids[:LENGTH])
    assert collate(rows).seq_idx is None


def test_nothing_to_learn_is_an_error():
    with pytest.raises(UsageError, match="no token to learn from"):
        pack(_examples([1, 1]), LENGTH)
    with pytest.raises(UsageError, match="no token to learn from"):
        pack([Example(np.arange(9, dtype=np.int32), np.zeros(9, bool))], LENGTH)


def test_batches_resume_at_any_number_and_see_every_row_each_epoch():
    rows = pack(_examples([LENGTH] * 7), LENGTH)
    stream = list(islice(batches(rows, 2, seed=5), 11))
    for start in (0, 3, 4, 10):
        later = next(batches(rows, 2, seed=5, start=start))
        assert torch.equal(later.input_ids, stream[start].input_ids)
    seen = torch.cat([batch.input_ids for batch in stream])
    epochs = [{tuple(ids) for ids in seen[7 * e : 7 * e + 7].tolist()} for e in range(2)]
    assert epochs[0] == epochs[1] == {tuple(row.input_ids.tolist()) for row in rows}
    assert not torch.equal(seen[:7], seen[7:14])
    assert not torch.equal(seen[:2], next(batches(rows, 2, seed=6)).input_ids)


def test_columns_that_only_pad_are_cut():
    rows = pack(_examples([70, 3, 66]), 512, packing=False)
    assert collate(rows).input_ids.shape == (3, 128)
    assert collate(rows[1:2]).input_ids.shape == (1, 64)
