"""The whole chain on random weights of a published shape: seconds, memory and disk of every stage.

    python recipes/chain.py                    Llama-3-8B's shape on one GPU: minutes, 52 GB of disk
    python recipes/chain.py --nproc 2          on two GPUs that share the weights
    python recipes/chain.py --teacher-in /dev/shm      36 GB of disk, and 16 GB of memory
    python recipes/chain.py --shape tiny --device cpu --rows 1 --length 64 --steps 1

Options of the stages are those of `recipes/llama3-8b.yaml`, but for the numbers of steps and the
data. What the next stage does not need is deleted. A stage that fails is reported, and the next one
goes on with the checkpoint before it. Weights are random, so no quality is measured. On standard
output is one table; `--json` keeps the figures, stage by stage.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from stages import Stages, gb, pair, remove
from watch import Peak, Row, gpu_bytes, run

HERE = Path(__file__).resolve().parent
TEXT, HELD_OUT = (HERE / "data" / f"quickstart{name}.jsonl" for name in ("", "-heldout"))
RECIPE = str(HERE / "llama3-8b.yaml")
OURS, PAPER = f"{RECIPE}@50", f"{RECIPE}@paper-50"
# bytes of a parameter that trains, and parameters of a student over its teacher's
STATES, GROWN = 16, 1.12
# above so many parameters export does not compare logits, which takes both models in fp32
CHECKED = 2_000_000_000
ADAPTER_RANK = 16
# of a few steps, whose state nobody resumes
FEW = ("--warmup", "1", "--save-every", "1000000")


class Chain(Stages):
    """The stages in order; `student` is the checkpoint that the next one takes."""

    def __init__(self, asked: argparse.Namespace):
        super().__init__(asked, Path(asked.work).absolute())
        self.teacher = (Path(asked.teacher_in).absolute() if asked.teacher_in else self.work) / (
            "mambactl-chain-teacher"
        )
        self.student: Path | None = None
        self.parameters = 0
        self.device = ["--device", asked.device]
        self.pairs = self.work / "pairs.jsonl"

    def run(self) -> None:
        """Run every stage that is not left out."""
        self.work.mkdir(parents=True, exist_ok=True)
        write_pairs(self.pairs)
        made = self.stage("synthetic", ["synthetic", self.asked.shape], self.teacher, [])
        if made is None:
            return
        self.parameters = made.result.get("metrics", {}).get("parameters", 0)
        if self.asked.copy:
            self.copies()
        self.convert()
        for step in (self.distill, self.sft, self.dpo):
            step()
        self.measure()
        self.export()

    def options(self, splits: bool) -> list[str]:
        """Options for the rows of a step, and for the processes that take it."""
        asked = self.asked
        sizes = ["--batch-size", asked.rows, "--grad-accum", 1, "--max-length", asked.length]
        words = [*map(str, sizes), *self.device]
        if asked.nproc > 1:
            words += ["--nproc", str(asked.nproc), "--shard" if splits else "--no-shard"]
        return words

    def copies(self) -> None:
        """Time `cp` of the teacher, and `convert` by rule, which reads and writes as much."""
        copy = self.work / "copy"
        line = ["cp", "-r", str(self.teacher), str(copy)]
        self.keep(run("cp", line, [self.work], self.asked.limit))
        remove(copy)
        by_rule = ["convert", str(self.teacher), "--ratio", "0.5", "--device", "cpu"]
        self.stage("convert by rule", by_rule, copy, [copy])

    def convert(self) -> None:
        """Half of the KV heads, chosen by measuring."""
        words = ["convert", str(self.teacher), "--recipe", OURS, "--calibrate", str(TEXT)]
        words += ["--calibrate-tokens", "512", "--max-length", str(min(512, self.asked.length))]
        words += ["--select", self.asked.select, *self.device]
        if self.asked.select != "uniform":
            words += ["--select-tokens", "64", "--select-recall", str(self.asked.recall)]
        self.follow("convert", words)

    def distill(self) -> None:
        """Every stage of `distill`; a student whose weights are split writes no text."""
        steps, stages = self.asked.steps, ["align", "stepwise", "stepwise", "logits"]
        if self.asked.nproc == 1:
            stages.append("onpolicy")
        words = ["--recipe", OURS, "--data", str(TEXT), "--eval-data", str(HELD_OUT)]
        words += ["--stages", ",".join(dict.fromkeys(stages)), "--stepwise-groups", "0.5"]
        # two groups of layers, one after the other
        words += ["--max-steps", str(steps * len(stages)), "--align-steps", str(steps)]
        words += ["--stepwise-steps", str(2 * steps), *FEW, "--eval-tokens", "2048"]
        if "onpolicy" in stages:
            words += ["--onpolicy-steps", str(steps), "--onpolicy-tokens", "64"]
        self.train("distill", words)

    def sft(self) -> None:
        """Text with the teacher's distribution; adapters where the whole model does not fit."""
        rank = (
            ADAPTER_RANK if self.asked.lora is None and not self.holds_states else self.asked.lora
        )
        words = ["--recipe", PAPER, "--data", str(TEXT), "--kl-weight", "1"]
        words += ["--max-steps", str(self.asked.steps), *FEW]
        # a model with adapters is whole on every GPU
        more = ["--lora", str(rank)] if rank else []
        self.train("sft", words + more, splits=not rank)

    def dpo(self) -> None:
        """Preferences, the teacher the reference; the whole model trains."""
        if not self.holds_states:
            why = "left out: the GPUs do not hold weights, gradients and moments of the whole model"
            self.keep(Row("dpo", "", 0.0, 0, Peak(), note=why))
            return
        words = ["--recipe", PAPER, "--data", str(self.pairs), "--max-steps", str(self.asked.steps)]
        self.train("dpo", [*words, *FEW])

    @property
    def holds_states(self) -> bool:
        """True if all GPUs together hold what trains the whole model; CPUs are not asked."""
        sizes = gpu_bytes("total")[: self.asked.nproc]
        if self.asked.device == "cpu" or not sizes:
            return True
        return STATES * GROWN * self.parameters < 0.9 * sum(sizes)

    def train(self, name: str, words: Sequence[str], splits: bool = True) -> None:
        """A training stage of the student."""
        if self.student is not None:
            self.follow(name, [name, str(self.student), *words, *self.options(splits)])

    def follow(self, name: str, words: Sequence[str]) -> None:
        """A stage whose result takes the student's name; the student before it is deleted."""
        out = self.work / name
        before = [self.student] if self.student is not None and not self.asked.keep else []
        if self.stage(name, words, out, before) is not None:
            self.student = out

    def measure(self) -> None:
        """Fidelity to the teacher on a few rows, and speculative decoding."""
        if self.student is None:
            return
        length = ["--max-length", str(min(512, self.asked.length))]
        words = ["eval", str(self.student), "--data", str(HELD_OUT), *length, *self.device]
        self.stage("eval", [*words, "--limit", "4"], None, [])
        words = ["spec-decode", "--target", str(self.student), "--recipe", OURS]
        self.stage("spec-decode", [*words, "--max-new-tokens", "32", *self.device], None, [])

    def export(self) -> None:
        """A student of the form that other programs load."""
        portable, exported = self.work / "portable", self.work / "exported"
        gone = [] if self.asked.keep else [self.teacher]
        if self.student is not None and not self.asked.keep:
            remove(self.student)
        words = ["convert", str(self.teacher), "--form", "portable", "--ratio", "0.5"]
        if self.stage("convert portable", [*words, "--device", "cpu"], portable, gone) is None:
            return
        check = [] if self.parameters < CHECKED else ["--no-check"]
        words = ["export", str(portable), "--to", "transformers", *check, *self.device]
        done = [] if self.asked.keep else [portable, exported]
        self.stage("export", words, exported, done)


