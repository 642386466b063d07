"""The end of a decode step: Triton equals the reference, and that equals a list of tokens.

Everything is integers, so all comparisons are exact.
"""

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mambactl.kernels.decode.reference import verdict as reference  # noqa: E402
from mambactl.kernels.decode.reference.verdict import Field, Finish, Letter, next_store
from mambactl.kernels.decode.triton import verdict as kernels  # noqa: E402

pytestmark = pytest.mark.one_in(3)

# span, and the ring limits that a session would give target and draft
LIMITS = {0: (1, 0, 0), 1: (2, 7, 7), 3: (4, 19, 11), 8: (9, 29, 21)}


@dataclass
class State:
    """Results of a step, for B sequences of up to S tokens."""

    progress: Tensor
    feed: Tensor
    history: Tensor
    accepted: Tensor
    following: Tensor
    drafted: Tensor | None
    eos: Tensor
    mailbox: Tensor

    def copy(self) -> "State":
        return State(*(None if t is None else t.clone() for t in self.all()))

    def all(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def commit(self, module, k: int, most: int, **keywords) -> None:
        span, limit, draft_limit = LIMITS[most]
        module.commit(
            *self.all(), k, span=span, limit=limit, draft_limit=draft_limit, **keywords
        )  # fmt: skip


def draw(device, k: int, batch: int, seed: int, most: int | None = None, room=64) -> State:
    """A running batch in which anything may happen next; tokens 0..5, of which 3 and 5 end."""
    most = k if most is None else most
    g = torch.Generator().manual_seed(seed)

    def numbers(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.int32)

    progress = torch.zeros(len(Field), batch, dtype=torch.int32)
    progress[Field.LENGTH] = numbers(40, batch)
    progress[Field.ACTIVE] = numbers(5, batch).clamp(max=1)
    progress[Field.BASE] = (progress[Field.LENGTH] - numbers(9, batch)).clamp(min=0)
    progress[Field.DRAFT_BASE] = (progress[Field.LENGTH] - 1 - numbers(9, batch)).clamp(min=0)
    progress[Field.BUDGET] = numbers(2 * k + 4, batch, low=1)
    progress[Field.WRITTEN] = numbers(30, batch)
    progress[Field.STEP] = numbers(100, batch)
    span, limit, draft_limit = LIMITS[most]
    reference.plan_stores(progress, span=span, limit=limit, draft_limit=draft_limit)
    state = State(
        progress=progress,
        feed=numbers(6, batch, 2 + most),
        history=numbers(6, batch, room),
        accepted=numbers(k + 1, batch),
        following=numbers(6, batch),
        drafted=numbers(k + 1, batch) if seed % 2 else None,
        eos=torch.tensor([[-1] * 16, [3] + [-1] * 15, [5, 3] + [-1] * 14][seed % 3]).int(),
        mailbox=torch.full((8, batch, len(Letter) + most + 1), -9, dtype=torch.int32),
    )
    return State(*(None if t is None else t.to(device) for t in state.all()))


def assert_same(actual: State, expected: State) -> None:
    for field, one, other in zip(fields(State), actual.all(), expected.all(), strict=True):
        if other is not None:
            assert torch.equal(one, other), field.name


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("k", "most"), [(0, 0), (1, 1), (3, 3), (8, 8), (0, 3), (2, 8)])
def test_a_commit_equals_the_reference(device, k, most, seed) -> None:
    """Also with fewer drafts than the buffers hold, and where the history ends."""
    state = draw(device, k, 23, seed, most, room=44)
    expected = state.copy()
    expected.commit(reference, k, most)
    state.commit(kernels, k, most, pdl=False)
    assert_same(state, expected)


@pytest.mark.parametrize("k", LIMITS)
def test_a_reference_commit_equals_a_list_of_tokens(k) -> None:
    for seed in range(6):
        before = draw("cpu", k, 40, seed)
        after = before.copy()
        after.commit(reference, k, k)
        finishes = {check(before, after, b, k) for b in range(40)}
        assert finishes >= {Finish.LENGTH, Finish.IDLE, Finish.RUNNING}
        assert (Finish.EOS in finishes) == (seed % 3 > 0)


