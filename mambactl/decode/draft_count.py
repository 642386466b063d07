"""Number of tokens to draft, from the seconds of a step and the acceptance rate so far.

Tokens per step follow from the chance that one draft is accepted (arXiv 2211.17192, equation 1).
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# numbers of drafts an automatic choice is made from
CHOICES = (0, 1, 2, 3, 4, 6)
# what is believed of a draft before it is seen: that share of its tokens accepted, as if tested
# that often
PRIOR_ACCEPTANCE, PRIOR_TESTS = 0.7, 12.0
# the same where steps are timed while they decode: few wasted ones are many of a short answer
EARLY_TESTS = 4.0
# a text without drafts brings what is believed of the next one this much nearer to the prior, so
# that drafts are tried again after some
FORGOTTEN = 0.1
# older steps count less: half as much after this many tests
HALF_LIFE = 256.0
# a number of drafts has to promise this much more than the present one
MARGIN = 1.02
# steps that a time is the shortest of: what else the machine does makes steps longer
REMEMBERED = 9
# steps without a draft, and with few, before the first choice; n-grams copied in the latter
PROBES, NGRAM_PROBE = 2, 3
# plain steps that drafts may have cost more than they gave before they are given up
LOST_STEPS = 2.0
# what a token more in a pass takes of a plain step: measured with 1 to 8 rows on two cores
VERIFIED_TOKEN = 0.06


class Choice:
    """Chooses K from the measured seconds of a step with K drafts and the acceptance rate so far.

    Once K is 0 it stays so: the draft no longer follows the text.
    """

    def __init__(
        self,
        seconds: Mapping[int, float],
        tests: float = PRIOR_TESTS,
        prior: float = PRIOR_ACCEPTANCE,
    ):
        self.seconds = dict(seconds)
        self.passed, self.tested = prior * tests, tests
        self.tried = False
        self.k = max(self.seconds, key=self.promise)

    @property
    def acceptance(self) -> float:
        """Estimated chance that a tested draft is accepted."""
        return self.passed / self.tested

    def promise(self, k: int) -> float:
        """Expected tokens per second of one sequence with k drafts a step."""
        a = min(self.acceptance, 0.999)
        return (1 - a ** (k + 1)) / (1 - a) / self.seconds[k]

    def observe(self, drafted: int, accepted: int) -> None:
        """One sequence's step: `accepted` of `drafted`; a rejected one was tested too."""
        tested = min(accepted + 1, drafted)
        if not tested:
            return
        self.tried = True
        fade = 0.5 ** (tested / HALF_LIFE)
        self.passed = self.passed * fade + accepted
        self.tested = self.tested * fade + tested

    def update(self) -> int:
        """K for the next step."""
        if self.k:
            best = max(self.seconds, key=self.promise)
            if self.promise(best) > MARGIN * self.promise(self.k):
                self.k = best
        return self.k

    @property
    def reason(self) -> str:
        """Sentence that explains the number of drafted tokens; empty if there was no choice."""
        others = [k for k in self.seconds if k]
        if len(self.seconds) < 2 or not others or 0 not in self.seconds:
            return ""
        best = self.k or max(others, key=self.promise)
        gain = self.promise(best) / self.promise(0)
        step = self.seconds[best] / self.seconds[0]
        facts = (
            f"expecting {self.acceptance:.0%} of drafted tokens to be accepted, a step with {best} "
            f"takes {step:.2f} times a plain one: {gain:.2f}x plain decoding"
        )
        tokens = "token" if best == 1 else "tokens"
        return f"drafts {best} {tokens} a step: {facts}" if self.k else f"drafts nothing: {facts}"


@dataclass
class Experience:
    """Acceptance that earlier texts lead to expect of the next one."""

    acceptance: float = PRIOR_ACCEPTANCE

    def learn(self, choice: Choice) -> None:
        """Take note of a text that has ended."""
        if choice.tried:
            self.acceptance = choice.acceptance
        else:
            self.acceptance += FORGOTTEN * (PRIOR_ACCEPTANCE - self.acceptance)


