"""Weighted data sets give their shares of the tokens, the same ones every time."""

import numpy as np
import pytest

from mambactl.data.format import Example
from mambactl.data.mixture import mixed, names, shares
from mambactl.data.sources import Document
from mambactl.errors import UsageError
from mambactl.options import split_weight


def documents(*sizes):
    """One data set per list of lengths, taking turns as the loader does."""
    longest = max(len(lengths) for lengths in sizes)
    return [
        Document(f"{part}", {"text": "x" * lengths[place]}, part)
        for place in range(longest)
        for part, lengths in enumerate(sizes)
        if place < len(lengths)
    ]


def encoded(rows, max_tokens):
    found, total = [], 0
    for row in rows:
        length = len(row["text"])
        found.append(Example(np.full(length, row.part, np.int32), np.ones(length, bool)))
        total += length
        if max_tokens is not None and total >= max_tokens:
            break
    return found


def tokens(examples):
    ids = np.concatenate([example.input_ids for example in examples])
    return np.bincount(ids).tolist()


@pytest.mark.parametrize(
    ("spec", "data", "weight"),
    [
        ("a.jsonl=0.7", "a.jsonl", 0.7),
        ("org/set:en@train[:10%]=3", "org/set:en@train[:10%]", 3.0),
        ("org/set@split", "org/set@split", None),
        ("a=b.jsonl", "a=b.jsonl", None),
        ("a.jsonl=-1", "a.jsonl=-1", None),
        ("a.jsonl=.5", "a.jsonl", 0.5),
    ],
)
def test_a_weight_is_a_number_behind_the_last_equals_sign(spec, data, weight):
    assert split_weight(spec) == (data, weight)


def test_a_file_of_that_very_name_is_no_weight(tmp_path):
    path = tmp_path / "date=3"
    path.touch()
    assert split_weight(str(path)) == (str(path), None)
    assert split_weight(f"{path}=2") == (str(path), 2.0)


def test_shares_are_relative_and_for_all_or_none():
    assert shares(["a=3", "b=1"]) == [0.75, 0.25]
    assert shares(["a", "b"]) is None and names(["a=3", "b"]) == ["a", "b"]
    with pytest.raises(UsageError, match="b has no weight") as caught:
        shares(["a=3", "b"])
    assert "--data b=0.5" in caught.value.hint
    with pytest.raises(UsageError, match="weight of data is 0"):
        shares(["a=0", "b=1"])


def test_tokens_are_shared_as_weighted_up_to_the_budget():
    rows = documents([5] * 400, [50] * 40)
    found = tokens(mixed(["a=0.7", "b=0.3"], rows, encoded, 1000))
    assert found == [700, 300]
    # documents would be dealt in turn, and longer ones win
    assert tokens(mixed(["a", "b"], rows, encoded, 1000))[1] > 800


def test_a_small_set_is_repeated_until_the_large_one_was_seen():
    rows = documents([10] * 70, [10] * 7)
    found = mixed(["a=0.7", "b=0.3"], rows, encoded, 100_000)
    assert tokens(found) == [700, 300]
    assert sum(int(example.input_ids[0]) == 1 for example in found) == 30
    assert tokens(mixed(["a=0.7", "b=0.3"], rows, encoded, None)) == [700, 300]


def test_a_share_of_less_than_a_document_still_gives_one():
    assert tokens(mixed(["a=99", "b=1"], documents([10] * 50, [30] * 9), encoded, 200))[1] == 30


def test_only_what_rows_can_hold_counts():
    rows = documents([10] * 60, [1000] * 9)
    found = mixed(["a=1", "b=1"], rows, encoded, None, max_length=50)
    assert sum(len(example.input_ids[:50]) for example in found if example.input_ids[0] == 1) == 600


def test_a_set_without_tokens_is_named():
    with pytest.raises(UsageError, match="b=1 gives no token"):
        mixed(["a=1", "b=1"], documents([10]), encoded, 100)
