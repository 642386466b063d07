"""`export` on the command line: one line on stdout, exit codes, and outputs that are there."""

import json
from pathlib import Path

import pytest
import torch

from mambactl.export import native_mamba


@pytest.fixture(scope="module")
def native(tmp_path_factory, make_hybrid) -> str:
    """A native Mamba-2 without a tokenizer."""
    from mambactl.checkpoint.provenance import lineage
    from mambactl.checkpoint.save import save_model

    sizes = {"n_heads": 6, "head_dim": 16, "d_state": 8, "x_heads": 6}
    sizes |= {"b_groups": 1, "c_groups": 1, "norm_groups": 1}
    model = make_hybrid(["mamba2"] * 2, mamba2=sizes, has_mlp=False)
    out = tmp_path_factory.mktemp("native") / "native.st"
    return str(save_model(model, out, {}, lineage("convert", None, None, None, {}, 0, {})))


def test_the_path_comes_from_stdin_and_goes_to_stdout(native: str, cli, tmp_path: Path) -> None:
    done = cli("export", "-", "--to", "gguf", "-o", "t.gguf", stdin=f"{native}\n")
    assert (done.code, done.out) == (0, f"{tmp_path / 't.gguf'}\n"), done.err
    assert "the same model: on 256 tokens of 4 prompts logits differ by" in done.err
    assert "has no tokenizer" in done.err
    lineage = json.loads((tmp_path / "t.gguf.mambactl.json").read_text())
    assert [link["stage"] for link in lineage["ancestors"]] == ["convert"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.gguf", "t.gguf.mambactl.json"]
    assert cli("export", native, "--to", "gguf", "-o", "t.gguf").code == 5
    again = cli("export", native, "--to", "gguf", "-o", "t.gguf", "--resume")
    assert (again.code, again.out) == (0, done.out)
    other = cli("export", native, "--to", "gguf", "--dtype", "float16", "-o", "t.gguf", "--resume")
    assert other.code == 5 and "dtype" in other.err
    forced = cli("export", native, "--to", "gguf", "--dtype", "float16", "-o", "t.gguf", "--force")
    assert forced.code == 0
    # and it is a model as any other
    assert "mamba2 layers" in cli("inspect", "t.gguf").out


def test_the_default_is_a_folder_for_transformers(native: str, cli, tmp_path: Path) -> None:
    done = cli("export", native, "--json")
    found = json.loads(done.out)
    assert found["checkpoint"] == str(tmp_path / "runs" / "native-export")
    metrics = found["metrics"]
    assert metrics["architecture"] == "Mamba2ForCausalLM"
    assert metrics["difference"]["logits"] < 1e-4 * metrics["difference"]["scale"]
    assert metrics["difference"]["texts"] == 0
    # of what is there, only what mambactl wrote is replaced
    (tmp_path / "runs/native-export/notes.txt").write_text("mine")
    refused = cli("export", native, "--force")
    assert refused.code == 5 and "notes.txt" in refused.err


def test_a_dry_run_says_what_would_be_written(native: str, cli, tmp_path: Path) -> None:
    done = cli("export", native, "--to", "mamba-ssm", "--dry-run", "--json")
    found = json.loads(done.out)
    assert (found["architecture"], found["dtype"]) == ("MambaLMHeadModel", "float32")
    assert found["tensors"] == 2 * 9 + 3
    assert list(tmp_path.iterdir()) == []


def test_a_form_that_computes_something_else_is_a_failed_check(
    native: str, cli, tmp_path: Path, monkeypatch
) -> None:
    fields = native_mamba._FIELDS["Mamba2"]
    wrong = {"Mamba2": lambda sizes: fields(sizes) | {"time_step_limit": [0.0, 0.05]}}
    monkeypatch.setattr(native_mamba, "_FIELDS", native_mamba._FIELDS | wrong)
    done = cli("export", native, "-o", "out")
    assert done.code == 7 and "has logits that differ by" in done.err
    assert list(tmp_path.iterdir()) == []
    assert cli("export", native, "-o", "out", "--no-check").code == 0


def test_what_a_form_cannot_hold_is_a_wrong_model(native: str, cli, tmp_path: Path) -> None:
    done = cli("export", native, "--to", "mambainllama")
    assert done.code == 3 and "has layers without MLP, which MambaInLlama cannot hold" in done.err
    done = cli("export", native, "--dtype", "q8_0")
    assert done.code == 2 and "q8_0 is a type of GGUF alone" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_weight_too_large_for_its_type_is_named(native: str, cli, tmp_path: Path) -> None:
    from mambactl.checkpoint.load import load_model
    from mambactl.checkpoint.save import save_model

    model = load_model(native)
    with torch.no_grad():
        model.model.layers[0].mixer.out_proj.weight[0, 0] = 1e6
    save_model(model, tmp_path / "large", {}, None)
    done = cli("export", "large", "--to", "gguf", "--dtype", "float16", "-o", "x.gguf")
    assert done.code == 3 and "holds numbers too large for float16" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
