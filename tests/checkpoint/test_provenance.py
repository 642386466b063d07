"""Lineage chains, digests and the card."""

import json
from pathlib import Path

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


def test_card_names_stages_layers_and_metrics(make_hybrid, tiny_llama_dir: Path) -> None:
    config = make_hybrid(["mamba2", "attention", "mamba2"]).config
    card = model_card(chain(tiny_llama_dir)[1], config)
    front = card.split("---")[1]
    assert "base_model: owner/llama" in front
    assert "convert -> distill" in card
    assert "| mamba2 | 0, 2 |" in card
    assert "| kl | 0.25 |" in card
