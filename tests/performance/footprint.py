"""Package files whose functions run in a command and in single steps: what a reader has to know.

    python -m tests.performance.footprint -o recipes/results/structure/before.json

A file counts when at least one function body in it runs (see `Recorder`), not when it is merely
imported. Measured is, each in a process of its own on the CPU:

- `convert`: the whole command `convert smollm2-135m --ratio 0.5 -o t.st`, the weights being
  fetched already;
- `align`, `logits`: one optimiser step of `distill` with that one phase, from the end of the
  optimiser's first step to the end of its second: accounting for the step before, batch, teacher,
  student, loss, gradients, optimiser. The student is a random Llama of four layers of which two
  were replaced;
- `speculative`: one greedy decode step of the GPU engine whose kernels Triton's interpreter runs,
  from the first tokens handed on to the second: a draft proposes two tokens, the target verifies
  them. Target and draft are that Llama with two and with all four layers replaced.

`whole` has what ran in the whole command (of `speculative`: with loading, packing and reading the
prompt). Only `speculate` names modules of the package.
"""

import argparse
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tests.performance.recorder import Recorder

NAME = "mambactl"
DRAFTS = 2
# the same on every machine: no GPU, no hub, kernels interpreted
PLACE = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
}
CONVERT = ["convert", "smollm2-135m", "--ratio", "0.5", "-o"]
DISTILL = ["--data", "text.jsonl", "--max-steps", "3", "--batch-size", "2", "--max-length", "32"]


def prepare(folder: Path) -> None:
    """Fetch the weights and write what the steps start from."""
    from tests.conftest import make_tokenizer, write_llama, write_sentences

    write_llama(folder / "llama", make_tokenizer())
    write_sentences(folder / "text.jsonl", 0, 60)
    for arguments in (
        [*CONVERT, "t.st", "--dry-run"],
        ["convert", "llama", "--ratio", "0.5", "-o", "half.st"],
        ["convert", "llama", "--ratio", "1.0", "-o", "all.st"],
    ):
        _run(folder, "-m", NAME, *arguments)


def convert(recorder: Recorder) -> None:
    """The whole command."""
    command([*CONVERT, "t.st"], recorder)


def align(recorder: Recorder) -> None:
    """A step that aligns mixers."""
    distill("align", recorder)


def logits(recorder: Recorder) -> None:
    """A step that matches logits."""
    distill("logits", recorder)


def distill(phase: str, recorder: Recorder) -> None:
    """Steps of one phase, the second of them bracketed."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = 0

    def stepped(*_: object) -> None:
        nonlocal steps
        steps += 1
        recorder.in_step = steps == 1

    register_optimizer_step_post_hook(stepped)
    command(["distill", "half.st", "--stages", phase, *DISTILL, "-o", f"{phase}.st"], recorder)
    assert steps == 3, f"{steps} optimiser steps"


def speculate(recorder: Recorder) -> None:
    """Steps of the GPU engine, the second of them bracketed."""
    with recorder:
        from mambactl.checkpoint.load import load_model
        from mambactl.decode.gpu.fused_engine import FusedEngine
        from mambactl.decode.sampler import SamplingParams
        from mambactl.kernels.decode.triton.ops import TritonOps

        calls = 0

        def handed_on(row: int, tokens: list[int]) -> bool:
            nonlocal calls
            calls += 1
            recorder.in_step = calls == 1
            return calls == 2

        target, draft = (load_model(name) for name in ("half.st", "all.st"))
        engine = FusedEngine(target, draft, DRAFTS, TritonOps.for_model(target))
        params = SamplingParams(max_new_tokens=3 * (DRAFTS + 1))
        engine.generate([[5, 9, 11, 5, 9]], params, handed_on)
    assert calls == 2, f"{calls} decode steps"


def command(arguments: list[str], recorder: Recorder) -> None:
    """Run the package's command line in this process, as `python -m` does."""
    sys.argv = [NAME, *arguments]
    with recorder, redirect_stdout(sys.stderr):
        try:
            runpy.run_module(NAME, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise


THINGS: dict[str, Callable[[Recorder], None]] = {
    "convert": convert,
    "align": align,
    "logits": logits,
    "speculative": speculate,
}


def package() -> Path:
    """The folder of the package that is measured."""
    spec = find_spec(NAME)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def measure(thing: str) -> dict[str, list[str]]:
    """Files of one thing, counted in this process."""
    recorder = Recorder(package())
    THINGS[thing](recorder)
    whole = recorder.files(recorder.whole)
    return {"files": recorder.files(recorder.step) or whole, "whole": whole}


def measure_all(folder: Path) -> dict[str, object]:
    """Every thing in a fresh process, and all of them together."""
    prepare(folder)
    found = {}
    for thing in THINGS:
        _run(folder, "-m", __spec__.name, "--only", thing, "-o", f"{thing}.json")
        found[thing] = json.loads((folder / f"{thing}.json").read_text("utf-8"))
    files = {thing: lists["files"] for thing, lists in found.items()}
    files["all"] = sorted(set().union(*files.values()))
    steps = {thing: lists["whole"] for thing, lists in found.items() if thing != "convert"}
    return {
        "counted": "files of the package of which at least one function runs",
        "command": f"python -m {__spec__.name}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "triton")},
        },
        "package_files": len(list(package().rglob("*.py"))),
        "counts": {thing: len(names) for thing, names in files.items()},
        "files": files,
        "whole_counts": {thing: len(names) for thing, names in steps.items()},
        "whole": steps,
    }


def _run(folder: Path, *arguments: str) -> None:
    """Python in that folder, with this package and these tests; its output goes to stderr."""
    paths = [str(package().parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    environment = os.environ | PLACE | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, check=True, stdout=sys.stderr
    )


def main() -> None:
    """Count, and write JSON to a file or stdout."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, help="default: stdout")
    parser.add_argument("--only", choices=THINGS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        found: dict[str, object] = {**measure(given.only)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure_all(Path(folder))
    text = json.dumps(found, indent=1) + "\n"
    if given.out is None:
        sys.stdout.write(text)
    else:
        given.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
