"""`eval --preferences`: preferences of a model, and its KL to the teacher on answers."""

from typing import TYPE_CHECKING

from pydantic import Field

from mambactl import console
from mambactl.evaluation.probes.probe import Asked, Numbers, Probe, Subject
from mambactl.options.evaluation import EvalOptions, rows_per_pass
from mambactl.options.fields import Names
from mambactl.present import present

if TYPE_CHECKING:
    from mambactl.data.preferences import PairSet


class PreferenceOptions(EvalOptions):
    """Pairs of answers."""

    preferences: Names = Field([], description="pairs for reward accuracy, margin and KL, by set")


class PreferenceProbe(Probe[PreferenceOptions, "dict[str, PairSet]", "dict[str, Numbers]"]):
    """Rewards against the teacher, by set of pairs."""

    name, title, group = "preferences", "Preferences", "preferences"
    about = (
        "Whether the answer that people preferred gains more over the teacher than the other one, "
        "in nats; per token, of answers of other lengths."
    )
    options = (PreferenceOptions,)
    example = "--preferences FILE"

    def asked(self, config: PreferenceOptions) -> bool:
        """True if there are pairs."""
        return bool(config.preferences)

    def read(self, config: PreferenceOptions, asked: Asked) -> "dict[str, PairSet]":
        """Read `limit` pairs of each set; warns of rows that are left out."""
        from mambactl.data.preferences import PairSet, load_pairs

        sets = load_pairs(
            config.preferences,
            asked.tokenizer,
            config.max_length,
            skip_bad_rows=True,
            used=config.limit,
            rules=asked.rules,
        )
        return {
            name: PairSet(found.pairs[: config.limit], found.bad) for name, found in sets.items()
        }

    def plan(self, inputs: "dict[str, PairSet] | None") -> dict[str, object]:
        """Pairs of every set."""
        return {self.name: {name: found.counts() for name, found in (inputs or {}).items()}}

    def measure(
        self, config: PreferenceOptions, inputs: "dict[str, PairSet]", subject: Subject
    ) -> dict[str, Numbers]:
        """Compare with the teacher, rewards in nats (beta = 1); rows left out are counted."""
        from mambactl.evaluation.rewards import (
            Layout,
            compare_preferences,
            documents,
            live_reference,
        )
        from mambactl.models.hybrid import HybridForCausalLM

        models = (subject.model, subject.teacher)
        own = all(isinstance(one, HybridForCausalLM) for one in models)
        layout = Layout(config.max_length, rows_per_pass(config), packing=own)
        measured = {}
        total = sum(len(found.pairs) for found in inputs.values())
        with console.progress(self.name, total) as task:
            for name, found in inputs.items():
                if found.pairs:
                    reference = live_reference(
                        present(subject.teacher), documents(found.pairs), layout
                    )
                    numbers = compare_preferences(
                        subject.model, reference, found.pairs, layout, dealer=subject.dealer
                    )
                    left_out = {key: found.counts()[key] for key in ("bad", "too_long")}
                    measured[name] = numbers | left_out
                task.advance(len(found.pairs))
        return measured