def check(before: State, after: State, b: int, k: int) -> Finish:
    """One sequence, told once more; returns how it goes on."""
    old, new = before.progress[:, b].tolist(), after.progress[:, b].tolist()
    letter = after.mailbox[old[Field.STEP] % 8, b].tolist()
    others = [slot for slot in range(8) if slot != old[Field.STEP] % 8]
    assert (after.mailbox[others, b] == -9).all()
    assert new[Field.STEP] == old[Field.STEP] + 1
    if not old[Field.ACTIVE]:
        assert (letter[Letter.EMITTED], letter[Letter.FINISH]) == (0, Finish.IDLE)
        assert letter[len(Letter) :] == [-9] * (k + 1)
        assert old[:-1] == new[:-1]
        assert torch.equal(before.feed[b], after.feed[b])
        return Finish.IDLE
    feed, n = before.feed[b].tolist(), int(before.accepted[b])
    tokens = [*feed[2 : 2 + n], int(before.following[b])]
    said = tokens[: old[Field.BUDGET]]
    finish = Finish.LENGTH if len(said) == old[Field.BUDGET] else Finish.RUNNING
    for index, token in enumerate(said):
        if token in before.eos.tolist():
            said, finish = said[: index + 1], Finish.EOS
            break
    drafted = k if before.drafted is None else int(before.drafted[b])
    assert letter[: len(Letter)] == [n, drafted, len(said), finish]
    assert letter[len(Letter) :][: n + 1] == tokens
    index = old[Field.LENGTH] + 1
    row = before.history[b].tolist()
    assert after.history[b].tolist() == row[:index] + tokens + row[index + n + 1 :]
    assert after.feed[b].tolist()[:2] == [*feed[1:], None][n : n + 1] + tokens[-1:]
    assert new[Field.LENGTH] == old[Field.LENGTH] + n + 1
    assert new[Field.BUDGET] == old[Field.BUDGET] - len(said)
    assert new[Field.WRITTEN] == old[Field.WRITTEN] + len(said)
    assert new[Field.ACTIVE] == (finish == Finish.RUNNING)
    assert new[Field.BASE] == old[Field.NEXT] and new[Field.DRAFT_BASE] == old[Field.DRAFT_NEXT]
    return finish


@pytest.mark.parametrize("k", [0, 3])
def test_many_commits_in_a_row_and_a_mailbox_that_wraps_around(device, k) -> None:
    state = draw(device, k, 5, seed=1, room=200)
    state.progress[Field.ACTIVE, :4], state.progress[Field.BUDGET] = 1, 40
    state.progress[Field.STEP], state.eos[:] = 0, -1
    expected, g = state.copy(), torch.Generator().manual_seed(2)
    for _ in range(20):
        for t, high in ((state.accepted, k + 1), (state.following, 6), (state.feed[:, 2:], 6)):
            t.copy_(torch.randint(high, t.shape, generator=g))
        for name in ("accepted", "following", "feed"):
            getattr(expected, name).copy_(getattr(state, name))
        state.commit(kernels, k, k, pdl=False)
        expected.commit(reference, k, k)
        assert_same(state, expected)
    assert state.progress[Field.STEP].tolist() == [20] * 5
    assert state.progress[Field.BUDGET, :4].max() < 40 - (19 if k == 0 else 20)


@pytest.mark.parametrize(("k", "replay"), [(1, 0), (3, 0), (3, 8), (8, 8), (0, 8)])
def test_a_ring_always_holds_what_a_pass_reads(k, replay) -> None:
    """Three positions before the state, the replay and the window, whatever is accepted."""
    span, g = k + 1, torch.Generator().manual_seed(k)
    limit, begin, base = 2 * span + 3 + replay, 5, 5
    stores = 0
    for _ in range(300):
        to = int(next_store(torch.tensor(begin), torch.tensor(base), span, limit))
        assert to in (base, begin)
        assert begin + span - (base - 3) <= limit
        stores += to != base
        begin, base = begin + 1 + int(torch.randint(0, k + 1, (), generator=g)), to
    # lazily, and never without need
    assert 0 < stores < (300 if replay else 301)


def test_plain_decoding_stores_after_every_token() -> None:
    progress = torch.zeros(len(Field), 3, dtype=torch.int32)
    progress[Field.LENGTH] = torch.tensor([0, 4, 7])
    progress[Field.BASE] = torch.tensor([0, 4, 7])
    reference.plan_stores(progress, span=1, limit=0, draft_limit=0)
    assert progress[Field.NEXT].tolist() == [1, 5, 8]
