"""How many tokens to draft: the number that promises most tokens per second, or none."""

from collections.abc import Mapping

# what is believed of a draft before it is seen: that share of its tokens accepted, as if tested
# that often
PRIOR_ACCEPTANCE, PRIOR_TESTS = 0.7, 12.0
# older steps count less: half as much after this many tests
HALF_LIFE = 256.0
# a number of drafts has to promise this much more than the present one
MARGIN = 1.02


class Choice:
    """Chooses K from the measured seconds of a step with K drafts and the drafts' fortune so far.

    Tokens per step follow from the chance that one draft is accepted (arXiv 2211.17192, eq. 1).
    Once K is 0 it stays so: the draft no longer follows the text.
    """

    def __init__(self, seconds: Mapping[int, float]):
        self.seconds = dict(seconds)
        self.passed, self.tested = PRIOR_ACCEPTANCE * PRIOR_TESTS, PRIOR_TESTS
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
