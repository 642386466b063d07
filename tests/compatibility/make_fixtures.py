"""Make the fixtures that later versions must load, resume and report.

They are made once, by the version that is to be kept to, and then stay as they are. Those in
`fixtures/` come from commit ed5fee4. To make others, run this with that version first on the path:

    git worktree add ../old ed5fee4
    OMP_NUM_THREADS=1 PYTHONPATH=../old python tests/compatibility/make_fixtures.py NEW_FOLDER

Everything is made by commands, except the inputs and the logits. Names of the folder where they ran
are cut out of the checkpoints before the next command reads them, so that lineages name relative
paths and digests are those of the files that are kept; unfinished runs, which record full paths,
have PLACE instead. Single files are compressed, whose headers have 128 KiB of room for a lineage,
and so are states of unfinished runs.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from logits import logits_of
from page_rows import rows_of
from tiny_inputs import write_inputs

PLACE = "{fixtures}"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# files of these kinds are kept compressed where that makes them so much smaller
BINARY, PACKED = (".st", ".pt", ".pth"), 0.8
CPU = ("--device", "cpu")
SHORT = (*CPU, "--max-length", "32", "--batch-size", "2", "--warmup", "2")
SFT = ("--data", "text.jsonl", "--max-steps", "50", "--lr", "2e-2", *SHORT)

# mixers of both layers: how attention is replaced, one command after the other
CONVERSIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "mamba2_rotary": (("llama", "--rotary", "--keep-attention", "1"),),
    "mamba2_window": (("llama", "--window", "7", "--sinks", "3", "--keep-attention", "1"),),
    "mamba1": (("llama-heads-of-16", "--mixer", "mamba1", "--keep-attention", "1"),),
    "mamba1_and_mamba2": (
        ("llama-heads-of-16", "--mixer", "mamba1", "--keep-attention", "1"),
        ("--mixer", "mamba2", "--ratio", "1"),
    ),
}
CHECKPOINTS = ("mamba2", "attention", *CONVERSIONS)
ENDINGS = ("", ".st")
DISTILL = (
    "distill", "converted", "--data", "text.jsonl", "--max-steps", "24", "--align-steps", "10",
    "--save-every", "5", "--eval-data", "held-out.jsonl", "--eval-every", "8", *SHORT,
)  # fmt: skip
TUNE = (
    "sft", "mamba2", "--data", "chats.jsonl", "--kl-weight", "0.5", "--max-steps", "16",
    "--save-every", "4", "--lr", "1e-3", *SHORT,
)  # fmt: skip
PREFER = (
    "dpo", "mamba2", "--data", "pairs.jsonl", "--max-steps", "16", "--save-every", "4",
    "--lr", "1e-3", "--eval-share", "0.2", "--eval-every", "8", *SHORT,
)  # fmt: skip
PROMPT = "a stone house of light"
GENERATE = ("--prompt", PROMPT, "--no-chat", "--max-new-tokens", "24", "--dtype", "float32", *CPU)
EVAL = ("--data", "held-out.jsonl", "--max-length", "32", "--batch-size", "2", *CPU)
MEASURED_ON = ("long.jsonl", "choices.jsonl", "prompts.txt")
# everything that can be measured
PROBES = (
    "--control", "window", "--control-window", "4", "--control-sinks", "1",
    "--ablate", "recurrent", "--per-layer", "--against", "tuned", "--preferences", "pairs.jsonl",
    "--generation-agreement", "prompts.txt", "--generation-tokens", "8",
    "--recall", "64", "--recall-rows", "2", "--needle", "128", "--needle-depths", "2",
    "--long-context-data", "long.jsonl", "--position-length", "128", "--position-rows", "2",
    "--tasks", "choices.jsonl",
)  # fmt: skip
SPECULATE = ("--draft", "ngram", "-k", "2", "--max-new-tokens", "16", *CPU)
BENCH = ("--input-len", "8,16", "--output-len", "4", "--iters", "1", "--json", *CPU)


@dataclass(frozen=True)
class Stopped:
    """A run that a signal ends once `reached` holds of the lines of its ledger.

    `result` is the checkpoint that the whole run gives.
    """

    command: tuple[str, ...]
    result: str
    signum: signal.Signals
    reached: Callable[[list[dict]], bool]


def _past(phase: str, step: int) -> Callable[[list[dict]], bool]:
    return lambda lines: bool(lines) and lines[-1]["phase"] == phase and lines[-1]["step"] >= step


# SIGTERM saves first; SIGKILL leaves a ledger that is ahead of the saved state
RUNS = {
    "stopped-aligning": Stopped(DISTILL, "mamba2", signal.SIGTERM, _past("align", 3)),
    "killed-at-logits": Stopped(DISTILL, "mamba2", signal.SIGKILL, _past("logits", 7)),
    "stopped-sft": Stopped(TUNE, "tuned", signal.SIGTERM, _past("sft", 6)),
    "killed-dpo": Stopped(PREFER, "preferred", signal.SIGKILL, _past("dpo", 6)),
}


class Maker:
    """Runs commands in a folder of its own and keeps what they print."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, *command: str) -> str:
        """Stdout of one command; what it made names no path outside the folder afterwards."""
        done = subprocess.run(
            self._line(command), cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        self.cut_paths()
        return done.stdout.rstrip("\n").replace(f"{self.folder}/", "")

    def stop(self, name: str, run: Stopped) -> None:
        """Leave `name`.partial as the signal leaves it."""
        ledger = self.folder / f"{name}.partial" / "metrics.jsonl"
        process = subprocess.Popen(
            self._line((*run.command, "-o", name)),
            cwd=self.folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not run.reached(_lines(ledger)):
            time.sleep(0.0005)
        process.send_signal(run.signum)
        process.wait()
        if (self.folder / name).exists() or not run.reached(_lines(ledger)):
            raise SystemExit(f"{name} was not stopped where it should have been: try again")
        self.cut_paths()

    def cut_paths(self) -> None:
        """Make names in checkpoints and results relative, and put PLACE into unfinished runs."""
        for path in filter(Path.is_file, self.folder.rglob("*")):
            content = path.read_bytes()
            if str(self.folder).encode() not in content:
                continue
            if path.name == "run.json":
                path.write_bytes(content.replace(str(self.folder).encode(), PLACE.encode()))
            elif path.name == "training_args.bin":
                _cut_arguments(path, self.folder)
            elif path.suffix == ".st":
                _cut_header(path, f"{self.folder}/".encode())
            else:
                path.write_bytes(content.replace(f"{self.folder}/".encode(), b""))

    def _line(self, command: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "mambactl", *command]


def _lines(ledger: Path) -> list[dict]:
    whole = ledger.read_text("utf-8").rpartition("\n")[0] if ledger.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def _cut_header(path: Path, prefix: bytes) -> None:
    """Cut a prefix out of the header of a single file and keep its size."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:8] + content[8:end].replace(prefix, b"").ljust(end - 8)
                     + content[end:])  # fmt: skip


def _cut_arguments(path: Path, folder: Path) -> None:
    import torch

    arguments = torch.load(path, weights_only=False)
    for key, value in vars(arguments).items():
        if isinstance(value, str):
            setattr(arguments, key, value.replace(f"{folder}/", ""))
    torch.save(arguments, path)


def make(folder: Path) -> dict:
    """Make everything in an empty folder and return what is expected of it."""
    maker = Maker(folder)
    write_inputs(folder)
    maker.run("convert", "llama", "--keep-attention", "1", "--calibrate", "text.jsonl",
              "--max-length", "32", *CPU, "-o", "converted")  # fmt: skip
    for ending in ENDINGS:
        maker.run(*DISTILL, "-o", f"mamba2{ending}")
        maker.run("sft", "llama", *SFT, "-o", f"attention{ending}")
    for name, steps in CONVERSIONS.items():
        source = None
        for number, options in enumerate(steps):
            given = options if source is None else (source, *options)
            source = f"{name}-{number}"
            maker.run("convert", *given, *CPU, "-o", source)
        for ending in ENDINGS:
            maker.run("sft", source, *SFT, "-o", f"{name}{ending}")
    maker.run(*TUNE, "-o", "tuned")
    maker.run(*PREFER, "-o", "preferred")
    for name, run in RUNS.items():
        maker.stop(name, run)
    expected = {"checkpoints": _described(maker), "runs": _runs(), **_measured(maker)}
    _keep_logits(folder)
    _prune(folder)
    return expected


def _described(maker: Maker) -> dict[str, dict]:
    """The output of `generate` and `inspect` for every checkpoint."""
    return {
        name: {
            "generate": GENERATE,
            "text": maker.run("generate", name, *GENERATE),
            "inspect": json.loads(maker.run("inspect", name, "--json")),
        }
        for name in (f"{name}{ending}" for name in CHECKPOINTS for ending in ENDINGS)
    }


def _runs() -> dict[str, dict]:
    return {name: {"command": run.command, "result": run.result} for name, run in RUNS.items()}


def _measured(maker: Maker) -> dict[str, dict]:
    """Results kept beside checkpoints, a file of `bench`, and what is shown of them."""
    maker.run("eval", "mamba2", *EVAL, *PROBES)
    maker.run("eval", "mamba2.st", *EVAL)
    maker.run("spec-decode", "mamba2", *SPECULATE)
    bench = maker.run("bench", "mamba2", "--baseline", "teacher", *BENCH)
    (maker.folder / "bench.json").write_text(bench + "\n", "utf-8")
    table, report = ("table", "bench.json"), ("report", "mamba2", "mamba2.st", "bench.json")
    page = maker.folder / maker.run(*report, "-o", "page.html")
    # without the numbers of the sources
    rows = [row[:-1] for row in rows_of(page.read_text("utf-8"))]
    return {
        "table": {"command": table, "text": maker.run(*table)},
        "report": {"command": report, "rows": rows},
    }


def _keep_logits(folder: Path) -> None:
    from safetensors.torch import save_file

    found = {name: logits_of(folder / name) for name in CHECKPOINTS}
    save_file(found, folder / "logits.safetensors")


def _prune(folder: Path) -> None:
    """Leave what a test reads."""
    kept = {"llama", "converted", *CHECKPOINTS, *(run.result for run in RUNS.values())}
    for path in folder.iterdir():
        if path.is_dir() and path.suffix == "" and path.name not in kept:
            shutil.rmtree(path)
    for name in CHECKPOINTS[1:]:
        (folder / name / "metrics.jsonl").unlink()
        (folder / f"{name}.st.metrics.jsonl").unlink()
    # of these only the weights are compared
    for name in ("tuned", "preferred"):
        for path in (folder / name).iterdir():
            if path.name != "model.safetensors":
                path.unlink()
    # plots, and cards that a trainer writes of itself
    shown = [*folder.rglob("*.png"), *folder.glob("*.partial/trainer/README.md")]
    shown.append(folder / "page.html")
    for path in [*shown, *(folder / name for name in MEASURED_ON)]:
        path.unlink()
    for path in filter(Path.is_file, [*folder.rglob("*")]):
        content = path.read_bytes()
        # without a time, so that equal files stay equal
        packed = gzip.compress(content, mtime=0)
        if path.suffix in BINARY and len(packed) < PACKED * len(content):
            path.with_name(f"{path.name}.gz").write_bytes(packed)
            path.unlink()


def main() -> None:
    """Make the fixtures in the folder that is named."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as place:
        expected = make(Path(place).resolve())
        shutil.copytree(place, target, dirs_exist_ok=True)
    (target / "expected.json").write_text(_readable(expected), "utf-8")


def _readable(expected: dict[str, dict]) -> str:
    """JSON with a line for each thing that is expected."""
    parts = []
    for key, members in expected.items():
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in members.items())
        parts.append(f"{json.dumps(key)}: {{\n{lines}\n}}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
