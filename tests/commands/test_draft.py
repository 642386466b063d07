"""`draft`: heads and small models made of a target, which is refused once it changes."""

import json

import pytest
import torch
from train.abrupt_stop import abrupt_stop

from mambactl.checkpoint.load import load_lineage, load_model
from mambactl.commands.draft import plan, run
from mambactl.decode.head_files import load_head, weights_digest
from mambactl.errors import ModelError, UsageError
from mambactl.options import DraftConfig


@pytest.fixture(scope="module")
def target(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("draft") / "target"))


def settings(data, **fields):
    given = {
        "device": "cpu", "data": [str(data)], "max_steps": 4, "batch_size": 2, "max_length": 48,
        "answer_tokens": 12, "warmup": 1, "save_every": 2, "vocabulary": 50, "unroll": 3,
    }  # fmt: skip
    return DraftConfig(**{**given, **fields})


def test_a_head_learns_from_what_its_target_writes(target, random_texts, tmp_path) -> None:
    out = tmp_path / "d.st"
    found = run(settings(random_texts, max_steps=6), target, out).metrics
    assert found["head"]["steps"] == 6 and found["head"]["written_tokens"] > 0
    model = load_model(target)
    assert found["vocabulary"] == 50 and found["target_sha256"] == weights_digest(model)
    head = load_head(str(out), model, target)
    assert len(head.ids) == 50 and head.ids.tolist() == sorted(set(head.ids.tolist()))
    rows = model.lm_head.weight[head.ids]
    assert torch.equal(head.body.lm_head.weight, rows)
    assert load_lineage(str(out))["stage"] == "draft"
