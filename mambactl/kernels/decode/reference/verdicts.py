"""Drafting from text, judging drafts and closing a step: the reference."""

from mambactl.kernels.decode.reference import control, ngram, sampling


class WindowVerdicts:
    """The reference functions under the names a step calls."""

    draft_ngram = staticmethod(ngram.draft_ngram)
    filter_rows = staticmethod(sampling.filter_rows)
    draw_rows = staticmethod(sampling.draw_rows)
    verdict_greedy = staticmethod(sampling.verdict_greedy)
    verdict_sampled = staticmethod(sampling.verdict_sampled)
    commit = staticmethod(control.commit)
