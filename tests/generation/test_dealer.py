"""Batches that processes share in memory: every process has the results of all, in order."""

import os
import time
from pathlib import Path

import pytest
import torch
from fixtures.shared_runs import together

from mambactl.errors import UsageError
from mambactl.generation import dealing
from mambactl.generation.dealer import ALONE, Dealer

# a process that has used a GPU cannot be forked
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a GPU forbids")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(dealing, "POLL", 0.002)


def test_one_process_does_every_batch_in_order_and_keeps_what_it_made():
    made, heard = [], []
    found = ALONE.results([3, 5], lambda n: made.append(n) or made, heard.append, lambda n: 10 * n)
    assert found[0] is found[1] is made
    assert (made, heard, ALONE.leads, Dealer.of_run().shared) == ([3, 5], [30, 50], True, False)
    assert ALONE.from_main(lambda: {"a": 1}) == {"a": 1}
    ALONE.finish()


def test_processes_have_each_others_results(tmp_path):
    """Also where there are more processes than batches, and values are larger than the store's."""

    def work() -> None:
        dealer, rank = Dealer.of_run(), int(os.environ["RANK"])
        assert dealer.shared and dealer.leads == (rank == 0)
        for count in (7, 2, 0):
            heard, mine = [], []
            done = dealer.results(
                range(count),
                lambda n, mine=mine: mine.append(n) or {"n": n, "t": torch.full((n, 2), n / 4)},
                heard.append,
                lambda n: n + 1,
            )
            assert [each["n"] for each in done] == list(range(count))
            assert all(each["t"].tolist() == [[n / 4] * 2] * n for n, each in enumerate(done))
            assert sum(heard) == sum(range(count + 1))
            assert mine == sorted(mine)
        large = dealer.results([5, 6], lambda n: torch.arange(n * 2**18))
        assert [len(each) for each in large] == [5 * 2**18, 6 * 2**18]
        asked = dealer.from_main(lambda: {"of": rank, "text": "\u00fc", "nan": float("inf")})
        assert asked == {"of": 0, "text": "\u00fc", "nan": float("inf")}
        if rank:
            time.sleep(0.1)
            (tmp_path / f"{rank}").touch()
        dealer.finish()
        if rank == 0:
            assert len(list(tmp_path.glob("[12]"))) == 2

    assert together(work, tmp_path / "log", False, 3) == [0, 0, 0]


def test_processes_with_other_batches_are_refused(tmp_path):
    def work() -> None:
        dealer, rank = Dealer.of_run(), int(os.environ["RANK"])
        if rank:
            with pytest.raises(UsageError, match="process 1 of the run reads other rows"):
                dealer.results(["abc"], str, size=len)
        else:
            dealer.results(["ab"], str, size=len)
        dealer.finish()

    assert together(work, tmp_path / "log", False) == [0, 0]


class Trap:
    """An object that runs a command where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_nothing_in_a_result_is_run(tmp_path):
    from mambactl.generation.dealer import _packed, _unpacked

    body = _packed(Trap(tmp_path / "ran"))
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        _unpacked(body)
    assert not (tmp_path / "ran").exists()