def chats() -> list[tuple[str, str]]:
    """Questions of the text with their answers."""
    rows = [json.loads(line) for line in TEXT.read_text("utf-8").splitlines()]
    found = [row["messages"] for row in rows if len(row.get("messages", ())) == 2]
    return [(chat[0]["content"][:400], chat[1]["content"][:400]) for chat in found]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Rows as a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_pairs(path: Path) -> None:
    """Preferences out of the text: an answer, and one of another question."""
    found = chats()
    write_rows(
        path,
        (
            {"prompt": question, "chosen": answer, "rejected": found[i - 1][1]}
            for i, (question, answer) in enumerate(found)
        ),
    )


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of all stages, and of the phases of those that have some."""
    lines = ["| stage | seconds | memory | GPU memory | disk | |", "|---|--:|--:|--:|--:|---|"]
    for row in rows:
        peak = row.peak
        cells = (row.stage, f"{row.seconds:.1f}", gb(peak.host), gb(peak.gpu), gb(peak.disk))
        lines.append(f"| {' | '.join(cells)} | {row.note} |")
        for name, found in phases(row):
            speed = found["tokens"] / max(found["seconds"], 1e-9)
            note = f"{found['steps']} steps, {speed:,.0f} tokens/s"
            cells = (f"- {name}", f"{found['seconds']:.1f}", "", gb(found.get("peak_bytes")), "")
            lines.append(f"| {' | '.join(cells)} | {note} |")
    most = max((row.peak.disk for row in rows), default=0)
    total = sum(row.seconds for row in rows)
    lines.append(f"| together | {total:.1f} | | | {gb(most)} | |")
    return "\n".join(lines)


def phases(row: Row) -> list[tuple[str, dict]]:
    """Phases of a training stage, as its metrics have them."""
    found = row.result.get("metrics", {})
    return [
        (name, each)
        for name, each in found.items()
        if isinstance(each, dict)
        and {"steps", "tokens"} <= each.keys()
        and isinstance(each.get("seconds"), float)
    ]


def options() -> argparse.Namespace:
    """Read the command line."""
    text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=text[0], epilog=text[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="llama3-8b", help="a shape of `mambactl synthetic`")
    add("--work", default="runs/chain", help="folder for the checkpoints")
    add("--teacher-in", help="another folder for the teacher, which is not counted as disk")
    add("--device", default="auto", help="device of every stage")
    add("--nproc", type=int, default=1, help="GPUs, or processes, that train together")
    add("--steps", type=int, default=3, help="steps of each phase of training")
    add("--rows", type=int, default=4, help="rows of a step, of each process")
    add("--length", type=int, default=2048, help="tokens of a row")
    add("--recall", type=int, default=128, help="tokens of the rows that heads are chosen on")
    add("--select", choices=("recall", "kl", "uniform"), default="recall")
    add("--lora", type=int, help="rank of sft's adapters; default: where states do not fit")
    add("--limit", type=float, default=300, help="seconds after which a stage is stopped")
    add("--total", type=float, default=86_400, help="seconds after which no stage begins")
    add("--skip", action="append", default=[], metavar="STAGE", help="leave a stage out")
    more = "more options of a stage: --more 'distill=--no-compile'"
    add("--more", type=pair, action="append", default=[], metavar="STAGE=OPTIONS", help=more)
    add("--copy", action="store_true", help="also time cp, and convert by rule")
    add("--keep", action="store_true", help="delete nothing")
    add("--json", metavar="FILE", help="keep the figures")
    asked = parser.parse_args()
    asked.more = dict(asked.more)
    return asked


def main() -> int:
    """Run the chain; 1 where a stage failed."""
    asked = options()
    chain = Chain(asked)
    try:
        chain.run()
    finally:
        if not asked.keep:
            remove(chain.teacher)
        sys.stdout.write(table(chain.rows) + "\n")
    return int(any(row.code for row in chain.rows))


if __name__ == "__main__":
    sys.exit(main())
