"""Drafting from text, judging drafts and closing a step, on a GPU."""

from typing import Any

from mambactl.kernels.decode.triton import control, ngram, sampling


class TritonVerdicts:
    """Same methods as `kernels.decode.reference.verdicts.WindowVerdicts`."""

    pdl = False

    def draft_ngram(self, *args: Any) -> None:
        """See `kernels.decode.reference.ngram.draft_ngram`."""
        ngram.draft_ngram(*args, pdl=self.pdl)

    def filter_rows(self, *args: Any) -> None:
        """See `kernels.decode.reference.sampling.filter_rows`."""
        sampling.filter_rows(*args, pdl=self.pdl)

    def draw_rows(self, *args: Any, **keywords: Any) -> None:
        """See `kernels.decode.reference.sampling.draw_rows`."""
        sampling.draw_rows(*args, **keywords, pdl=self.pdl)

    def verdict_greedy(self, *args: Any) -> None:
        """See `kernels.decode.reference.sampling.verdict_greedy`."""
        sampling.verdict_greedy(*args, pdl=self.pdl)

    def verdict_sampled(self, *args: Any) -> None:
        """See `kernels.decode.reference.sampling.verdict_sampled`."""
        sampling.verdict_sampled(*args, pdl=self.pdl)

    def commit(self, *args: Any, **keywords: Any) -> None:
        """See `kernels.decode.reference.control.commit`."""
        control.commit(*args, **keywords, pdl=self.pdl)
