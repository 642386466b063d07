"""Memory and time of steps on text that the student writes, beside steps on text that is given.

    python -m tests.performance.student_text --model llama3-8b-hybrid-50 --teacher llama3-8b \\
        --rows 4 --length 1024 --tokens 256

Both kinds of step train a random student of a shape in `speed.shapes` towards a random teacher,
through the loop of `distill`: mixers alone, or with `--rest` everything. No answer ends early. The
step that writes may need what the other does, a copy of the student in the type of the run, keys,
values and states of the answers: `allowed_bytes`. One line of JSON; the first step, which compiles
and captures, is in no time.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.data.encoding import Example
from mambactl.data.pack import pack
from mambactl.models.cache_bytes import session_bytes
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.session_size import SessionSize
from mambactl.options import DistillConfig
from mambactl.speed.shapes import SHAPES, build
from mambactl.train.compiled import compile_blocks, compiles
from mambactl.train.drawn_prompts import DrawnPrompts, answers_at_most
from mambactl.train.loop import Phase, train
from mambactl.train.optimization import LogitsObjective
from mambactl.train.phases import plan_phases
from mambactl.train.sharing import share_frozen
from mambactl.train.student_rows import StudentRows

STAGES = ("logits", "onpolicy")


def pair(options: argparse.Namespace, dtype: torch.dtype) -> tuple[HybridForCausalLM, ...]:
    """A student, and a teacher of which it has every tensor but the mixers."""
    teacher = build(options.teacher, options.device, dtype)
    student = build(options.model, options.device, dtype, seed=1)
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if name in theirs and theirs[name].shape == parameter.shape:
            parameter.data = theirs[name].data
    return student, teacher


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Peaks and seconds of both kinds of step."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    config = DistillConfig(
        stages=list(STAGES), max_steps=2 * options.steps, onpolicy_steps=options.steps, warmup=0,
        batch_size=options.rows, max_length=options.length, onpolicy_tokens=options.tokens,
        capture=options.capture, rest_lr=1e-4 if options.rest else 0.0, save_every=10**6,
        device=options.device, dtype=options.dtype,
    )  # fmt: skip
    planned = plan_phases(config, SHAPES[options.model](), SHAPES[options.teacher]())
    student, teacher = pair(options, dtype)
    parts = {plan.name: plan.parameters(student) for plan in planned}
    trained = {name for members, _ in parts["onpolicy"] for name in members}
    share_frozen(student, teacher, trained, dtype)
    if compiling := compiles(config.compile, device):
        compile_blocks(student)
        compile_blocks(teacher)
    draw, vocabulary = np.random.default_rng(0), student.config.vocab_size
    texts = [draw.integers(vocabulary, size=options.length).astype(np.int32) for _ in range(16)]
    rows = pack([Example(text, np.ones(len(text), bool)) for text in texts], options.length)
    drawn = [text[: options.prompt].tolist() for text in texts]
    prompts = DrawnPrompts(drawn, np.full(len(drawn), 1 / len(drawn)), ends=())
    trim = not (compiling or options.capture)
    amp = None if dtype == torch.float32 else dtype
    phases = []
    for plan in planned:
        own = plan.name == "onpolicy"
        divergence = config.onpolicy_divergence if own else config.divergence
        phases.append(
            Phase(
                plan.name,
                plan.steps,
                LogitsObjective(student, teacher, amp=amp, divergence=divergence),
                parts[plan.name],
                feed=StudentRows(config, dtype, student, trained, prompts, rows, trim)
                if own
                else None,
            )
        )
    with tempfile.TemporaryDirectory() as where:
        folder = RunFolder(Path(where) / "out", {})
        with folder.open(False, False):
            train(student, phases, rows, config, folder, trim=trim)
            lines = folder.read_log()
    found: dict[str, object] = {"compiled": compiling, **vars(options)}
    for name in STAGES:
        own = [line for line in lines if line["phase"] == name]
        seconds = np.diff([line["seconds"] for line in own])
        found[f"{name}_peak_bytes"] = own[-1].get("peak_bytes")
        found[f"{name}_seconds"] = round(float(np.median(seconds)), 4)
    answers = answers_at_most(config, options.prompt)
    size = SessionSize.holding(answers, options.prompt + options.tokens, 0)
    copy = dtype.itemsize * sum(parameter.numel() for parameter in student.parameters())
    cache = session_bytes(student.config, dtype.itemsize, size).total
    found |= {
        "answers": answers,
        "writing_seconds": round(float(np.median([x["writing_seconds"] for x in own[1:]])), 4),
        "copy_bytes": copy,
        "cache_bytes": cache,
    }
    if (peak := found["logits_peak_bytes"]) is not None:
        found["allowed_bytes"] = peak + copy + cache
    return found


def options_of(arguments: list[str]) -> argparse.Namespace:
    """Options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama3-8b-hybrid-50")
    parser.add_argument("--teacher", default="llama3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    for name, count in (("rows", 4), ("length", 1024), ("prompt", 64), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rest", action="store_true", help="train everything")
    parser.add_argument("--capture", action="store_true", help="replay steps as CUDA graphs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(options_of(sys.argv[1:]))) + "\n")
