"""`eval` with tasks: lists of the paper, folders of sets, what is written, what is refused."""

import json
import random

import pytest
from conftest import WORDS

from mambactl.commands.eval import plan, run
from mambactl.errors import UsageError
from mambactl.evaluation.probes import EvalConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_student):
    return save_student(tmp_path_factory.mktemp("eval-tasks") / "student")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    rng = random.Random(0)
    place = tmp_path_factory.mktemp("sets")

    def text(count):
        return " ".join(rng.choices(WORDS, k=count))

    def choice():
        return {"query": text(9), "choices": [text(3), text(2)], "gold": rng.randrange(2)}

    def truth():
        row = choice()
        return {**row, "correct": row["choices"][:1], "incorrect": row["choices"][1:]}

    (place / "fewshot").mkdir()
    (place / "prompts.txt").write_text(f"{text(3)}\n{text(5)}\n", "utf-8")
    contents = {name: [choice() for _ in range(8)] for name in ("arc_easy", "hellaswag", "mmlu")}
    contents |= {"truthfulqa_mc": [truth() for _ in range(8)]}
    contents |= {f"fewshot/{name}": [choice() for _ in range(12)] for name in ("hellaswag", "mmlu")}
    for name, rows in contents.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(lines, "utf-8")
    return place


def cpu(**fields):
    return EvalConfig(device="cpu", **fields)


@pytest.fixture
def no_network(monkeypatch):
    """The harness knows the tasks, but their data cannot be had."""
    from lm_eval.tasks import TaskManager

    from mambactl.evaluation.harness import scoring

    class Known(TaskManager):
        def __init__(self, **_):
            super().__init__(include_defaults=False)

        def match_tasks(self, names):
            return names

        def load(self, specs):
            if isinstance(specs[0], str):
                raise ConnectionError("offline")
            return super().load(specs)

    monkeypatch.setattr(scoring, "TaskManager", Known)


def test_a_list_of_the_paper_takes_local_sets(folder, sets, no_network, capsys):
    config = cpu(tasks=["paper-zeroshot"], task_dir=str(sets), limit=6)
    scores = run(config, str(folder)).metrics["tasks"]
    table = scores["paper-zeroshot"]
    mean = (scores["truthfulqa_mc1"]["acc"] + scores["truthfulqa_mc2"]["acc"]) / 2
    assert table["TruthfulQA"] == pytest.approx(mean)
    assert table["HellaSwag"] == scores["hellaswag"]["acc_norm"]
    assert table["MMLU"] == scores["mmlu"]["acc"]
    labels = ("HellaSwag", "ARC-Easy", "MMLU", "TruthfulQA")
    assert set(table) == {*labels, "average", "teacher"}
    assert set(table["teacher"]) == {*labels, "average"}
    assert table["average"] == pytest.approx(sum(table[label] for label in labels) / 4)
    err = capsys.readouterr().err
    assert "piqa is left out: it cannot be loaded (offline)" in err
    assert "average of 4 of 10" in err and "|hellaswag" in err


def test_a_student_stands_beside_its_teacher(folder, sets, tiny_llama_dir, capsys):
    """Numbers of the teacher are those that it has when it is measured by itself."""
    config = cpu(
        tasks=["arc_easy", "truthfulqa_mc1"], task_dir=str(sets),
        fail_under=["mean_difference>=-1", "tasks.mean_difference<=1"],
    )  # fmt: skip
    metrics = run(config, str(folder)).metrics
    scores, found = metrics["tasks"], metrics["task_differences"]
    alone = cpu(tasks=config.tasks, task_dir=str(sets))
    theirs = run(alone, str(tiny_llama_dir)).metrics
    assert "task_differences" not in theirs
    differences = []
    for name, expected in theirs["tasks"].items():
        assert scores[name]["teacher"] == pytest.approx(expected)
        one = found["by_task"][name]
        assert one["teacher"] == pytest.approx(expected["acc"]) and one["documents"] == 8
        assert one["difference"] == pytest.approx(scores[name]["acc"] - expected["acc"])
        differences.append(one["difference"])
        low, high = one["interval"]
        assert low <= one["difference"] <= high
    assert found["mean"]["difference"] == pytest.approx(sum(differences) / 2)
    err = capsys.readouterr().err
    assert "beside" in err and "mean of 2" in err and f"{found['mean']['difference']:+.4f}" in err


