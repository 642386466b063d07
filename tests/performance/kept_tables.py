"""Tables of `recipes/results/*.md`, made from the JSON that is kept beside them.

    python -m tests.performance.kept_tables          (writes every table anew)

A table stands between the marks `<!-- NAME -->` and `<!-- /NAME -->` of the document that `TABLES`
names. A test fails where a document shows something else than its JSON. The figure of the README
comes from `python -m tests.performance.students`.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambactl.checkpoint.card import between
from mambactl.errors import UsageError
from mambactl.files import replacing
from mambactl.json_values import JsonObject
from mambactl.metrics import count, exact, hundredths, markdown_row, percent, ratio, tenths
from mambactl.report.bench_table import markdown as bench_markdown
from mambactl.stage_result import StageResult
from tests.performance import command, packages, students

RESULTS = Path(__file__).parents[2] / "recipes" / "results"
Row = Sequence[str]
RECALL = ("256", "1024", "2048")


@dataclass(frozen=True)
class KeptTable:
    """A table: its document, and the lines that the named files of JSON give."""

    document: str
    files: tuple[str, ...]
    make: Callable[..., str]

    def text(self) -> str:
        """The table as Markdown."""
        return self.make(*(RESULTS / name for name in self.files))


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _table(columns: Row, rows: Iterable[Row], left: int = 1) -> str:
    marks = ["---"] * left + ["--:"] * (len(columns) - left)
    return "\n".join(markdown_row(row) for row in (columns, marks, *rows))


def _millions(tokens: int | None) -> str:
    return "" if not tokens else f"{tokens / 1e6:.1f}M"


def _thousandths(value: float) -> str:
    return f"{value:.3f}"


def _perplexity_ratio(fidelity: Mapping[str, Any]) -> str:
    found = fidelity.get("perplexity_ratio")
    return ratio(found or fidelity["perplexity"] / fidelity["teacher_perplexity"])


def _pairs(recall: Mapping[str, Any], tokens: str) -> str:
    """Recall of key-value and of multi-query pairs that many tokens back."""
    found = (recall.get(f"{probe}-{tokens}") for probe in ("kv", "mqar"))
    values = [each["recall"] if isinstance(each, Mapping) else each for each in found]
    return "" if None in values else " / ".join(hundredths(value) for value in values)


def quick_start(path: Path) -> str:
    """Numbers of the quick start: quality, cache and speed of its student."""
    kept = _read(path)
    found, speed = (kept[name]["result"]["metrics"] for name in ("eval", "bench"))
    (fidelity,), recall = found["fidelity"].values(), found["recall"]
    theirs = {name: each["teacher"] for name, each in recall.items() if "teacher" in each}
    last = speed["points"][-1]
    length = count(last["input_len"])
    rows = [
        ("held-out tokens", count(fidelity["tokens"])),
        ("top-1 agreement with the teacher", _thousandths(fidelity["agreement"])),
        ("KL to the teacher, nats per token", _thousandths(fidelity["kl"])),
        ("perplexity, student / teacher", _perplexity_ratio(fidelity)),
        ("recall 256 tokens back, key-value / multi-query", _pairs(recall, "256")),
        ("the same of the teacher", _pairs(theirs, "256")),
        (f"cache at {length} tokens, teacher / student", hundredths(last["cache_reduction"])),
        (f"decoding at {length} tokens, student / teacher", hundredths(last["decode_speedup"])),
        ("seconds, all stages", count(kept["seconds"])),
    ]
    return _table(("quick start", "two CPU cores"), rows)


def initialisations(path: Path) -> str:
    """Students of one choice of layers by initialisation and training."""
    runs = _read(path)["runs"]
    rows = [
        (
            run["name"],
            _millions(sum(each["tokens"] for each in run.get("training", {}).values())),
            _thousandths(run["fidelity"]["kl"]),
            _thousandths(run["fidelity"]["agreement"]),
            _perplexity_ratio(run["fidelity"]),
        )
        for run in sorted(runs, key=lambda run: -run["fidelity"]["kl"])
    ]
    return _table(
        ("initialisation and training", "tokens", "KL", "agreement", "perplexity ratio"), rows
    )


def by_layer(windows: Path, states: Path) -> str:
    """Students of whole layers: a window beside the state, a state alone, and the control."""
    kept = {"window": _read(windows)["runs"], "state": _read(states)["runs"]}
    shares = [run["name"] for run in kept["window"] if "fidelity" in run]
    rows: list[Row] = []
    for share in shares:
        for kind, runs in kept.items():
            run = next(each for each in runs if each["name"] == share)
            rows.append(_layer_row(share, kind, run["tokens_seen"], run["fidelity"], run["recall"]))
        control = _control(next(each for each in kept["window"] if each["name"] == share))
        rows.append(_layer_row(share, "control", None, *control))
    for run in kept["state"]:
        if "paper" in run["name"]:
            name = "every other layer"
            rows.append(
                _layer_row(name, "the paper's recipe", run["tokens_seen"], run["fidelity"], {})
            )
    untrained = _read(states)["no_gradient"]["fidelity"]
    rows.append(_layer_row("50 % replaced", "state, closed-form fit only", None, untrained, {}))
    columns = ("replaced", "student", "tokens", "KL", "agreement", "perplexity ratio",
               "KL after token 256", "recall 256")  # fmt: skip
    return _table(columns, rows, left=2)


def _control(run: Mapping[str, Any]) -> tuple[Any, Any]:
    found = next(each for name, each in run["controls"].items() if name.startswith("window"))
    return found["fidelity"]["held"], found.get("recall", {})


def _layer_row(
    share: str, kind: str, tokens: int | None, fidelity: Mapping[str, Any], recall: Any
) -> Row:
    late = fidelity.get("by_position", {}).get("256-1023", {}).get("kl")
    return (
        share,
        kind,
        _millions(tokens),
        _thousandths(fidelity["kl"]),
        _thousandths(fidelity["agreement"]),
        _perplexity_ratio(fidelity),
        "" if late is None else hundredths(late),
        _pairs(recall, "256"),
    )


def untrained_heads(path: Path) -> str:
    """The teacher with fewer KV heads that see all of the past, untrained."""
    rows = [
        (
            f"{each['chosen']}, by {each['by']}",
            str(each["kv_heads"]),
            _thousandths(each["quickstart_heldout"]["kl"]),
            _thousandths(each["other_text"]["kl"]),
            _thousandths(each["other_text"]["agreement"]),
            *(_pairs(each["recalled"], tokens) for tokens in RECALL),
            _over_teacher(each, "mean"),
        )
        for each in _read(path)["untrained"]
    ]
    columns = ("kept", "KV heads", "KL, quick start", "KL, other text", "agreement",
               "recall 256", "1,024", "2,048", "mean over the teacher's")  # fmt: skip
    return _table(columns, rows)


def trained_heads(path: Path) -> str:
    """Students after 10M tokens by the way in which their heads were chosen."""
    rows = [
        (
            each["chosen"],
            str(each["kv_heads"]),
            _thousandths(each["fidelity"]["kl"]),
            _thousandths(each["fidelity"]["agreement"]),
            *(_pairs(each["recall"], tokens) for tokens in RECALL),
            _over_teacher(each, "mean"),
            _over_teacher(each, "least"),
        )
        for each in _read(path)["runs"]
    ]
    columns = ("heads kept by", "heads", "KL", "agreement", "recall 256", "1,024", "2,048",
               "mean over the teacher's", "least")  # fmt: skip
    return _table(columns, rows)


def _over_teacher(each: Mapping[str, Any], name: str) -> str:
    found = each.get("recall_over_teacher")
    return "" if found is None else hundredths(found[name] if isinstance(found, dict) else found)


def answers(path: Path) -> str:
    """`sft` on the teacher's answers, with its distribution and without."""
    kept = _read(path)
    start = kept["start"]["multiple_choice"]["mean_of_seven"]
    rows = [("start", exact(kept["sft"]["before"]["kl"]), tenths(start))]
    for run in kept["sft"]["runs"]:
        score = run["multiple_choice"]["mean_of_seven"]
        rows.append((run["name"], exact(run["metrics"]["sft"]["kl"]), tenths(score)))
    return _table(("`sft`, 100 steps", "KL", "multiple choice"), rows)


