"""Parts of `scaling.py`: the commands of each, and the figures that follow from what they print."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from chain import TEXT, chats, write_rows
from lost_process import LostProcess
from watch import Row

from mambactl.checkpoint.decoder_sizes import DecoderSizes
from mambactl.cli.training_needs import Subject, needs
from mambactl.options import DistillConfig
from mambactl.speed.shape_table import TABLE, HybridShape, LlamaShape

ROOT = Path(__file__).resolve().parents[1]
TOKENS, DAY = 20e9, 86_400
PAPER = "3 to 4 days on eight A100s for 20B tokens (arXiv 2408.15237)"
# seconds in which all processes of a run have to end with the one that was killed
ALL_STOP = 30
# of losses of a run that was killed and went on, relative to the largest: sums have another order
SAME_LOSS = 1e-3
KILLED_LENGTH = 256
KINDS = ALIGN, MIXERS, WHOLE = ("align-mixers", "logits-mixers", "logits-whole")

Rows = Mapping[str, Row]
Figures = dict[str, object]


@dataclass(frozen=True)
class Command:
    """A command line on `count` GPUs (0: on none) that follows on those named in `follows`.

    mambactl writes to `out` if it is given. `bytes` of each GPU are predicted for kinds of steps.
    What `prepares` takes no further options. `loses` kills a process while it runs.
    """

    name: str
    count: int
    line: Sequence[str]
    out: Path | None = None
    follows: tuple[str, ...] = ()
    bytes: Mapping[str, int | None] = field(default_factory=dict)
    prepares: bool = False
    loses: LostProcess | None = None


@dataclass(frozen=True)
class Part:
    """Commands in order, and the figures of those that ran; `prepare` writes what they read.

    `lacks` says what is missing here without which none of them can run. Those that are `separate`
    are of use without each other.
    """

    commands: Sequence[Command]
    figures: Callable[[Rows], Figures]
    prepare: Callable[[], None] = lambda: None
    lacks: str | None = None
    separate: bool = False


def steps(asked: argparse.Namespace, work: Path) -> Part:
    """Steps of `distill` logits: mixers train on all numbers of GPUs, the whole model on several.

    The largest number comes first and the smallest second, for the case that time runs out.
    """
    order = [max(asked.gpus), *sorted(asked.gpus)[:-1]]
    # a GPU may not hold what trains the whole model
    kinds = {count: (MIXERS, WHOLE)[: 1 + (count > 1)] for count in order}
    commands = {
        count: _timed(asked, asked.shape, kinds[count], count, together=(MIXERS,))
        for count in order
    }

    def figures(rows: Rows) -> Figures:
        found: Figures = {"shape": asked.shape, "paper": PAPER}
        for kind in (MIXERS, WHOLE):
            speeds = {}
            for count in sorted(order):
                if measured := _measured(rows, commands[count], kind):
                    days = TOKENS / measured["tokens_per_second"] / DAY
                    speeds[count] = measured | {"days_of_20B_tokens": round(days, 2)}
            found[kind] = {"gpus": speeds, **_grown(speeds)}
        return found

    return Part(list(commands.values()), figures, lacks=_lacks_steps(), separate=True)


def losses(asked: argparse.Namespace, work: Path) -> Part:
    """Losses and weights of a few fp32 steps of all processes beside those of one."""
    count = max(asked.gpus)
    line = [*_sharded(asked, asked.small, f"{ALIGN},{WHOLE}", count, check=asked.small)]
    command = Command(f"losses on {count}", count, [*line, "--only-check"])
    return Part(
        [command],
        lambda rows: _result(rows, command).get("check", {}),
        lacks=_lacks_steps() or _lacks_several(asked),
    )


def large(asked: argparse.Namespace, work: Path) -> Part:
    """One step of alignment and one of logits at a shape that no GPU holds, after one of each.

    Every process makes its share of the weights from a seed, and nothing is on disk.
    """
    count, kinds = max(asked.gpus), (ALIGN, MIXERS)
    once = {"rows": 1, "warmup": 1, "iters": 1, "profile": 1}
    command = _timed(asked, asked.large, kinds, count, recomputes=True, **once)

    def figures(rows: Rows) -> Figures:
        found: Figures = {"shape": asked.large, "gpus": count}
        found["flags"] = shlex.join(command.line[1:])
        for kind in kinds:
            why = {"error": rows[command.name].note if command.name in rows else "it did not run"}
            found[kind] = _measured(rows, command, kind) or why
        return found

    return Part([command], figures, lacks=_lacks_steps(), separate=True)


def generate(asked: argparse.Namespace, work: Path) -> Part:
    """`generate --dataset` of one and of all processes: equal bytes, and as much for each."""
    options = ["--max-new-tokens", str(asked.tokens), "--ignore-eos", "--keep-unfinished"]

    def files(count: int) -> Iterator[dict]:
        return ({"prompt": question} for question, _, _ in _questions(count))

    made, commands, prepare = _dealt(
        asked, work, "generate", "--dataset", options, asked.prompts, files
    )

    def figures(rows: Rows) -> Figures:
        seconds = [_timed_by(rows, each, "answers") for each in commands]
        tokens = [_metrics(rows, each).get("tokens") for each in commands]
        contents = [
            each.out.read_bytes() for each in commands[:2] if each.out and each.out.exists()
        ]
        equal = contents[0] == contents[1] if len(contents) == 2 else None
        return _shared(asked, rows, commands, tokens, seconds, equal) | {"unit": "tokens/s"}

    return Part([made, *commands], figures, prepare, _lacks_several(asked))


def evaluate(asked: argparse.Namespace, work: Path) -> Part:
    """`eval --tasks` of one and of all processes: equal numbers, and as much for each."""

    def files(count: int) -> Iterator[dict]:
        return (
            {"query": question, "choices": [right, wrong], "gold": 0}
            for question, right, wrong in _questions(count)
        )

    # seconds of the answers alone are a detail
    made, commands, prepare = _dealt(asked, work, "eval", "--tasks", [], asked.questions, files)

    def figures(rows: Rows) -> Figures:
        # two answers are scored of each question
        counts = [2 * asked.questions, 2 * asked.questions, 2 * asked.questions * max(asked.gpus)]
        seconds = [_timed_by(rows, each, "likelihoods") for each in commands]
        scores = [_metrics(rows, each) for each in commands[:2]]
        equal = scores[0] == scores[1] if all(scores) else None
        return _shared(asked, rows, commands, counts, seconds, equal) | {"unit": "likelihoods/s"}

    lacks = None if find_spec("lm_eval") else "eval --tasks needs pip install 'mambactl[eval]'"
    return Part([made, *commands], figures, prepare, _lacks_several(asked) or lacks)


def killed(asked: argparse.Namespace, work: Path) -> Part:
    """`distill --shard` of which a process is killed; half as many go on, to the same losses."""
    most, made = max(asked.gpus), _teacher(asked.small, work)
    device = ["--device", asked.device]
    line = ["convert", str(made.out), "--ratio", "0.5", "--select", "uniform", *device]
    name, follows = f"convert {asked.small}", (made.name,)
    student = Command(name, 1, line, work / name.replace(" ", "-"), follows, prepares=True)
    words = ["distill", str(student.out), "--data", str(TEXT), "--stages", "align", *device]
    # what random weights predict says little, what their attention computes is a target; steps
    # without a slow start diverge at the usual rate, and rounding with them
    words += ["--align-lr", "3e-5"]
    words += ["--max-steps", str(max(8, 2 * asked.steps)), "--warmup", "1"]
    words += ["--save-every", "1", "--batch-size", "1", "--grad-accum", "1"]
    # short rows, of which the text has enough for other ones in every step
    words += ["--max-length", str(min(asked.length, KILLED_LENGTH))]

    def run(name: str, count: int, folder: str, follows: Command, *more: str) -> Command:
        shared = ["--nproc", str(count), "--shard"] if count > 1 else []
        return Command(name, count, [*words, *shared, *more], work / folder, (follows.name,))

    whole = run(f"distill on {most}", most, "whole", student)
    stopped = run(f"distill, one of {most} killed", most, "lost", student)
    killer = LostProcess(work / "lost.partial" / "metrics.jsonl", most - 1)
    stopped = replace(stopped, loses=killer)
    again = run(f"distill resumed on {most // 2}", most // 2, "lost", stopped, "--resume")

    def figures(rows: Rows) -> Figures:
        found: Figures = {"killed": killer.found}
        if killer.found:
            found["all_stopped"] = killer.found["seconds"] <= ALL_STOP
        curves = [_losses(each.out) for each in (whole, again) if each.name in rows and each.out]
        if len(curves) == 2 and all(curves):
            apart = max(abs(a - b) for a, b in zip(*curves, strict=True))
            # the first one may be zero: a window shows all of a short row
            relative = apart / max(map(abs, curves[0]))
            found |= {"losses": curves[0], "losses_after_the_kill": curves[1]}
            found |= {"largest_difference": relative, "equal": relative <= SAME_LOSS}
        return found

    commands = [made, student, whole, stopped, again]
    return Part(commands, figures, lacks=_lacks_several(asked))


PARTS: dict[str, Callable[[argparse.Namespace, Path], Part]] = {
    "steps": steps,
    "large": large,
    "generate": generate,
    "eval": evaluate,
    "killed": killed,
    "losses": losses,
}


def _lacks_several(asked: argparse.Namespace) -> str | None:
    return None if max(asked.gpus) > 1 else "compares several GPUs with fewer: --gpus 1,2"


def _lacks_steps() -> str | None:
    found = (ROOT / "tests" / "performance" / "sharded.py").exists()
    return None if found else "tests/performance/sharded.py is not here: use a checkout"


def _sharded(
    asked: argparse.Namespace, shape: str, kinds: str, count: int, **numbers: object
) -> list[str]:
    """Command line of the steps that are timed."""
    options: dict[str, object] = {
        "nproc": count,
        "model": shape,
        "parts": kinds,
        "device": asked.device,
        "rows": asked.rows,
        "length": asked.length,
        "iters": asked.steps,
        "check": "",
    }
    words = [f"--{name}={value}" for name, value in (options | numbers).items()]
    return [sys.executable, "-m", "tests.performance.sharded", *words]


def _timed(
    asked: argparse.Namespace,
    shape: str,
    kinds: Sequence[str],
    count: int,
    together: Sequence[str] = (),
    recomputes: bool = False,
    **numbers: int,
) -> Command:
    """Steps of some kinds on some GPUs, with the most that one is predicted to hold."""
    numbers = {"profile": 2, **numbers}
    line = _sharded(asked, shape, ",".join(kinds), count, **numbers)
    line += [f"--together={','.join(together)}"] if together else []
    line += ["--grad-checkpointing"] if recomputes else []
    rows = numbers.get("rows", asked.rows)
    sizes = {
        kind: predicted(shape, kind, rows, asked.length, count, kind not in together, recomputes)
        for kind in kinds
    }
    name = f"{' and '.join(kinds)} of {shape} on {count}"
    return Command(name, count, line, bytes=sizes)


def predicted(
    shape: str, kind: str, rows: int, length: int, count: int, shares: bool, recomputes: bool
) -> int | None:
    """Bytes on each GPU as `recipe plan` predicts them; None for a shape that it does not know."""
    found = TABLE[shape]
    if not isinstance(found, HybridShape) or not isinstance(found.base, LlamaShape):
        return None
    base, (heads, keys) = found.base, found.base.heads
    sizes = DecoderSizes(
        base.layers,
        base.hidden,
        base.intermediate,
        heads,
        kv_heads=keys,
        head_dim=base.hidden // heads,
        vocabulary=base.vocabulary,
    )
    stage, _, trains = kind.partition("-")
    usual = DistillConfig()
    config = DistillConfig(
        stages=[stage],
        batch_size=rows,
        max_length=length,
        rest_lr=usual.rest_lr if trains == "whole" else 0,
        grad_checkpointing=recomputes or trains == "whole",
    )
    subject = Subject(sizes, found.ratio, sizes.parameters)
    return needs(config, subject, count, shares and count > 1)[stage].total


def _teacher(shape: str, work: Path) -> Command:
    """Random weights on disk; of a hybrid shape the model that it would be made from."""
    found = TABLE[shape]
    base = found.base if isinstance(found, HybridShape) else found
    named = next(name for name, each in TABLE.items() if each == base)
    name = f"synthetic {named}"
    return Command(name, 0, ["synthetic", named], work / name.replace(" ", "-"), prepares=True)


def _dealt(
    asked: argparse.Namespace,
    work: Path,
    stage: str,
    flag: str,
    options: Sequence[str],
    each: int,
    files: Callable[[int], Iterator[dict]],
) -> tuple[Command, list[Command], Callable[[], None]]:
    """A model, and work that is dealt out: to one process, to all, and as much to each of all."""
    made, most = _teacher(asked.shape, work), max(asked.gpus)
    few, many = (work / f"{stage}-{size}.jsonl" for size in ("few", "many"))
    # -v tells the seconds of the answers alone
    options = [*options, "-v", "--batch-size", str(asked.batch), "--device", asked.device]
    commands = []
    for name, count, data in (
        ("on 1", 1, few),
        (f"the same on {most}", most, few),
        (f"as much for each of {most}", most, many),
    ):
        line = [stage, str(made.out), flag, str(data), *options, "--nproc", str(count)]
        out = work / f"{stage}-{len(commands)}.jsonl" if flag == "--dataset" else None
        commands.append(Command(f"{stage} {name}", count, line, out, (made.name,)))

    def prepare() -> None:
        write_rows(few, files(each))
        write_rows(many, files(each * most))

    return made, commands, prepare


def _questions(count: int) -> Iterator[tuple[str, str, str]]:
    """Questions, each with a number, so that none is asked twice, a right and a wrong answer."""
    found = chats()
    for number in range(count):
        question, answer = found[number % len(found)]
        other = found[(number + 1) % len(found)][1]
        yield f"Question {number + 1}. {question}", answer, other


def _result(rows: Rows, command: Command) -> dict:
    return rows[command.name].result if command.name in rows else {}


def _metrics(rows: Rows, command: Command) -> dict:
    return _result(rows, command).get("metrics", {})


def _measured(rows: Rows, command: Command, kind: str) -> dict:
    """Figures of one kind of steps beside what was predicted; nothing where they failed."""
    found = _result(rows, command).get("parts", {}).get(kind)
    return {**found, "predicted_bytes": command.bytes[kind]} if found else {}


def _grown(speeds: Mapping[int, dict]) -> Figures:
    """Tokens a second of the most GPUs over those of the fewest."""
    if len(speeds) < 2:
        return {}
    few, most = min(speeds), max(speeds)
    ratio = speeds[most]["tokens_per_second"] / speeds[few]["tokens_per_second"]
    return {"ratio_of": [most, few], "ratio": ratio, "efficiency": ratio * few / most}


def _timed_by(rows: Rows, command: Command, what: str) -> float | None:
    """Seconds of all answers, that of loading left out, as a command tells them."""
    return _result(rows, command).get("timed", {}).get(what)


def _shared(
    asked: argparse.Namespace,
    rows: Rows,
    commands: Sequence[Command],
    counts: Sequence[int | None],
    seconds: Sequence[float | None],
    equal: bool | None,
) -> Figures:
    """Rates of all processes over that of one, for as much work for each and for the same."""
    speeds = [n / s if n and s else None for n, s in zip(counts, seconds, strict=True)]
    one, same, more = speeds
    return {
        "gpus": max(asked.gpus),
        "runs": [each.name for each in commands],
        "per_second": speeds,
        "seconds": seconds,
        "seconds_with_loading": [
            rows[each.name].seconds if each.name in rows else None for each in commands
        ],
        "ratio": more / one if one and more else None,
        "ratio_of_the_same_work": same / one if one and same else None,
        "equal": equal,
    }


def _losses(out: Path) -> list[float]:
    """Losses of a run that has ended."""
    metrics = out / "metrics.jsonl"
    if not metrics.exists():
        return []
    lines = map(json.loads, metrics.read_text("utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]
