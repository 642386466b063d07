"""Tokens per step and speed of a draft on real prompts, by category, position and temperature.

    python -m tests.performance.drafts --target t.st --draft d.st \
        --prompts mt_bench.jsonl --prompts spec_bench.jsonl --json > drafts.json

Prompts are first turns (rows with `category` and `turns`, or what `--prompts` of generate takes);
of each category of a file `--limit` rows at most are read, the first ones. The same target decodes
them plainly and with the draft in one process, one at a time, greedy and at temperature 1. Tables
go to stderr, with a row for each category of a file and one for all: tokens per step, the share of
steps that accepted a first draft, a second one and so on (a rejected draft ends its step), and
tokens/s beside plain decoding. Greedy answers that differ from those of plain decoding are counted:
passes of several rows round otherwise. `--check` computes passes exactly, which costs speed, and
fails where a token differs at no tie of two logits. `--json` prints everything as one object.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mambactl.json_values import JsonObject
from mambactl.metrics import hundredths, percent, tenths, times
from mambactl.stage_result import StageResult
from tests.performance import command

if TYPE_CHECKING:
    from mambactl.decode.backend import AnyEngine
    from mambactl.decode.engine import Generation
    from mambactl.decode.prompts import Prompt
    from mambactl.generation.decoding import Setup

ALL, WARMUP_TOKENS = "all", 24
FIELDS = ("draft", "k", "weights")

PARSER = command.parser("drafts", __doc__, FIELDS)
PARSER.add_argument("--target", required=True, help="model that decodes")
PARSER.add_argument("--prompts", action="append", required=True, help="file; several times")
PARSER.add_argument("--max-new-tokens", default="256", help="most new tokens of an answer")
PARSER.add_argument("--limit", type=int, help="rows of each category of a file")
PARSER.add_argument("--temperature", action="append", help="several times; default: 0 and 1")
PARSER.add_argument("--check", action="store_true", help="exact passes; fail where tokens differ")


@dataclass(frozen=True)
class Totals:
    """Numbers of all prompts of a category together."""

    category: str
    temperature: float
    prompts: int
    tokens_per_step: float
    accepted_by_position: list[float]
    acceptance_per_token: float | None
    drafts_per_step: float
    tokens_per_second: float
    plain_tokens_per_second: float
    speedup: float
    speedup_with_prefill: float
    different: int
    drafted: JsonObject
    plain: JsonObject


@dataclass
class Runs:
    """Plain and drafted decodings of one category at one temperature."""

    category: str
    temperature: float
    plain: "list[Generation]" = field(default_factory=list)
    drafted: "list[Generation]" = field(default_factory=list)
    different: int = 0

    @property
    def totals(self) -> Totals:
        """Sums and rates over all prompts."""
        from mambactl.decode.stats import DecodeStats

        plain, drafted = DecodeStats(), DecodeStats()
        for total, runs in ((plain, self.plain), (drafted, self.drafted)):
            for run in runs:
                total.add(run.stats)
        rate, own = plain.tokens_per_second, drafted.tokens_per_second
        whole = plain.tokens_per_second_with_prefill
        return Totals(
            self.category,
            self.temperature,
            prompts=len(self.plain),
            tokens_per_step=drafted.tokens_per_step,
            accepted_by_position=by_position(drafted.histogram, drafted.row_steps),
            acceptance_per_token=drafted.acceptance_per_token,
            drafts_per_step=drafted.drafted / max(1, drafted.row_steps),
            tokens_per_second=own,
            plain_tokens_per_second=rate,
            speedup=own / rate if rate else 0.0,
            speedup_with_prefill=drafted.tokens_per_second_with_prefill / whole if whole else 0.0,
            different=self.different,
            drafted=drafted.as_dict(),
            plain=plain.as_dict(),
        )


def by_position(histogram: Mapping[int, int], steps: int) -> list[float]:
    """Share of steps that accepted at least 1, 2, ... drafts, by steps that accepted n."""
    most = max((n for n, count in histogram.items() if count), default=0)
    reached = (sum(histogram.get(n, 0) for n in range(m, most + 1)) for m in range(1, most + 1))
    return [count / max(1, steps) for count in reached]


def joined(runs: Sequence[Runs], temperature: float) -> Runs:
    """All categories of a temperature as one."""
    whole = Runs(ALL, temperature)
    for each in runs:
        if each.temperature == temperature:
            whole.plain += each.plain
            whole.drafted += each.drafted
            whole.different += each.different
    return whole


def read(paths: Sequence[str], limit: int | None) -> "list[tuple[str, Prompt]]":
    """Prompts of all files with the category of each, named after its file, in order."""
    from mambactl.generation.decoding import read_prompts

    found: list[tuple[str, Prompt]] = []
    counts: dict[str, int] = {}
    for path in paths:
        for prompt in read_prompts(path):
            name = f"{Path(path).stem.split('.')[0]}: {prompt.category}".removesuffix(": ")
            counts[name] = counts.get(name, 0) + 1
            if limit is None or counts[name] <= limit:
                found.append((name, prompt))
    return found


def decode(
    setup: "Setup",
    engines: "tuple[AnyEngine, AnyEngine]",
    names: Sequence[str],
    hot: float,
    check: bool,
) -> list[Runs]:
    """Decode every prompt plainly and with the draft at temperature `hot`; group runs by category.

    With `check`, raises CheckError for a greedy token that differs.
    """
    from mambactl import console
    from mambactl.decode.equality import first_differences, require_equal

    params = replace(setup.params, temperature=hot)
    few = replace(params, max_new_tokens=WARMUP_TOKENS)
    for engine in engines:
        engine.generate(setup.prompts[:1], few)
    found: dict[str, Runs] = {}
    with console.progress(f"temperature {hot:g}", len(names)) as task:
        for key, (name, prompt) in enumerate(zip(names, setup.prompts, strict=True)):
            runs = found.setdefault(name, Runs(name, hot))
            plain, drafted = (engine.generate([prompt], params, keys=[key]) for engine in engines)
            runs.plain.append(plain)
            runs.drafted.append(drafted)
            if hot == 0:
                pair = plain.tokens, drafted.tokens
                runs.different += len(first_differences(*pair))
                if check:
                    require_equal(setup.target, [prompt], *pair)
            task.advance(1)
    return list(found.values())


def show(runs: Sequence[Totals], hot: float) -> None:
    """Print one table of a temperature."""
    from mambactl import console

    deepest = max(len(each.accepted_by_position) for each in runs)
    columns = ["category", "prompts", "tok/step"]
    columns += [*(str(n) for n in range(1, deepest + 1)), "tok/s", "plain", "gain"]
    rows = []
    for each in runs:
        shares = [percent(share) for share in each.accepted_by_position]
        rows.append(
            (
                each.category,
                each.prompts,
                hundredths(each.tokens_per_step),
                *shares,
                *[""] * (deepest - len(shares)),
                tenths(each.tokens_per_second),
                tenths(each.plain_tokens_per_second),
                times(each.speedup),
            )
        )
    console.table(f"temperature {hot:g}, steps by accepted draft", columns, rows)


def measure(given: Namespace) -> StageResult:
    """Decode all prompts twice at each temperature."""
    from mambactl.commands import configured
    from mambactl.decode.gpu.fused_engine import FusedEngine
    from mambactl.generation import decoding
    from mambactl.options import SpecDecodeConfig
    from mambactl.present import of_kind
    from mambactl.speed.conditions import conditions

    fields = {
        name: getattr(given, name)
        for name in ("draft", "k", "weights", "max_new_tokens", "check", *command.PLACE)
        if getattr(given, name) is not None
    }
    config = of_kind(SpecDecodeConfig, configured("spec-decode", fields))
    config.require_coherent()
    named = read(given.prompts, given.limit)
    setup = decoding.prepare(config, given.target, [prompt for _, prompt in named])
    engines = (
        setup.engine(plain=True, exact=config.check, share=False),
        setup.engine(exact=config.check, share=False),
    )
    # the same memory and graphs for all prompts: none is captured while others are timed
    longest = max(map(len, setup.prompts)) + config.max_new_tokens
    for engine in engines:
        if isinstance(engine, FusedEngine):
            engine.reserve(1, longest)
    found: list[Totals] = []
    for hot in [float(text) for text in given.temperature or ("0", "1")]:
        runs = decode(setup, engines, [name for name, _ in named], hot, config.check)
        every = [each.totals for each in [*runs, joined(runs, hot)]]
        show(every, hot)
        found += every
    device = setup.target.device
    metrics = {"draft": given.draft, "k": config.k, "runs": [asdict(each) for each in found]}
    text = "\n".join(sentence(each) for each in found if each.category == ALL)
    return StageResult(given.target, metrics | conditions(config, device, setup.target.dtype), text)


def sentence(whole: Totals) -> str:
    """Result of a temperature in one line."""
    return (
        f"temperature {whole.temperature:g}: {whole.tokens_per_step:.2f} tokens/step, "
        f"{whole.tokens_per_second:.1f} tokens/s, {whole.speedup:.2f}x plain decoding "
        f"({whole.prompts} prompts)"
    )


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
