"""Measure every family that can be converted and print the table of recipes/results/families.md.

    PYTHONPATH=.:tests python tests/commands/family_table.py

Random weights on odd shapes; errors are relative to the largest value that the library's own class
gives. On a machine with a GPU its kernels decode there, elsewhere in Triton's interpreter.
"""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from commands.test_teacher_families import FAMILIES, LENGTH, VARIANTS, build, logits
from conftest import WORDS, write_sentences
from decode.engines import GREEDY, plain, prompts_of

from mambactl import console
from mambactl.checkpoint.load import load_model
from mambactl.commands import convert, export
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.kernels.decode.cpu.cpu_ops import CpuOps
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.kernels.decode.triton.ops import TritonOps
from mambactl.options import ConvertConfig, ExportConfig

COLUMNS = ("family", "logits", "gradients", "by layer", "by head", "fit", "CPU decode",
           "GPU decode", "export")  # fmt: skip


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of the loss of one training step."""
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    model.train().requires_grad_(True)
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def worst_attention(family: str, folder: Path) -> tuple[float, float]:
    """The largest distance of logits and of gradients on every shape of the tests."""
    errors, steps = [], []
    for number, (name, fields) in enumerate(VARIANTS.items()):
        if name == "windows" and family not in ("Qwen2", "Qwen3"):
            continue
        theirs = build(family, folder / str(number), **fields)
        ours = load_model(str(folder / str(number)))
        errors.append(distance(logits(ours), logits(theirs)))
        wanted, found = gradients(theirs), gradients(ours)
        steps.append(max(distance(found[name], wanted[name]) for name in wanted))
    return max(errors), max(steps)


def equal_tokens(path: str, ops: DecodeOps, device: str, count: int) -> str:
    """Count the tokens of a decode with drafts that equal those of whole passes of the model."""
    model, prompts = load_model(path, device), prompts_of([9, 2])
    few = replace(GREEDY, max_new_tokens=count)
    wanted = plain(model).generate(prompts, few).tokens
    found = FusedEngine(model, "ngram", 2, ops).generate(prompts, few).tokens
    pairs = [pair for rows in zip(found, wanted, strict=True) for pair in zip(*rows, strict=True)]
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)}"


def row(family: str, folder: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> list[str]:
    attention, step = worst_attention(family, folder / "shapes")
    teacher = folder / "teacher"
    theirs = logits(build(family, teacher, head_dim=16))
    tokenizer.save_pretrained(teacher)
    # under a window over the whole text both are the teacher
    whole = {
        "layer": ConvertConfig(by="layer", window=LENGTH, ratio=1),
        "head": ConvertConfig(by="head", window=LENGTH, keep_heads="0.1,1.0,3.1"),
    }
    errors = {}
    for name, options in whole.items():
        made = convert.run(options, str(teacher), folder / f"{name}.st")
        errors[name] = distance(logits(load_model(made.path)), theirs)
    text = write_sentences(folder / "fit.jsonl", 0, 80)
    data = {"calibrate": [text], "max_length": LENGTH}
    fit = ConvertConfig(by="head", ratio=0.6, window=5, sinks=2, **data)
    fitted = convert.run(fit, str(teacher), folder / "fitted.st")
    out = export.run(ExportConfig(), str(teacher), folder / "out")
    exported = getattr(transformers, f"{family}ForCausalLM").from_pretrained(out.path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = [attention, step, *errors.values()]
    return [
        family,
        *(f"{number:.0e}" for number in numbers),
        f"{fitted.metrics['calibration_error']:.2f}",
        equal_tokens(fitted.path, CpuOps(bfloat16=False), "cpu", 14),
        equal_tokens(fitted.path, TritonOps(), device, 14 if device == "cuda" else 3),
        f"{distance(logits(exported), theirs):.0e}",
    ]


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def main() -> None:
    console.set_verbosity(0)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for family in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(family, Path(folder), word_tokenizer()))
    for line in lines:
        sys.stdout.write(f"| {' | '.join(line)} |\n")


if __name__ == "__main__":
    main()
