"""TRL and peft take a checkpoint by its path, in a process that has imported mambactl."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mambactl  # noqa: F401
from mambactl.checkpoint.load import load_lineage, load_model
from mambactl.models.hybrid import HybridForCausalLM

TEXTS = [{"text": "the old house of light"}, {"text": "a stone door in the night"}] * 2
PAIRS = [{"prompt": "the old", "chosen": " house", "rejected": " river"}] * 4
TRAINING = {
    "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "report_to": "none",
    "use_cpu": True, "bf16": False, "save_strategy": "no", "max_length": 16, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def student(save_student, tmp_path_factory) -> Path:
    """A checkpoint folder as `convert` makes one."""
    return save_student(tmp_path_factory.mktemp("consumers") / "student")


@pytest.fixture(scope="module")
def older(student, tmp_path_factory) -> Path:
    """The same as a version wrote it that put no code beside the weights."""
    folder = tmp_path_factory.mktemp("consumers") / "older"
    folder.mkdir()
    for path in student.iterdir():
        if path.suffix not in (".py", ".json") or path.name == "tokenizer.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((student / "config.json").read_text())
    del config["auto_map"], config["architectures"]
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": None}))
    return folder


def test_sft_trains_what_a_path_names(student, tmp_path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(output_dir=str(tmp_path / "run"), **TRAINING)
    trainer = SFTTrainer(str(student), args=arguments, train_dataset=Dataset.from_list(TEXTS))
    assert type(trainer.model) is HybridForCausalLM
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = load_model(str(tmp_path / "tuned")).state_dict()
    assert any(not torch.equal(tuned[name], before[name]) for name in before if "mamba" in name)
    assert load_lineage(str(tmp_path / "tuned"))["ancestors"][-1]["stage"] == "convert"


@pytest.mark.parametrize("which", ["student", "older"])
def test_dpo_opens_its_reference_by_path(which, request, student, tmp_path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    folder = request.getfixturevalue(which)
    if which == "older":
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (student / name).exists() and not (folder / name).exists():
                (folder / name).symlink_to(student / name)
    arguments = DPOConfig(output_dir=str(tmp_path / "run"), **TRAINING)
    trainer = DPOTrainer(str(folder), args=arguments, train_dataset=Dataset.from_list(PAIRS))
    assert type(trainer.model) is HybridForCausalLM
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_peft_knows_what_to_adapt(student, draw_words) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(student)
    expected = model(draw_words, use_cache=False).logits
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    learned = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert learned == {"q_proj", "v_proj", "in_proj"}
    found = adapted(input_ids=draw_words, use_cache=False).logits
    assert not torch.allclose(found, expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(draw_words, use_cache=False).logits, found)


def test_a_prefix_that_would_be_ignored_is_refused(student, draw_words) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(student)
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="the cache is a DynamicCache"):
        adapted(input_ids=draw_words)


@pytest.fixture
def draw_words() -> torch.Tensor:
    return torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))
