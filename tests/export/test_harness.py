"""lm-evaluation-harness on an export scores what `eval --tasks` scores on the original."""

import json
from pathlib import Path

import pytest
import torch

SETS = ("one", "two")
WORDS = ["the", "in", "an", "night", "tree", "house", "river", "seven"]


def write_sets(folder: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    for name in SETS:
        rows = []
        for _ in range(12):
            words = [WORDS[i] for i in torch.randint(len(WORDS), (9,), generator=draw)]
            choices = [f"{words[n]} {words[n + 1]}" for n in (5, 6, 7)]
            gold = int(torch.randint(3, (1,), generator=draw))
            rows.append({"query": " ".join(words[:5]), "choices": choices, "gold": gold})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.since_transformers("5.23", "norms all groups together")
def test_scores_equal_those_of_the_original(exported, source, cli, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    write_sets(tmp_path)
    words = ("--tasks", ",".join(SETS), "--task-dir", ".", "--device", "cpu", "--json")
    done = cli("eval", source("biased"), *words)
    assert done.code == 0, done.err
    ours = json.loads(done.out)["metrics"]["tasks"]
    tasks = [
        {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / f"{name}.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        for name in SETS
    ]
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={exported('biased')},dtype=float32",
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
    )["results"]
    for name in SETS:
        scores = {key: ours[name][key] for key in ("acc", "acc_norm")}
        assert scores == {key: theirs[name][f"{key},none"] for key in scores}
    assert len({ours[name]["acc"] for name in SETS} | {ours["one"]["acc_norm"]}) > 1
