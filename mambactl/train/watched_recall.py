"""Recall of generated rows by a student in training, beside its teacher."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from mambactl import console
from mambactl.evaluation.recall import RecallProbe, measure_recall, recall_probes
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import DistillConfig
from mambactl.train.sharding import inside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def watched_probes(
    config: DistillConfig, tokenizer: "PreTrainedTokenizerBase"
) -> list[RecallProbe]:
    """The probes that are asked for; raises UsageError where their rows do not fit."""
    return recall_probes(tokenizer, config.eval_recall, config.eval_recall_rows, config.seed)


class WatchedRecall:
    """Recall of every probe, and the share of the teacher's recall that is kept.

    The rows are the same every time and no random number is drawn. With `compiled` blocks their
    plain code runs: a length of its own would be compiled for each probe.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: HybridForCausalLM,
        probes: Sequence[RecallProbe],
        amp: torch.dtype | None,
        compiled: bool = False,
    ):
        self.student, self.teacher, self.probes = student, teacher, probes
        self.amp, self.compiled = amp, compiled
        self._wanted: dict[str, float] | None = None

    def measure(self) -> dict[str, object]:
        """`recall` by probe, and `recall_kept`, the mean of its ratios to the teacher's.

        A ratio is at most 1. A probe of which the teacher recalls nothing has none; where no probe
        has one, `recall_kept` is missing.
        """
        if self._wanted is None:
            self._wanted = self._recall(self.teacher)
            console.log("the teacher recalls " + _listed(self._wanted))
        found = self._recall(self.student)
        ratios = [min(1.0, found[name] / most) for name, most in self._wanted.items() if most]
        kept = {"recall_kept": sum(ratios) / len(ratios)} if ratios else {}
        return {"recall": found, **kept}

    def _recall(self, model: HybridForCausalLM) -> dict[str, float]:
        with torch.no_grad(), self._plain_code():
            return inside(model, self._each)

    def _each(self, model: HybridForCausalLM) -> dict[str, float]:
        return {
            probe.name: measure_recall(model, probe, len(probe.input_ids), self.amp)["recall"]
            for probe in self.probes
        }

    def _plain_code(self) -> AbstractContextManager[object]:
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()


def _listed(found: dict[str, float]) -> str:
    return ", ".join(f"{value:.3f} of {name}" for name, value in found.items())