def preferences(path: Path) -> str:
    """`dpo`: reward accuracy by held-out set."""
    runs = _read(path)["dpo"]["runs"]
    sets = runs[0]["held_out"]
    rows = [
        (f"{name}, {sets[name]['pairs']} pairs", *(
            hundredths(run["held_out"][name]["reward_accuracy"]) for run in runs
        ))
        for name in sets
    ]  # fmt: skip
    rows += [
        ("all pairs", *(_thousandths(run["accuracy"]["all_pairs"]) for run in runs)),
        ("largest KL of a set to the start, per token", *(
            _thousandths(run["accuracy"]["largest_kl_of_a_set"]) for run in runs
        )),
        ("multiple choice", *(tenths(run["multiple_choice"]["mean_of_seven"]) for run in runs)),
    ]  # fmt: skip
    return _table(("reward accuracy", *(run["name"] for run in runs)), rows)


def own_text(path: Path) -> str:
    """Students trained on text that is given and on their own, measured on both."""
    found = _read(path)["students"]

    def row(name: str, cell: Callable[[JsonObject], str]) -> Row:
        return name, *(cell(each) for each in found.values())

    def held(name: str) -> Callable[[JsonObject], str]:
        return lambda each: _interval(each["held"], name) if "held" in each else ""

    rows = [
        row("KL(student, teacher) on its own text", lambda each: _interval(each, "reverse_kl")),
        row("KL, held", held("kl")),
        row("mean of seven sets", lambda each: tenths(100 * each["tasks"]["mean"]["student"])
            if "tasks" in each else ""),
        row("answers that end", lambda each: percent(each["ended"])),
        row("answers with a 4-gram four times", lambda each: percent(each["repeating"])),
    ]  # fmt: skip
    return _table(("", *found), rows)


