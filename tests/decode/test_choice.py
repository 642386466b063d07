"""The number of drafts: most tokens per second for the acceptance seen, none where that is so."""

import pytest
import torch

from mambactl.decode.draft_count import PRIOR_ACCEPTANCE, Choice, Experience

CHOICES = (0, 1, 2, 3, 4, 6)


def seconds(step: float, draft: float) -> dict[int, float]:
    return {k: step + draft * k for k in CHOICES}


def expected_tokens(acceptance: float, k: int) -> float:
    """1 + a + a^2 + ... + a^k, term by term."""
    return sum(acceptance**i for i in range(k + 1))


def run(choice: Choice, acceptance: float, steps: int, seed: int = 0, batch: int = 1) -> list[int]:
    """K of every step, with drafts accepted one after another by chance."""
    g, ks = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        ks.append(choice.update())
        for _ in range(batch):
            kept = (torch.rand(ks[-1], generator=g) < acceptance).long().cumprod(0).sum()
            choice.observe(ks[-1], int(kept))
    return ks


def best(acceptance: float, times: dict[int, float]) -> int:
    return max(times, key=lambda k: expected_tokens(acceptance, k) / times[k])


@pytest.mark.parametrize("draft", [0.01, 0.1, 0.3, 0.6, 2.0])
def test_before_anything_is_seen_it_believes_the_prior(draft) -> None:
    times = seconds(1.0, draft)
    choice = Choice(times)
    assert choice.acceptance == pytest.approx(PRIOR_ACCEPTANCE)
    assert choice.k == choice.update() == best(PRIOR_ACCEPTANCE, times)
    for k in CHOICES:
        promised = expected_tokens(PRIOR_ACCEPTANCE, k) / times[k]
        assert choice.promise(k) == pytest.approx(promised)


@pytest.mark.parametrize("draft", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("acceptance", [0.3, 0.55, 0.7, 0.85, 1.0])
def test_it_settles_where_most_tokens_per_second_are(acceptance, draft) -> None:
    times = seconds(1.0, draft)
    choice = Choice(times)
    chosen = run(choice, acceptance, 600)[-1]
    assert choice.acceptance == pytest.approx(acceptance, abs=0.1) or chosen == 0
    gain = {k: expected_tokens(min(acceptance, 0.999), k) / times[k] for k in CHOICES}
    # what is nearly as good is not worth a change
    assert gain[chosen] > 0.93 * max(gain.values())


def test_a_draft_that_never_pays_is_not_even_tried() -> None:
    choice = Choice(seconds(1.0, 2.0))
    assert set(run(choice, 1.0, 20)) == {0}


def test_a_draft_that_is_never_right_is_given_up_for_good() -> None:
    choice = Choice(seconds(1.0, 0.3))
    ks = run(choice, 0.0, 60)
    first = ks.index(0)
    assert 0 < first < 20 and set(ks[first:]) == {0}
    # whatever might be believed later
    choice.passed = choice.tested = 1e6
    assert choice.update() == 0


def test_more_sequences_teach_faster() -> None:
    alone, many = (run(Choice(seconds(1.0, 0.3)), 0.0, 60, batch=n).index(0) for n in (1, 16))
    assert many == 1 < alone


def test_it_follows_a_changing_text() -> None:
    choice = Choice(seconds(1.0, 0.1))
    assert run(choice, 0.95, 400, seed=1)[-1] == 6
    less = run(choice, 0.45, 400, seed=2)
    assert 0 < less[-1] < 4
    assert run(choice, 0.95, 400, seed=3)[-1] == 6
    # the first change takes a few hundred tested tokens at most
    assert next(i for i, k in enumerate(less) if k < 6) < 150


def test_it_does_not_waver_between_equals() -> None:
    """Two numbers of drafts that promise about the same: one change at most."""
    times = {0: 1.0, 3: expected_tokens(0.7, 3) / 2, 4: expected_tokens(0.7, 4) / 2}
    ks = run(Choice(times), 0.7, 800, seed=4)
    assert sum(a != b for a, b in zip(ks, ks[1:], strict=False)) <= 6


def test_steps_without_drafts_teach_nothing() -> None:
    choice = Choice({2: 1.0})
    before = choice.acceptance
    choice.observe(0, 0)
    assert choice.acceptance == before
    # a rejected draft was tested, those behind it were not
    choice.observe(6, 0)
    one = Choice({2: 1.0})
    one.observe(1, 0)
    assert choice.acceptance == one.acceptance < before


def test_one_number_is_no_choice() -> None:
    for k in (0, 3):
        assert set(run(Choice({k: 1.0}), 0.1, 30)) == {k}


def drafted_steps(acceptances: list[float], remembers: bool, draft: float = 0.4) -> list[int]:
    """Steps with drafts of texts of 150 steps, one after the other."""
    experience, found = Experience(), []
    for number, acceptance in enumerate(acceptances):
        prior = experience.acceptance if remembers else PRIOR_ACCEPTANCE
        choice = Choice(seconds(1.0, draft), prior=prior)
        found.append(sum(k > 0 for k in run(choice, acceptance, 150, seed=number)))
        experience.learn(choice)
    return found


def test_a_draft_that_did_not_pay_is_seldom_tried_in_later_texts() -> None:
    hopeless = [0.25] * 30
    every, seldom = (drafted_steps(hopeless, remembers) for remembers in (False, True))
    assert all(every) and sum(seldom) < sum(every) / 3
    # and yet again and again
    assert sum(count > 0 for count in seldom[15:]) >= 2


def test_a_draft_that_pays_from_some_text_on_is_used_from_then_on() -> None:
    found = drafted_steps([0.25] * 10 + [0.95] * 12, remembers=True)
    assert min(found[-4:]) == 150


def test_a_text_that_was_drafted_well_lets_the_next_one_draft_as_much() -> None:
    experience = Experience()
    choice = Choice(seconds(1.0, 0.1))
    run(choice, 0.95, 300)
    experience.learn(choice)
    assert Choice(seconds(1.0, 0.1)).k < 6
    assert Choice(seconds(1.0, 0.1), prior=experience.acceptance).k == 6
