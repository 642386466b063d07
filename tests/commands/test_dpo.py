"""The `dpo` stage: preferences raise the margin, against the teacher or the model's own start."""

import json
import math
import shutil

import pytest
import torch
from conftest import WORDS

from mambactl.checkpoint.load import load_lineage, load_model
from mambactl.commands.dpo import plan, run
from mambactl.errors import ModelError, UsageError
from mambactl.options import DpoConfig


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("d") / "student"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draw = torch.Generator().manual_seed(0)

    def row():
        words = [WORDS[i] for i in torch.randint(len(WORDS), (6,), generator=draw)]
        return {
            "prompt": [{"role": "user", "content": " ".join(words)}],
            "chosen": [{"role": "assistant", "content": "the river"}],
            "rejected": [{"role": "assistant", "content": "old king night"}],
        }

    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row()) + "\n" for _ in range(20)))
    return str(path)


def cpu(data, **fields):
    settings = {
        "max_steps": 8,
        "batch_size": 2,
        "max_length": 48,
        "save_every": 4,
        "warmup": 2,
        "lr": 1e-3,
    }
    return DpoConfig(device="cpu", data=[data], **{**settings, **fields})


@pytest.mark.parametrize("reference", ["self", "teacher"])
def test_the_margin_grows(student, data, tmp_path, tiny_llama_dir, reference):
    result = run(cpu(data, reference=reference), student, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    assert result.metrics["dpo"]["last_loss"] < result.metrics["dpo"]["first_loss"]
    at_start = lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert at_start == (reference == "self")
    lineage = load_lineage(result.path)
    assert (lineage["stage"], lineage["teacher"]) == ("dpo", str(tiny_llama_dir))
    assert load_model(result.path).config.to_dict() == load_model(student).config.to_dict()


def test_settings_that_transformers_would_not_save_are_kept(student, data, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(student, given)
    text = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9}'
    (given / "generation_config.json").write_text(text)
    run(cpu(data, reference="self", max_steps=2), str(given), tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


def test_a_reference_with_code_of_its_own(student, data, tmp_path, tiny_llama_dir):
    folder = tmp_path / "odd"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "odd.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
        "class Odd(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "odd",
        "architectures": ["Odd"],
        "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    fields = {"teacher": str(folder), "max_steps": 2}
    with pytest.raises(ModelError, match="needs code from the checkpoint"):
        run(cpu(data, **fields), student, tmp_path / "out")
    trusting = cpu(data, **fields, trust_remote_code=True)
    assert plan(trusting, student)["teacher"] == str(folder)
    odd = run(trusting, student, tmp_path / "out").metrics["dpo"]
    same = run(cpu(data, max_steps=2), student, tmp_path / "same").metrics["dpo"]
    assert odd["first_loss"] == pytest.approx(same["first_loss"], abs=1e-4)


def test_wrong_data_is_a_sentence(student, tmp_path, data):
    wrong = tmp_path / "text.jsonl"
    wrong.write_text('{"text": "a"}\n')
    with pytest.raises(UsageError, match="row 1: has the columns `text`"):
        run(cpu(str(wrong)), student, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    planned = plan(cpu(data), student)
    assert planned["documents"] == 20