def _interval(each: JsonObject, name: str) -> str:
    low, high = (f"{end:.4f}" for end in each[f"{name}_interval"])
    return f"{each[name]:.4f} [{low} to {high}]"


def first_token(path: Path) -> str:
    """Milliseconds to the first token of models of Llama-3-8B's shape by length of the prompt."""
    models: dict[str, dict[int, float]] = {}
    for name, point in _points(_read(path)["runs"]):
        if "speculative_tokens_per_second" not in point and name.startswith(("llama", "trans")):
            models.setdefault(name, {})[point["input_len"]] = point["first_token_ms"]
    lengths = sorted({length for found in models.values() for length in found})
    rows = [
        (count(n), *(tenths(found[n]) if n in found else "" for found in models.values()))
        for n in lengths
    ]
    return _table(("tokens of the prompt", *models), rows)


def long_contexts(path: Path) -> str:
    """Tokens per second of all rows behind long prompts, by length and rows."""
    models: dict[str, dict[tuple[int, int], float]] = {}
    for name, point in _points(_read(path)["runs"]):
        at = point["input_len"], point["batch_size"]
        models.setdefault(name, {})[at] = point["decode_tokens_per_second"]
    every = sorted({at for found in models.values() for at in found})
    whole, student = models.values()
    rows = [
        (
            count(length),
            count(batch),
            *(tenths(found[at]) if at in found else "" for found in models.values()),
            f"{hundredths(student[at] / whole[at])}x" if at in whole else "",
        )
        for at in every
        for length, batch in [at]
    ]
    return _table(("tokens of the prompt", "rows", *models, "gain"), rows, left=0)


def served(path: Path) -> str:
    """A server beside `bench`: streams at once, one stream, and the first token."""
    found = _read(path)["serving"]
    many, one = found["streams"], found["one"]
    rows = [
        ("32 streams, tokens/s", count(round(many["tokens_per_second"]))),
        ("`bench` with 32 rows, tokens/s", count(round(found["bench_tokens_per_second"]))),
        ("32 streams over `bench`", f"{hundredths(found['of_bench'])}x"),
        ("decoding alone, over `bench`", f"{hundredths(found['of_bench_decoding'])}x"),
        ("one stream, ms a token", hundredths(one["ms_per_token"])),
        ("`bench` with one row, ms a token", hundredths(found["bench_step_ms"])),
        ("first token of one request, ms", tenths(one["first_token_ms"])),
        ("the same while 31 others decode, ms", tenths(found["first_token_beside_ms"])),
        ("first token of 32 requests at once, median and last, ms",
         f"{tenths(many['first_token_ms'])}; {tenths(many['last_first_token_ms'])}"),
    ]  # fmt: skip
    return _table(("a server", "one H200"), rows)


