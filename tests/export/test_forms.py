"""Exported folders compute the same in a process that cannot import mambactl."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambactl.checkpoint.load import load_model, load_tokenizer

FORMS = {
    "hybrid": "GraniteMoeHybridForCausalLM",
    "biased": "GraniteMoeHybridForCausalLM",
    "native2": "Mamba2ForCausalLM",
    "native1": "MambaForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "factors": "GraniteMoeHybridForCausalLM",
    "still": "GraniteMoeHybridForCausalLM",
}
# blocks mambactl as if it were not installed
CHILD = """
import sys
sys.modules["mambactl"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, new = torch.load(sys.argv[1]), int(sys.argv[2])
found = {}
for folder in sys.argv[5:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits
    text = model.generate(
        ids[:1], max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    keys = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    words = AutoTokenizer.from_pretrained(folder)(sys.argv[4])["input_ids"]
    found[folder] = (type(model).__name__, logits, text, sorted(map(str, keys)), words)
torch.save(found, sys.argv[3])
"""
NEW, TEXT = 12, "the 12 trees<|im_end|>"


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(3, 260, (2, 40), generator=draw)


@pytest.fixture(scope="module")
def answers(tmp_path_factory, exported, ids) -> dict[str, tuple]:
    """Class, logits, greedy text and keys that did not fit, of every form."""
    folder = tmp_path_factory.mktemp("answers")
    torch.save(ids, folder / "ids.pt")
    folders = {name: str(exported(name)) for name in FORMS}
    command = [sys.executable, "-c", CHILD, str(folder / "ids.pt"), str(NEW)]
    command += [str(folder / "found.pt"), TEXT, *folders.values()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "found.pt")
    return {name: found[path] for name, path in folders.items()}


GROUPED = pytest.mark.since_transformers("5.23", "norms all groups together")
SEVERAL_GROUPS = ("hybrid", "biased", "native2", "factors", "still")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=GROUPED if name in SEVERAL_GROUPS else ()) for name in FORMS],
)
@torch.no_grad()
def test_transformers_alone_computes_the_same(name: str, answers, source, ids) -> None:
    kind, logits, text, keys, words = answers[name]
    assert (kind, keys) == (FORMS[name], [])
    assert words == load_tokenizer(source(name))(TEXT)["input_ids"]
    model = load_model(source(name), dtype=torch.float32)
    expected = model(ids).logits
    # far from all zeros, and from what rounding makes of one
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)
    greedy = model.generate(
        ids[:1], max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(text, greedy)


def test_a_folder_is_that_of_any_model(exported) -> None:
    folder = exported("hybrid")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    config = json.loads((folder / "config.json").read_text())
    assert not any("mambactl" in str(value) for value in config.values())
    card = (folder / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "transformers 5.23 or newer" in card
    # any version finds this class
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "or newer" not in (exported("llama") / "README.md").read_text()
    assert json.loads((folder / "mambactl.json").read_text())["stage"] == "export"


def test_weights_keep_their_types(exported, source, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(exported("hybrid", dtype="bfloat16") / "model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    kept = {name for name, kind in kinds.items() if kind == "F32"}
    assert set(kinds.values()) == {"F32", "BF16"}
    assert {name.rpartition(".")[2] for name in kept} == {"A_log", "D", "dt_bias"}
