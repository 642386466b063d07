"""Pairs of a DPO run: those it trains on, and those held out of the same or other sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mambactl import console
from mambactl.checkpoint.vocabulary import model_config
from mambactl.data.bad_rows import BadRows
from mambactl.data.format import Rules
from mambactl.data.mixture import shares
from mambactl.data.preferences import Pair, PairSet, held_out, load_pairs, marked, without_prompts
from mambactl.data.row_files import is_on_hub
from mambactl.data.sources import Document, set_names
from mambactl.errors import UsageError
from mambactl.generation.decoding import warn_beyond_positions
from mambactl.json_values import JsonObject
from mambactl.options import DpoConfig
from mambactl.train.epochs import with_steps
from mambactl.train.job import Job
from mambactl.train.rows import Checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Preferences:
    """`train` in the order of the seed, no longer than the run; `held` by set; rows by set."""

    train: list[Pair]
    held: dict[str, list[Pair]]
    counts: dict[str, dict[str, int]]
    # pairs to train on, of which a short run sees some
    available: int


def read_preferences(job: Job, config: DpoConfig) -> Preferences:
    """Load and split the data of a run, and say what became of its rows.

    No prompt is on both sides. Raises UsageError for bad rows and where nothing is left to train
    or to measure on.
    """
    _require_apart(config)
    tokenizer = job.tokenizer()
    checks = Checks.of(job, tokenizer, BadRows())
    rules = _rules(job, config, checks)
    sets = load_pairs(
        config.data,
        tokenizer,
        config.max_length,
        max_samples=config.max_samples,
        used=job.examples,
        doubts=checks.doubts,
        **rules,
    )
    _tell(job, checks, sets, tokenizer)
    counts = {name: found.counts() for name, found in sets.items()}
    _report("data", sets)
    measured: Mapping[str, PairSet] = {}
    if config.eval_data:
        used = config.eval_pairs
        rules["skip_bad_rows"] = True
        measured = load_pairs(config.eval_data, tokenizer, config.max_length, used=used, **rules)
        _report("held out", measured)
        sets, dropped = without_prompts(sets, _keys(measured))
        if dropped:
            console.warn(f"{dropped} pairs have a held-out prompt and are not trained on")
    elif config.eval_share:
        sets, measured = held_out(sets, config.eval_share)
    train = [pair for found in sets.values() for pair in found.pairs]
    if not train:
        raise UsageError("every prompt is held out", "give other --data, or a smaller --eval-share")
    held = _limited(measured, config)
    if config.max_kl is not None and not held:
        raise UsageError(
            "no pair is held out, so --max-kl would never stop the run",
            "give more --data, a larger --eval-share, or --eval-data FILE",
        )
    order = np.random.default_rng(config.seed).permutation(len(train))
    chosen = [train[index] for index in order[: job.examples]]
    sizes = ", ".join(f"{name} {len(pairs)}" for name, pairs in held.items())
    console.log(
        f"training on {len(chosen)} of {len(train)} pairs"
        + (f"; held out: {sizes}" if sizes else "")
    )
    warn_beyond_positions(
        model_config(job.source), max(pair.longest for pair in chosen), "the model"
    )
    return Preferences(chosen, held, counts, len(train))


def _rules(job: Job, config: DpoConfig, checks: Checks) -> JsonObject:
    """Keywords for reading rows, both of training and of held-out sets."""
    rules = Rules(day=job.day, vocabulary=checks.vocabulary)
    return {"chat": config.chat, "skip_bad_rows": config.skip_bad_rows, "rules": rules}


def _tell(
    job: Job, checks: Checks, sets: Mapping[str, PairSet], tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Warn of what is doubtful about rows, and of answers that do not end."""
    for found in sets.values():
        for pair in found.pairs:
            checks.endings.see(Document(pair.where, {}), pair.answers[0])
    checks.tell(job, tokenizer)


def preview(job: Job, config: DpoConfig) -> JsonObject:
    """Rows of every file by what becomes of them, and a pair as the model reads it."""
    _require_apart(config)
    specs = [spec for spec in config.data if not is_on_hub(spec)]
    names = dict(zip(config.data, set_names(config.data), strict=True))
    if config.data and not specs:
        return {"documents": None, "pairs": dict.fromkeys(names.values()), "example": None}
    tokenizer = job.tokenizer()
    checks = Checks.of(job, tokenizer, BadRows())
    rules = _rules(job, config, checks)
    most: JsonObject = {"max_samples": config.max_samples, "doubts": checks.doubts}
    sets = load_pairs(specs, tokenizer, config.max_length, **most, **rules)
    _tell(job, checks, sets, tokenizer)
    first = next(pair for found in sets.values() for pair in found.pairs)
    total = sum(len(found.pairs) for found in sets.values())
    with_steps(job, total, "pairs")
    held: Mapping[str, PairSet] = {}
    if local := [spec for spec in config.eval_data if not is_on_hub(spec)]:
        held = load_pairs(local, tokenizer, config.max_length, **{**rules, "skip_bad_rows": True})
    elif config.eval_share:
        held = held_out(sets, config.eval_share)[1]
    return {
        "documents": total if len(specs) == len(config.data) else None,
        # a set on the hub is not asked
        "pairs": dict.fromkeys(names.values()) | {name: s.counts() for name, s in sets.items()},
        "held_out": {name: len(found.pairs) for name, found in held.items()},
        "example": marked(first, tokenizer),
    }


def _require_apart(config: DpoConfig) -> None:
    if shares(config.data):
        raise UsageError("dpo takes pairs as they come, without weights", "drop =NUMBER of --data")
    if config.eval_data and config.eval_share:
        raise UsageError("--eval-data and --eval-share both hold data out", "give one of them")
    if shared := sorted(set(config.data) & set(config.eval_data)):
        message = f"{', '.join(shared)} is training data and held out"
        raise UsageError(message, "give other --eval-data, or --eval-share 0.1 in its place")


def _keys(sets: Mapping[str, PairSet]) -> set[int]:
    return {pair.key for found in sets.values() for pair in found.pairs}


def _limited(sets: Mapping[str, PairSet], config: DpoConfig) -> dict[str, list[Pair]]:
    """Held-out pairs, at most `eval_pairs` of every set and always the same."""
    held = {}
    for name, found in sets.items():
        order = np.random.default_rng(config.seed).permutation(len(found.pairs))
        if len(order):
            held[name] = [found.pairs[index] for index in order[: config.eval_pairs]]
        else:
            console.warn(f"no pair of {name} is held out")
    return held


def _report(title: str, sets: Mapping[str, PairSet]) -> None:
    console.table(
        title,
        ("set", "pairs", "bad rows", "too long"),
        [(name, *map(str, found.counts().values())) for name, found in sets.items()],
    )