def _points(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for run in runs:
        for point in run["points"]:
            yield point["model"], point
        for point in run.get("transformers", ()):
            yield "transformers' Llama", point


def eight_bits(path: Path) -> str:
    """Microseconds of an MLP's products by rows, with weights in bf16 and in 8 bits."""
    runs = {run["config"]["weights"]: run for run in _read(path)["runs"]}
    found = {
        (each["rows"], each["product"], kind): each
        for kind, run in runs.items()
        for each in run["products"]
    }
    products = ("swiglu", "add_residual")
    names = ("up and gate", "down")
    columns = [f"{name}, {kind}" for name in names for kind in ("bf16", *runs)]
    rows = [
        (
            count(rows),
            *(
                tenths(found[rows, product, kind or "int8"]["bytes_us" if kind else "bf16_us"])
                for product in products
                for kind in ("", *runs)
            ),
        )
        for rows in sorted({key[0] for key in found})
    ]
    return _table(("rows", *columns), rows)


def eight_bit_steps(path: Path) -> str:
    """Plain decoding with weights in bf16 and in 8 bits."""
    rows = [
        (
            run["config"]["weights"],
            *(tenths(point["decode_tokens_per_second"]) for point in run["points"]),
            f"{hundredths(run['points'][1]['weights_gain'])}x",
        )
        for run in _read(path)["runs"]
    ]
    return _table(("weights", "bf16, tokens/s", "8 bits, tokens/s", "gain"), rows)


def beside_packages(path: Path) -> str:
    """Milliseconds of our scans and convolution, and of the packages'."""
    return _table(*packages.columns_and_lines(_read(path)["packages"]), left=3)


def training_speed(path: Path) -> str:
    """Tokens per second and memory of training steps."""
    speeds = _read(path)["speed"]
    rows = [
        (
            point["model"],
            point["stage"],
            f"{point['batch_size']} x {count(point['input_len'])}",
            count(round(point["tokens_per_second"])),
            tenths(point["milliseconds"]),
            tenths(point["peak_bytes"] / 1e9),
        )
        for name in ("captured", "llama3_8b")
        for point in speeds[name]["points"]
    ]
    columns = ("model", "step", "rows x tokens", "tokens/s", "ms a step", "peak GB")
    return _table(columns, rows, left=3)


def decoding(path: Path) -> str:
    """Plain and speculative decoding, as `mambactl table` writes it."""
    return bench_markdown([(path.name, _read(path))])


def kept_students(path: Path) -> str:
    """Quality that students keep, and their caches."""
    return students.markdown(students.read_students([str(path)]))


HEADS = "smollm2-135m-heads-h200.json"
ALIGNMENT = "smollm2-135m-alignment-h100.json"
CHAIN = "smollm2-135m-distill-h200.json"
TABLES = {
    "quick start": KeptTable("quickstart.md", ("quickstart-cpu.json",), quick_start),
    "students": KeptTable("students.md", ("smollm2-135m-students-h200.json",), kept_students),
    "initialisations": KeptTable(
        "by-layer.md", ("smollm2-135m-50-h200.json",), initialisations
    ),
    "by layer": KeptTable("by-layer.md", ("smollm2-135m-window-h200.json", CHAIN), by_layer),
    "training speed": KeptTable("by-layer.md", (CHAIN,), training_speed),
    "packages": KeptTable("packages.md", ("packages-h200.json",), beside_packages),
    "untrained heads": KeptTable("heads.md", (HEADS,), untrained_heads),
    "trained heads": KeptTable("heads.md", (HEADS,), trained_heads),
    "own text": KeptTable("students.md", ("on-policy-h200.json",), own_text),
    "answers": KeptTable("alignment.md", (ALIGNMENT,), answers),
    "preferences": KeptTable("alignment.md", (ALIGNMENT,), preferences),
    "first token": KeptTable("decoding.md", ("first-token-h200.json",), first_token),
    "long contexts": KeptTable("decoding.md", ("long-context-h200.json",), long_contexts),
    "serving": KeptTable("decoding.md", ("serving-h200.json",), served),
    "8 bits": KeptTable("decoding.md", ("eight-bits-h200.json",), eight_bit_steps),
    "products of 8 bits": KeptTable("decoding.md", ("eight-bits-h200.json",), eight_bits),
    # the marks of `mambactl table --into`
    "bench": KeptTable("decoding.md", ("decode-h200.json",), decoding),
}  # fmt: skip
PARSER = ArgumentParser(
    "python -m tests.performance.kept_tables", description=__doc__.splitlines()[0]
)
PARSER.set_defaults(json=False)


def marks(name: str) -> tuple[str, str]:
    """The two lines between which a table stands."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def shown(name: str) -> str:
    """The table that its document shows now."""
    begin, end = marks(name)
    text = (RESULTS / TABLES[name].document).read_text("utf-8")
    return text.partition(f"{begin}\n")[2].partition(f"\n{end}")[0]


def write(given: Namespace) -> StageResult:
    """Put every table into its document."""
    for name, table in TABLES.items():
        path = RESULTS / table.document
        text = between(path.read_text("utf-8"), *marks(name), table.text())
        if text is None:
            raise UsageError(f"{path} has no place for {name}", f"put {' and '.join(marks(name))}")
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    return StageResult(None, {}, "\n".join(sorted({each.document for each in TABLES.values()})))


if __name__ == "__main__":
    sys.exit(command.run(write, PARSER.parse_args()))
