"""A real llama.cpp reads the GGUFs and computes what mambactl computes.

Runs where MAMBACTL_LLAMA_CPP names a folder `node_modules` with node-llama-cpp and its prebuilt
binaries: `npm install --ignore-scripts node-llama-cpp@3.22 @node-llama-cpp/linux-x64@3.22`.
MAMBACTL_STUDENT may name a checkpoint to measure in place of a converted SmolLM2.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import mambactl
from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.commands import export
from mambactl.decode.prompts import BUILTIN
from mambactl.options import ExportConfig

LIBRARY = Path(os.environ.get("MAMBACTL_LLAMA_CPP", "")) / "node-llama-cpp/dist/index.js"
pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(not LIBRARY.is_file(), reason="MAMBACTL_LLAMA_CPP names no node_modules"),
]
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
DATA = [
    Path(__file__).parents[2] / "recipes/data" / name
    for name in ("quickstart-heldout.jsonl", "quickstart.jsonl")
]
PROMPTS, NEW, TOKENS, ROW = 8, 64, 4096, 512
# nats per token that a rounding may cost
LIMITS = {"bfloat16": 1e-3, "float16": 1e-3, "q8_0": 2e-2}


def llama_cpp(model: Path, rows: list[list[int]], new: int) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens after every row, and logits [tokens of all rows, V]."""
    given, logits = model.with_suffix(".json"), model.with_suffix(".bin")
    given.write_text(json.dumps(rows))
    command = ["node", SCRIPT, LIBRARY, model, given, str(new), logits]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.fromfile(logits, dtype=np.float32)
    logits.unlink()
    return json.loads(done.stdout), torch.from_numpy(found).view(sum(map(len, rows)), -1)


@pytest.mark.parametrize("name", ["hybrid", "native2", "native1", "llama"])
@torch.no_grad()
def test_every_architecture_computes_the_same(name: str, exported, source) -> None:
    draw = torch.Generator().manual_seed(7)
    rows = torch.randint(3, 260, (2, 70), generator=draw)
    tokens, logits = llama_cpp(exported(name, to="gguf"), rows.tolist(), 8)
    model = load_model(source(name))
    expected = model(rows).logits
    assert (logits.view_as(expected) - expected).abs().max() < 1e-3 * expected.abs().max()
    greedy = model.generate(
        rows, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert tokens == greedy[:, rows.shape[1] :].tolist()


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    """Half of SmolLM2's layers as Mamba-2 without biases."""
    if given := os.environ.get("MAMBACTL_STUDENT"):
        return given
    out = tmp_path_factory.mktemp("student") / "t.st"
    return mambactl.convert("smollm2-135m", out, init="reference").path


@pytest.mark.weights
@torch.no_grad()
def test_the_same_text_in_float32(student: str, tmp_path: Path) -> None:
    out = tmp_path / "t.gguf"
    export.run(ExportConfig(to="gguf", dtype="float32", check=False), student, out)
    tokenizer = load_tokenizer(student)
    texts = [prompt.messages[0]["content"] for prompt in BUILTIN[:PROMPTS]]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    tokens, _ = llama_cpp(out, rows, NEW)
    model = load_model(student, dtype=torch.float32)
    for row, found in zip(rows, tokens, strict=True):
        ids = torch.tensor([row])
        whole = model.generate(
            ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected = whole[0, len(row) :].tolist()
        if found != expected:
            # the first difference is a tie, or they are different models
            pairs = zip(found, expected, strict=True)
            first = next(index for index, (one, other) in enumerate(pairs) if one != other)
            logits = model(whole[:, : len(row) + first]).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            assert best - second < 1e-3


@pytest.mark.weights
@pytest.mark.parametrize("dtype", LIMITS)
@torch.no_grad()
def test_what_rounding_costs(dtype: str, student: str, tmp_path: Path, record_property) -> None:
    out = tmp_path / "t.gguf"
    export.run(ExportConfig(to="gguf", dtype=dtype, check=False), student, out)
    tokenizer = load_tokenizer(student)
    rows = [json.loads(line) for file in DATA for line in file.read_text("utf-8").splitlines()]
    texts = [turn["content"] for row in rows for turn in row.get("messages", [])]
    ids = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"][:TOKENS]).view(-1, ROW)
    _, logits = llama_cpp(out, ids.tolist(), 0)
    model, kl = load_model(student, dtype=torch.float32), 0.0
    for row, theirs in zip(ids, logits.split(ROW), strict=True):
        ours = model(row[None]).logits[0].log_softmax(-1)
        kl += float((ours.exp() * (ours - theirs.log_softmax(-1))).sum())
    record_property("kl", kl / TOKENS)
    assert kl / TOKENS < LIMITS[dtype]
