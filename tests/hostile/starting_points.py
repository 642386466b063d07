"""Whole and tiny inputs that are damaged: a checkpoint of every format, and data for commands."""

import gzip
import json
import shutil
from pathlib import Path
from random import Random

from hostile.runner import CommandLine, Sandbox
from hostile.templates import CODE

from mambactl.options.reading import BEGIN, END

FIXTURES = Path(__file__).parents[1] / "compatibility" / "fixtures"
# options of rows that a cache and its readers share
CACHED = ("--device", "cpu", "--max-steps", "1", "--batch-size", "2", "--max-length", "64")
# by what they are: the name in the folder where commands run
MODELS = {
    "llama": "model",
    "sharded": "model",
    "single file": "model.st",
    "ours": "model",
    "windows": "model",
    "pickled": "model",
    "gguf": "model.gguf",
    "state-spaces": "model",
    "two mixers": "model.st",
}
EXPECTED = json.loads((FIXTURES / "expected.json").read_text("utf-8"))
# unfinished runs, and the command lines that continue them
RESUMED = {
    name: (*run["command"], "-o", name, "--resume") for name, run in EXPECTED["runs"].items()
}
# modules in the current folder that must not run
MODULES = ("yaml.py", "json.py", "torch.py", "sitecustomize.py", "usercustomize.py")
DATA = ("text.jsonl", "held-out.jsonl", "chats.jsonl", "pairs.jsonl")


def make_inputs(folder: Path, work: Path) -> None:
    """A folder of every starting point, and of data; unfinished runs were stopped in `work`."""
    _make_models(folder)
    make_records(folder / "records", work)


def _make_models(folder: Path) -> None:
    from compatibility.tiny_inputs import write_llama

    data = folder / "data"
    data.mkdir()
    for name in DATA:
        shutil.copy(FIXTURES / name, data)
    (data / "prompts.txt").write_text("the river\na stone house\n")
    makers = {
        "llama": lambda path: shutil.copytree(FIXTURES / "llama", path),
        "sharded": _sharded,
        "single file": lambda path: _unpacked("mamba2.st.gz", path),
        "ours": lambda path: shutil.copytree(FIXTURES / "converted", path),
        "windows": lambda path: shutil.copytree(FIXTURES / "mamba2_window", path),
        "pickled": _pickled,
        "gguf": _gguf,
        "state-spaces": _state_spaces,
        "two mixers": lambda path: _unpacked("mamba1_and_mamba2.st.gz", path),
    }
    for kind, name in MODELS.items():
        (folder / kind).mkdir()
        makers[kind](folder / kind / name)
        # teachers that lineages name
        shutil.copytree(FIXTURES / "llama", folder / kind / "llama")
        write_llama(folder / kind / "llama-heads-of-16", seed=16, heads=2, head_dim=16)


def _unpacked(name: str, path: Path) -> None:
    path.write_bytes(gzip.decompress((FIXTURES / name).read_bytes()))


