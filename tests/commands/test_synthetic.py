"""`synthetic`: a shape of `bench --synthetic` as a checkpoint that every stage takes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mambactl.checkpoint.load import load_model
from mambactl.commands.synthetic import plan, run
from mambactl.errors import UsageError
from mambactl.files import EMBEDDED_FOLDER
from mambactl.options.measurement import SyntheticConfig
from mambactl.speed.shape_table import TABLE, LlamaShape
from mambactl.speed.shapes import SHAPES

# of the tokenizer of the tests, which stands for the embedded one
TOKENS = 97
# beside the tensors, a file of them has its header
HEADER = 300_000
STOPPED = """
import os, signal, sys
from mambactl.checkpoint.container import Container
from mambactl.cli.main import run
written = Container.write
def write(self, name, *parts):
    written(self, name, *parts)
    if "layers.1" in name:
        os.kill(os.getpid(), signal.SIGKILL)
Container.write = write
run(sys.argv[1:])
"""
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from mambactl.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, tiny_llama_dir: Path, monkeypatch) -> Path:
    """A cache in which the tests' tokenizer is the embedded one."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / EMBEDDED_FOLDER).symlink_to(tiny_llama_dir)
    monkeypatch.setenv("MAMBACTL_CACHE", str(folder))
    return folder


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in [path] if path.is_file() else path.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            found |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", ["tiny", "tiny-heads", "tiny-mamba"])
def test_a_shape_becomes_a_checkpoint_that_stages_take(cli, name: str, tmp_path: Path) -> None:
    planned = json.loads(cli("synthetic", name, "-o", "t.st", "--dry-run", "--json").out)
    assert not (tmp_path / "t.st").exists()
    done = cli("synthetic", name, "-o", "t.st")
    assert (done.code, done.out) == (0, f"{tmp_path / 't.st'}\n")
    size = (tmp_path / "t.st").stat().st_size
    assert planned["bytes"] < size < planned["bytes"] + HEADER
    model = load_model("t.st")
    assert model.config.vocab_size == planned["vocabulary"] == SHAPES[name]().vocab_size
    assert sum(each.numel() for each in model.parameters()) == planned["parameters"]
    assert model.config.dtype == torch.bfloat16
    # the likeliest token is always one that the tokenizer knows
    assert not model.lm_head.weight[TOKENS:].any() and model.lm_head.weight[:TOKENS].any()
    said = cli("generate", "t.st", "-p", "the old", "--max-new-tokens", "4")
    assert said.code == 0 and said.out.strip()


@pytest.mark.parametrize(
    ("name", "published"), [("smollm2-135m", 134_515_008), ("mamba-130m", 129_135_360)]
)
def test_sizes_are_those_that_were_published(name: str, published: int) -> None:
    assert plan(SyntheticConfig(), name)["parameters"] == published


def test_kernels_that_a_cpu_has_not_are_named(cli, monkeypatch) -> None:
    monkeypatch.setenv("MAMBACTL_KERNELS", "mamba-ssm")
    done = cli("synthetic", "tiny", "--device", "cpu", "-o", "t.st", "--dry-run", "-q")
    assert "warning: MAMBACTL_KERNELS=mamba-ssm changes nothing on a CPU" in done.err


def test_a_tied_head_is_stored_once(monkeypatch, tmp_path: Path) -> None:
    shape = LlamaShape(64, 2, (4, 2), 128, 512, tied=True)
    monkeypatch.setitem(TABLE, "tied", shape)
    made = run(SyntheticConfig(), "tied", tmp_path / "t.st").metrics
    model = load_model(str(tmp_path / "t.st"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(each.numel() for each in model.parameters()) == made["parameters"]


def test_a_chain_starts_from_it(cli, tmp_path: Path) -> None:
    assert cli("synthetic", "tiny", "-o", "t").code == 0
    assert cli("convert", "t", "--ratio", "0.5", "-o", "c.st").code == 0
    with safe_open(tmp_path / "c.st", "pt") as content:
        made = json.loads(content.metadata()["mambactl.json"])
    # what later stages compare with is the checkpoint, which has no source of its own
    assert made["source"] == str(tmp_path / "t")
    assert [each["stage"] for each in made["ancestors"]] == ["synthetic"]
    assert "random weights -> synthetic" in cli("inspect", "t").out
    assert "random weights" in (tmp_path / "t" / "README.md").read_text()


def test_values_follow_from_the_seed_alone(tmp_path: Path, monkeypatch) -> None:
    run(SyntheticConfig(), "tiny", tmp_path / "one.st")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    run(SyntheticConfig(max_shard_gb=1e-4), "tiny", tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    run(SyntheticConfig(seed=1, dtype="float32"), "tiny", tmp_path / "other.st")
    one, many, other = (tensors(tmp_path / name) for name in ("one.st", "many", "other.st"))
    assert one.keys() == many.keys() == other.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    drawn = [name for name in one if "norm" not in name]
    assert not any(torch.equal(one[name].float(), other[name]) for name in drawn)
    assert {each.dtype for each in other.values()} == {torch.float32}


def test_the_vocabulary_holds_every_token(cli, monkeypatch, tmp_path: Path) -> None:
    from mambactl.commands import synthetic

    known = synthetic.read_config
    monkeypatch.setattr(
        synthetic, "read_config", lambda folder: known(folder) | {"vocab_size": 600}
    )
    done = cli("synthetic", "tiny", "-o", "t", "--json")
    assert json.loads(done.out)["metrics"]["vocabulary"] == 600
    assert "tiny has 512 tokens and its tokenizer 600" in done.err


def test_it_is_done_once_and_its_own_name_is_no_input(cli, python, tmp_path: Path) -> None:
    # the name of the shape is a name beside it, which is replaced
    assert cli("synthetic", "tiny", "-o", "tiny").code == 0
    again = cli("synthetic", "tiny", "-o", "tiny", "--resume")
    assert again.code == 0 and "nothing to do" in again.err
    for words, changed in ((("tiny-mamba",), "shape"), (("tiny", "--seed", "2"), "seed 0 -> 2")):
        other = cli("synthetic", *words, "-o", "tiny", "--resume")
        assert other.code == 5 and changed in other.err
    assert cli("synthetic", "tiny", "-o", "tiny", "--force", "--seed", "2").code == 0
    unknown = cli("synthetic", "llama9-8b", "-o", "other")
    assert (unknown.code, unknown.out) == (2, "")
    assert "no synthetic model llama9-8b" in unknown.err and "llama3-8b" in unknown.err
    bench = ("bench", "--synthetic", "tiny", "--draft", "llama9-8b")
    for words in (("synthetic", "llama9-8b", "-o", "other"), bench):
        early = python("-c", WITHOUT_TORCH, *words)
        assert early.code == 2 and "no synthetic model llama9-8b" in early.err
    with pytest.raises(UsageError, match="no synthetic model"):
        run(SyntheticConfig(), "llama9-8b", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_kill_leaves_no_output(python, cli, cache: Path, tmp_path: Path) -> None:
    words = ("synthetic", "tiny", "-o", "t.st")
    assert python("-c", STOPPED, *words).code == -9
    assert [path.name for path in tmp_path.iterdir()] == ["t.st.partial"]
    assert cli(*words).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["t.st"]