def test_worked_examples_of_the_paper(sets, folder):
    found = plan(cpu(tasks=["paper-fewshot"], task_dir=str(sets)), str(folder))
    assert found["tasks"]["mmlu"] == 8 and found["tasks"]["arc_challenge"] is None
    from mambactl.evaluation.harness.task_plan import read

    wanted = read(cpu(tasks=["paper-fewshot"], task_dir=str(sets)), str(folder)).wanted
    assert {task.name: task.shots for task in wanted} == {
        "arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "winogrande": 5, "truthfulqa_mc2": 0,
    }  # fmt: skip
    pools = {task.name: task.local.pool for task in wanted if task.local}
    assert len(pools["hellaswag"].rows) == 12 and pools["truthfulqa_mc2"] is None


def test_samples_answers_and_chat(folder, sets, tmp_path):
    config = cpu(
        tasks=["hellaswag"], task_dir=str(sets), num_fewshot=2, apply_chat_template=True,
        log_samples=True, output_path=str(tmp_path / "out"), use_cache=str(tmp_path / "kept"),
        cache_requests=True,
    )  # fmt: skip
    first = run(config, str(folder)).metrics["tasks"]
    lines = (tmp_path / "out" / "samples_hellaswag.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 8 and rows[0]["arguments"][0][0].count("<|im_start|>") == 6
    assert sum(row["acc"] for row in rows) / 8 == first["hellaswag"]["acc"]
    # of student and teacher
    assert len(list((tmp_path / "kept").glob("*.db"))) == 2
    assert run(config, str(folder)).metrics["tasks"] == first
    # results went into the card, the model is the same
    assert len(list((tmp_path / "kept").glob("*.db"))) == 2


def test_texts_of_a_model_agree_with_its_own(folder, sets, tiny_llama_dir, capsys):
    asked = {"generation_agreement": str(sets / "prompts.txt"), "generation_tokens": 6}
    same = run(cpu(**asked, teacher=str(tiny_llama_dir)), str(tiny_llama_dir))
    found = same.metrics["generation"]["generation"]
    assert found["prompts"] == 2 and found["exact_match"] == found["forced_agreement"] == 1
    assert found["prefix_share"] == found["token_f1"] == 1 and 1 <= found["prefix_tokens"] <= 6
    held = cpu(**asked, fail_under=["forced_agreement>=0", "prefix_share<=1"])
    other = run(held, str(folder)).metrics["generation"]["generation"]
    assert other["forced_agreement"] < 1
    assert "greedy texts of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["paper-fewshot"], "num_fewshot": 1}, "says itself how many"),
        ({"tasks": ["hellaswag"], "task_dir": "nowhere"}, "nowhere is no folder"),
        ({"tasks": ["hellaswag"], "fewshot_as_multiturn": True}, "need a chat template"),
        ({"tasks": ["hellaswag"], "num_fewshot": 13}, "13 worked examples are asked for"),
        ({"tasks": ["hellaswag"], "fail_under": ["speed>=1"]}, "nothing called speed"),
        ({"tasks": ["paper-zeroshot", "paper-fewshot"]}, "two tasks are called arc_challenge"),
        ({"generation_agreement": "none.txt"}, "none.txt is no file"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(folder, sets, fields, message, monkeypatch):
    from mambactl.commands import eval as stage

    monkeypatch.setattr(stage, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=message):
        run(cpu(**{"task_dir": str(sets)} | fields), str(folder))