def _sharded(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(FIXTURES / "llama", path)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2],
              "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for shard, inside in shards.items():
        save_file({name: weights[name] for name in inside}, path / shard, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(each.nbytes for each in weights.values())},
        "weight_map": {name: shard for shard, inside in shards.items() for name in inside},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled(path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(FIXTURES / "llama", path)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")


def _gguf(path: Path) -> None:
    from checkpoint.test_gguf_reader import tiny_llama, write_gguf

    write_gguf(path, tiny_llama())


def _state_spaces(path: Path) -> None:
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    vocabulary = json.loads((FIXTURES / "llama" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8,
            expand=2, state_size=8, n_groups=1, chunk_size=16, tie_word_embeddings=True,
        )
    )  # fmt: skip
    shutil.copytree(FIXTURES / "llama", path)
    (path / "model.safetensors").unlink()
    weights = dict(model.state_dict())
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    torch.save(weights, path / "pytorch_model.bin")
    settings = {"layer": "Mamba2", "headdim": 8, "d_state": 8}
    config = {"d_model": 16, "n_layer": 2, "vocab_size": vocabulary, "rms_norm": True}
    (path / "config.json").write_text(json.dumps({**config, "ssm_cfg": settings}))


def make_records(folder: Path, work: Path) -> None:
    """A student, its teacher, and every kind of file that commands read beside checkpoints."""
    from compatibility.tiny_inputs import sentence, write_rows
    from hostile.yaml_texts import TASK

    shutil.copytree(FIXTURES / "llama", folder / "llama")
    for kept, name in (("mamba2", "mamba2"), ("mamba2", "kept"), ("converted", "converted"),
                       ("converted", "model")):  # fmt: skip
        shutil.copytree(FIXTURES / kept, folder / name)
    for name in (*DATA, "bench.json"):
        shutil.copy(FIXTURES / name, folder)
    shutil.copytree(FIXTURES / "mamba2.st.results", folder / "kept.st.results")
    shutil.copy(FIXTURES / "mamba2.st.metrics.jsonl", folder / "kept.st.metrics.jsonl")
    for name in RESUMED:
        _unfinished(name, folder, work)
    rows = [json.loads(line) for line in (folder / "text.jsonl").read_text().splitlines()]
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "text.jsonl").read_bytes()))
    (folder / "text.txt").write_text("\n\n".join(row["text"] for row in rows))
    prompts = [json.dumps({"prompt": row["text"][:20]}) for row in rows[:3]]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    (folder / "prompts.txt").write_text("the river\na stone house\n")
    write_rows(
        folder / "long.jsonl", ({"text": sentence(draw, 150)} for draw in (Random(0), Random(1)))
    )
    (folder / "out.md").write_text(f"{BEGIN}\n{END}\n")
    for name in ("text", "chats", "pairs"):
        _as_parquet(folder / f"{name}.jsonl")
    _write_tasks(folder / "tasks", TASK)
    for name in MODULES:
        (folder / name).write_text(CODE)
    (folder / "recipe.yaml").write_text(RECIPE)


RECIPE = """name: small
description: a small one
seed: 0
stages:
  convert: {model: llama, keep_attention: [1]}
  sft@first: {data: [text.jsonl], max_steps: 1, max_length: 32}
  eval: {data: [held-out.jsonl], fail_under: ["agreement>=0"]}
  generate: {prompt: the river, max_new_tokens: 2}
  spec-decode: {draft: "${convert}", k: 2, check: true}
"""


def _unfinished(name: str, folder: Path, work: Path) -> None:
    path = folder / f"{name}.partial"
    shutil.copytree(FIXTURES / path.name, path)
    for packed in path.rglob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    record = path / "run.json"
    record.write_text(record.read_text("utf-8").replace("{fixtures}", str(work)), "utf-8")


def _as_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))


def _write_tasks(folder: Path, task: str) -> None:
    from compatibility.tiny_inputs import question, write_rows

    folder.mkdir()
    draw = Random(0)
    write_rows(folder / "choices.jsonl", (question(draw) for _ in range(6)))
    (folder / "own_task.yaml").write_text(task)
    # what hostile task files name
    code = f"{CODE}def run(*_, **__): return 'x'\n"
    included = folder.parent / "included"
    included.mkdir()
    for place in (folder, included):
        (place / "evil.py").write_text(code)
    (included / "evil.yaml").write_text("doc_to_text: !function evil.run\n")


def keep_answers(sandbox: Sandbox) -> None:
    """Let the command line keep what the teacher says of `text.jsonl`, as another input."""
    records = sandbox.inputs / "records"
    sandbox.empty()
    for name in ("llama", "model"):
        shutil.copytree(records / name, sandbox.work / name)
    shutil.copy(records / "text.jsonl", sandbox.work)
    words = ("teacher-cache", "llama", "--data", "text.jsonl", "-o", "cache", *CACHED)
    outcome = sandbox.run(CommandLine(words))
    if outcome.ended.code != 0:
        raise RuntimeError(outcome.err)
    shutil.move(sandbox.work / "cache", records)
