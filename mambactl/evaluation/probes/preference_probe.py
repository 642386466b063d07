"""`eval --preferences`: what a model prefers, and how far it is from its teacher on answers."""

from collections.abc import Mapping
from typing import Any

from mambactl import console
from mambactl.data.preferences import PairSet, load_pairs
from mambactl.evaluation.rewards import (
    HEADINGS,
    Layout,
    by_set,
    compare_preferences,
    documents,
    read_reference,
)
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import EvalConfig


def read_preference_sets(config: EvalConfig, tokenizer: Any) -> dict[str, PairSet]:
    """The sets of `config.preferences`, `limit` pairs of each; warns of rows that are left out."""
    sets = load_pairs(
        config.preferences, tokenizer, config.max_length, skip_bad_rows=True, used=config.limit
    )
    return {name: PairSet(found.pairs[: config.limit], found.bad) for name, found in sets.items()}


def measure_preferences(
    config: EvalConfig, sets: Mapping[str, PairSet], model: Any, reference: Any
) -> dict[str, dict[str, Any]]:
    """Set -> numbers of `SCALARS`, with rewards in nats (beta = 1), and rows that were left out."""
    own = all(isinstance(one, HybridForCausalLM) for one in (model, reference))
    layout = Layout(config.max_length, config.rows, packing=own)
    measured = {}
    with console.progress("preferences", sum(len(found.pairs) for found in sets.values())) as task:
        for name, found in sets.items():
            if found.pairs:
                states = read_reference(reference, documents(found.pairs), layout)
                numbers = compare_preferences(model, states, found.pairs, layout)
                measured[name] = numbers | {k: found.counts()[k] for k in ("bad", "too_long")}
            task.advance(len(found.pairs))
    return measured


def show_preferences(source: str, reference: str, measured: Mapping[str, dict[str, Any]]) -> None:
    """A line per set."""
    title = f"preferences of {source} against {reference}"
    console.table(title, ("set", "pairs", *HEADINGS), by_set(measured))
