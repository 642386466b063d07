"""Lineage chains, digests and the card."""

import json
import os
from pathlib import Path

import pytest
import torch

from mambactl.checkpoint.card import model_card
from mambactl.checkpoint.provenance import header_digest, lineage
from mambactl.checkpoint.save import save_model


def chain(path: Path) -> list[dict]:
    first = lineage("convert", None, "owner/llama", None, {"ratio": 0.5}, 0, {"kl": 1.5})
    second = lineage("distill", first, path, "owner/llama", {"lr": 1e-3}, 1, {"kl": 0.25})
    third = lineage("sft", second, path, None, {}, 2, {})
    return [first, second, third]


def test_chain_keeps_source_teacher_and_every_stage(tiny_llama_dir: Path) -> None:
    first, second, third = chain(tiny_llama_dir)
    assert json.loads(json.dumps(third)) == third
    assert {entry["source"] for entry in (first, second, third)} == {"owner/llama"}
    assert third["teacher"] == "owner/llama"
    assert [entry["stage"] for entry in third["ancestors"]] == ["convert", "distill"]
    assert third["ancestors"][0]["recipe"] == {"ratio": 0.5}
    assert all("ancestors" not in entry for entry in third["ancestors"])
    assert third["parent"]["sha256"] == header_digest(tiny_llama_dir)
    assert first["parent"] == {"path": "owner/llama", "sha256": None}
    assert third["versions"].keys() >= {"mambactl", "python", "torch", "transformers"}


def test_digest_tells_checkpoints_apart(make_hybrid, tmp_path: Path) -> None:
    one = save_model(make_hybrid(["mamba2", "attention"]), tmp_path / "a.st", {}, None)
    same = save_model(make_hybrid(["mamba2", "attention"]), tmp_path / "b" / "a.st", {}, None)
    other = save_model(make_hybrid(["mamba2", "mamba2"]), tmp_path / "c" / "a.st", {}, None)
    assert header_digest(one) == header_digest(same) != header_digest(other)


@pytest.mark.parametrize("name", ["a.st", "a"])
def test_digest_sees_weights(make_hybrid, name: str, tmp_path: Path) -> None:
    model = make_hybrid(["mamba2", "attention"])
    record = chain(tmp_path)[0]
    one = save_model(model, tmp_path / name, {}, record)
    before = header_digest(one)
    with torch.no_grad():
        model.model.layers[0].mamba.out_proj.weight[0, 0] += 1
    assert header_digest(save_model(model, tmp_path / name, {}, record, force=True)) != before


def test_digest_of_a_large_file_reads_little_of_it_from_end_to_end(tmp_path: Path) -> None:
    """A change of a sparse file of 20 GiB is noticed at its ends and in between."""
    size = 20 << 30
    file = tmp_path / "large.gguf"
    file.touch()
    os.truncate(file, size)
    seen = {header_digest(file)}
    for offset in (0, 1 << 20, (1 << 20) + (size - (1 << 20) - (1 << 16)) * 20 // 63, size - 1):
        with file.open("r+b") as content:
            content.seek(offset)
            content.write(b"x")
        seen.add(header_digest(file))
    assert len(seen) == 5


def test_a_parent_with_a_name_keeps_it_and_has_a_digest(tiny_llama_dir: Path) -> None:
    made = lineage("convert", None, "owner/llama", None, {}, 0, {}, tiny_llama_dir)
    assert made["parent"] == {"path": "owner/llama", "sha256": header_digest(tiny_llama_dir)}
    assert made["source"] == "owner/llama"


def test_card_names_stages_layers_and_metrics(make_hybrid, tiny_llama_dir: Path) -> None:
    config = make_hybrid(["mamba2", "attention", "mamba2"]).config
    card = model_card(chain(tiny_llama_dir)[1], config)
    front = card.split("---")[1]
    assert "base_model: owner/llama" in front
    assert "convert -> distill" in card
    assert "| mamba2 | 0, 2 |" in card
    assert "| kl | 0.25 |" in card