@dataclass
class StepTimes:
    """Seconds of the latest steps by what they drafted, kept between the calls of an engine."""

    latest: dict[int, deque[float]] = field(default_factory=dict)

    def add(self, k: int, seconds: float) -> None:
        """Take note of a step with k drafts."""
        self.latest.setdefault(k, deque(maxlen=REMEMBERED)).append(seconds)

    def count(self, k: int) -> int:
        """Steps with k drafts that are remembered."""
        return len(self.latest.get(k, ()))

    def of(self, ks: Sequence[int]) -> dict[int, float]:
        """Seconds of a step for each k: those measured, and a line through them for the others.

        Needs a step without drafts and one with. A step costs no less than one with fewer drafts.
        """
        known = {k: min(times) for k, times in self.latest.items()}
        most = max(known)
        slope = max((known[most] - known[0]) / most, 0.0)
        found, least = {}, 0.0
        for k in sorted(ks):
            found[k] = least = max(known.get(k, known[0] + k * slope), least)
        return found


class ExpectedTimes(StepTimes):
    """Steps in units of a plain one, by the weights that they read, whatever the clock says.

    Sampled text depends on what was drafted, so that with times that were measured the same seed
    would not give the same text twice. `draft` is a draft token's share of the target's weights.
    """

    def __init__(self, draft: float):
        super().__init__()
        self.draft = draft
        for _ in range(PROBES):
            self.add(0, 1.0)

    def of(self, ks: Sequence[int]) -> dict[int, float]:
        """Relative time of a step for each k: weights are read once, so verifying adds little."""
        return {k: 1.0 + k * (self.draft + VERIFIED_TOKEN) for k in ks}


class LearnedChoice(Choice):
    """Learns the seconds of a step from the steps that decode, where repeating some would cost.

    A draft `model` (unlike n-grams) does not follow a text of which it drafts nothing, so it drafts
    from the start, and the seconds of a plain step have to be in `times` already. Without a model
    the first steps are plain, and where nothing is found to draft a step is plain as well. Drafts
    that lose more than LOST_STEPS plain steps in a row are given up, whatever they promise.
    """

    def __init__(self, ks: Sequence[int], times: StepTimes, model: bool):
        self.ks, self.times, self.model = tuple(ks), times, model
        super().__init__({0: 1.0}, EARLY_TESTS)
        self.least = min(k for k in ks if k)
        self.stopped = False
        self.lost = 0.0
        # steps that looked for drafts, and those of them that found any
        self.asked = self.found = 0
        self._decide()

    @property
    def reason(self) -> str:
        """Sentence that explains the number of drafted tokens; empty if there was no choice."""
        if not self.k and self.lost > LOST_STEPS:
            return f"drafts nothing: drafting took {self.lost:.1f} plain steps more than it gave"
        if self.model or not self.asked:
            return super().reason
        found = f"{self.found} of {self.asked} steps found something to draft"
        if self.k and len(self.seconds) < 2:
            return f"drafts {'little' if self.found else 'nothing'}: {found}"
        return f"{super().reason}; {found}"

    def timed(self, drafted: int, seconds: float, gained: float) -> None:
        """Take note of the step just observed, which gave `gained` tokens a sequence."""
        self.times.add(drafted, seconds)
        self.asked += self.k > 0
        self.found += drafted > 0
        if drafted and self.times.count(0):
            found = self.times.of((0, drafted))
            self.lost = max(self.lost + found[drafted] / found[0] - gained, 0.0)

    def update(self) -> int:
        """K for the next step."""
        if not self.stopped:
            self._decide()
        return self.k

    def _decide(self) -> None:
        if not self.model and self.times.count(0) < PROBES:
            self.k = 0
        elif sum(self.times.count(k) for k in self.times.latest if k) < PROBES:
            # n-grams are rare: the first ones tell about many
            self.k = self.least if self.model else NGRAM_PROBE
        else:
            self.seconds = self.times.of(self.ks)
            best = max(self.seconds, key=self.promise)
            if self.lost > LOST_STEPS:
                best = 0
            self.k = best if best == 0 or self.k == 0 else self._steady(best)
            self.stopped = best == 0

    def _steady(self, best: int) -> int:
        better = self.promise(best) > MARGIN * self.promise(self.k)
        return best if better or self.k not in self.seconds else self.k
