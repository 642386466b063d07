"""The `eval` stage: what it reads, prints, keeps and refuses."""

import json
import random
import shutil

import pytest
import torch
from conftest import WORDS

from mambactl.checkpoint.contents import describe
from mambactl.commands.eval import plan, run
from mambactl.errors import CheckError, MambactlError, ModelError, UsageError
from mambactl.evaluation.probes import EvalConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_student):
    return save_student(tmp_path_factory.mktemp("eval") / "student")


@pytest.fixture(scope="module")
def single(tmp_path_factory, save_student):
    out = tmp_path_factory.mktemp("eval") / "student.st"
    return save_student(out)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    rng = random.Random(0)
    place = tmp_path_factory.mktemp("data")

    def text(count):
        return " ".join(rng.choices(WORDS, k=count))

    chat = [{"role": "user", "content": text(8)}, {"role": "assistant", "content": text(20)}]
    contents = {
        "words": [{"text": text(n)} for n in (90, 40, 33)],
        "chat": [{"messages": chat}] * 2,
        "choice": [
            {"query": text(9), "choices": [text(3), text(2)], "gold": rng.randrange(2)}
            for _ in range(12)
        ],
    }
    for name, rows in contents.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(lines, "utf-8")
    return {name: str(place / f"{name}.jsonl") for name in contents}


def cpu(**fields):
    return EvalConfig(device="cpu", max_length=32, batch_size=2, **fields)


def test_fidelity_against_the_teacher_of_the_lineage(folder, files, tiny_llama_dir, capsys):
    result = run(cpu(data=[files["words"], files["chat"]]), str(folder))
    assert result.path == str(folder)
    assert result.metrics["teacher"] == str(tiny_llama_dir)
    words = result.metrics["fidelity"]["words"]
    # rows of 32, 32, 26 | 32, 8 | 32 and a rest of one token
    assert (words["documents"], words["rows"], words["tokens"]) == (3, 6, 162 - 6)
    assert words["kl"] > 0.001 and 0 < words["agreement"] < 1
    assert result.metrics["fidelity"]["chat"]["documents"] == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{words['kl']:.4f}" in captured.err and "kl at 0-63" in captured.err


def test_the_cache_of_a_sequence_is_that_of_the_teacher_or_less(folder, files, capsys):
    found = run(cpu(data=[files["words"]]), str(folder)).metrics["cache"]
    assert found["dtype"] == "float32" and list(found["sequences"]) == ["1024", "8192", "32768"]
    described = describe(str(folder))
    assert described["sequences"] == found["sequences"]
    for tokens, numbers in found["sequences"].items():
        # two of four layers keep their 2 KV heads of 16 channels
        assert numbers["teacher_total"] == int(tokens) * 4 * 2 * 2 * 16 * 4
        assert numbers["share"] == numbers["total"] / numbers["teacher_total"]
        parts = ("kv", "windows", "rings", "states")
        assert numbers["total"] == sum(numbers[part] for part in parts)
        assert numbers["kv"] == int(tokens) * 2 * 2 * 2 * 16 * 4
    err = capsys.readouterr().err
    assert f"{100 * found['sequences']['8192']['share']:.1f} %" in err
    assert "32,768" in err and "cache of one sequence" in err


def test_a_model_is_its_own_teacher(files, tiny_llama_dir):
    config = cpu(data=[files["words"]], teacher=str(tiny_llama_dir), fail_under=["kl<=0"])
    found = run(config, str(tiny_llama_dir)).metrics["fidelity"]["words"]
    assert (found["kl"], found["agreement"], found["perplexity_ratio"]) == (0, 1, 1)


def test_tasks_and_the_kept_results(folder, files, capsys):
    config = cpu(tasks=[files["choice"]], data=[files["words"]], limit=10)
    result = run(config, str(folder))
    assert 0 <= result.metrics["tasks"]["choice"]["acc"] <= 1
    kept = json.loads((folder / "results" / "eval-words+choice.json").read_text("utf-8"))
    assert kept["metrics"] == result.metrics
    assert kept["config"]["limit"] == 10 and kept["checkpoint"] == str(folder)
    assert "|choice" in capsys.readouterr().err


def test_controls_stand_beside_the_student(folder, files, capsys):
    """A window that holds every row is the teacher; a student without branches is none."""
    config = cpu(
        data=[files["words"]], recall=[96], recall_rows=2, control="window", control_window=96,
        ablate="recurrent,attention",
    )  # fmt: skip
    metrics = run(config, str(folder)).metrics
    assert list(metrics["controls"]) == ["window 96+4", "no recurrent", "no attention"]
    kl = {name: each["fidelity"]["words"]["kl"] for name, each in metrics["controls"].items()}
    assert kl["window 96+4"] < 1e-6
    student = metrics["fidelity"]["words"]
    assert student["kl"] > 0.001 and student["kl"] not in (kl["no recurrent"], kl["no attention"])
    assert set(student["by_position"]) == {"0-63"}
    for probe in ("kv-96", "mqar-96"):
        found = metrics["recall"][probe]
        loss = metrics["controls"]["window 96+4"]["recall"][probe]["recall_loss"]
        assert loss == pytest.approx(found["teacher"]["recall_loss"], rel=1e-5)
        assert found["recall_loss"] != found["teacher"]["recall_loss"]
        assert found["chance"] == 1 / found["pairs"]
    narrow = cpu(data=[files["words"]], control="window", control_window=2, control_sinks=0)
    found = run(narrow, str(folder)).metrics
    assert found["fidelity"]["words"] == student
    assert found["controls"]["window 2+0"]["fidelity"]["words"]["kl"] > 0.001
    err = capsys.readouterr().err
    assert "on words, per token" in err and "window 2+0" in err
    assert "mqar-96" in err and "token_recall" in err and "chance" in err


def test_recall_needs_no_teacher(tiny_llama_dir):
    config = cpu(recall=[96], recall_rows=2, fail_under=["recall>=0", "kv-96.recall_loss<=1e9"])
    found = run(config, str(tiny_llama_dir)).metrics
    assert list(found["recall"]) == ["kv-96", "mqar-96"] and "teacher" not in found
    failing = config.model_copy(update={"fail_under": ["kv-96.recall_loss<=0.01"]})
    with pytest.raises(CheckError, match="kv-96.recall_loss is"):
        run(failing, str(tiny_llama_dir))


def test_recall_is_compared_with_the_teacher_row_by_row(folder, monkeypatch, capsys):
    """A student that recalls about half of what its teacher does."""
    from mambactl.evaluation import recall

    def measured(model, rows):
        teacher = all(name == "attention" for name in model.config.mixers)
        right = torch.ones(int(rows[1].sum()))
        if not teacher:
            seed = int(rows[0].sum())
            right[torch.rand(len(right), generator=torch.Generator().manual_seed(seed)) < 0.4] = 0
        return torch.stack([right, torch.zeros_like(right)], -1)

    monkeypatch.setattr(recall, "read_rows", measured)
    bounds = ["recall.mean_recall_ratio>=0.3", "kv-96.recall_ratio>=0.1", "least_recall_ratio<=0.6"]
    config = cpu(
        recall=[96, 160], recall_rows=4, ablate="recurrent", save_samples=True,
        fail_under=[*bounds, "mean_recall_ratio_low>=0.2"],
    )  # fmt: skip
    metrics = run(config, str(folder)).metrics
    found = metrics["recall"]
    ratios = {name: found[name]["recall_ratio"] for name in found if name != "recall"}
    assert list(ratios) == ["kv-96", "mqar-96", "kv-160", "mqar-160"]
    for name, value in ratios.items():
        rows = found[name]["samples"]["recalled"], found[name]["teacher"]["samples"]["recalled"]
        assert sum(rows[1]) == found[name]["queries"]
        assert value == sum(rows[0]) / sum(rows[1]) == found[name]["recall"]
        low, high = found[name]["intervals"]["recall_ratio"]
        assert low < value < high
        assert "recall_ratio" not in found[name]["teacher"]
    together = found["recall"]
    assert together["mean_recall_ratio"] == pytest.approx(sum(ratios.values()) / 4)
    assert together["least_recall_ratio"] == min(ratios.values())
    assert ratios[together["least_probe"]] == min(ratios.values())
    low, high = together["intervals"]["mean_recall_ratio"]
    assert low == together["mean_recall_ratio_low"] <= together["mean_recall_ratio"] <= high
    assert metrics["controls"]["no recurrent"]["recall"]["recall"] == together
    err = capsys.readouterr().err
    assert "over that of" in err and "mean of 4" in err and f"{low:.4f} to {high:.4f}" in err
    failing = config.model_copy(update={"fail_under": ["mean_recall_ratio>=0.9"]})
    with pytest.raises(CheckError, match="recall.mean_recall_ratio is 0"):
        run(failing, str(folder))


def test_recall_and_tasks_do_without_a_teacher_that_is_not_there(folder, files, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    lineage = json.loads((moved / "mambactl.json").read_text("utf-8"))
    lost = str(tmp_path / "lost")
    (moved / "mambactl.json").write_text(json.dumps(lineage | {"source": lost, "teacher": lost}))
    config = cpu(recall=[96], recall_rows=2, tasks=[files["choice"]], limit=4)
    metrics = run(config, str(moved)).metrics
    assert "teacher" not in metrics and "task_differences" not in metrics
    assert list(metrics["recall"]) == ["kv-96", "mqar-96"]
    assert "share" not in metrics["cache"]["sequences"]["1024"]
    assert "nothing is compared with a teacher" in capsys.readouterr().err
    for asked in ({"data": [files["words"]]}, {"recall": [96], "teacher": lost}):
        with pytest.raises(MambactlError, match="lost"):
            run(cpu(**asked), str(moved))


def test_a_ratio_is_bounded_where_there_is_a_teacher_and_holds_where_it_has_a_value(
    folder, tiny_llama_dir
):
    config = cpu(recall=[96], recall_rows=2, fail_under=["mean_recall_ratio>=0"])
    with pytest.raises(UsageError, match="nothing called mean_recall_ratio"):
        plan(config, str(tiny_llama_dir))
    # random models recall nothing
    with pytest.raises(CheckError, match="recall.mean_recall_ratio is nan"):
        run(config, str(folder))
    own = config.model_copy(update={"teacher": str(tiny_llama_dir), "fail_under": []})
    found = run(own, str(tiny_llama_dir)).metrics["recall"]["recall"]
    assert found["probes"] == 0 and found["mean_recall_ratio"] is None


def test_single_files_equal_folders_and_keep_results_beside_them(folder, single, files):
    config = cpu(data=[files["words"]])
    fidelity = [run(config, str(path)).metrics["fidelity"] for path in (folder, single)]
    assert fidelity[0] == fidelity[1]
    assert sorted(each.name for each in single.parent.iterdir()) == [
        "student.st",
        "student.st.results",
    ]
    (kept,) = (single.parent / "student.st.results").iterdir()
    assert json.loads(kept.read_text("utf-8"))["metrics"]["fidelity"] == fidelity[1]


def test_a_folder_in_a_cache_is_left_alone(save_student, files, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBACTL_CACHE", str(tmp_path))
    folder = save_student(tmp_path / "student")
    run(cpu(data=[files["words"]]), str(folder))
    assert not (folder / "results").exists()


def test_a_bound_that_does_not_hold_is_a_failed_check(folder, files, capsys):
    config = cpu(data=[files["words"]], fail_under=["agreement>=1", "kl<=100"])
    with pytest.raises(CheckError, match="words.agreement is .* asked was >= 1") as raised:
        run(config, str(folder))
    assert raised.value.code == 7 and "kl" not in str(raised.value)
    # the table comes first
    assert "agreement" in capsys.readouterr().err
    held = cpu(data=[files["words"]], fail_under=["agreement>=0", "perplexity_ratio<=1e9"])
    run(held, str(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing to measure"),
        ({"data": ["words"], "fail_under": ["speed>=2"]}, "nothing called speed is measured"),
        ({"data": ["words"], "fail_under": ["agreement>1"]}, "not a bound"),
        ({"control": "window"}, "measure nothing by themselves"),
        ({"data": ["words"], "fail_under": ["recall>=1"]}, "nothing called recall is measured"),
        ({"recall": [20]}, "does not fit in 20 tokens"),
        ({"tasks": ["words"]}, "row 1: the columns text are of no known kind"),
        ({"data": ["choice"]}, "choice.jsonl, row 1"),
        ({"tasks": ["missing.jsonl"]}, "missing.jsonl does not exist"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(folder, files, fields, message, monkeypatch):
    from mambactl.commands import eval as stage

    monkeypatch.setattr(stage, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    named = {
        key: [files.get(name, name) for name in value] if key in ("data", "tasks") else value
        for key, value in fields.items()
    }
    with pytest.raises(UsageError, match=message):
        run(cpu(**named), str(folder))


@pytest.mark.parametrize("call", [run, plan])
def test_a_model_that_was_not_converted_has_no_control(files, tiny_llama_dir, call):
    same = {"data": [files["words"]], "teacher": str(tiny_llama_dir)}
    with pytest.raises(UsageError, match="no layer in which .* has attention instead"):
        call(cpu(**same, control="window"), str(tiny_llama_dir))
    with pytest.raises(UsageError, match="no recurrent layer to ablate"):
        call(cpu(**same, ablate="recurrent"), str(tiny_llama_dir))


def test_a_model_without_lineage_needs_a_teacher(files, tiny_llama_dir):
    with pytest.raises(UsageError, match="does not say what it was made from") as raised:
        run(cpu(data=[files["words"]]), str(tiny_llama_dir))
    assert "--teacher" in raised.value.hint


def test_a_teacher_with_other_tokens_is_refused(folder, files, permuted):
    for call in (run, plan):
        with pytest.raises(ModelError, match="another vocabulary .*: token") as caught:
            call(cpu(data=[files["words"]], teacher=permuted), str(folder))
        assert "--teacher" in caught.value.hint


def test_the_plan_is_json_and_writes_nothing(folder, files, tiny_llama_dir, tmp_path):
    before = sorted(path for path in folder.rglob("*"))
    config = cpu(data=[files["words"]], tasks=[files["choice"], "piqa"], limit=2)
    found = json.loads(json.dumps(plan(config, str(folder))))
    assert found["documents"] == {"words": 2}
    assert found["tasks"] == {"choice": 2, "piqa": None}
    assert found["teacher"] == str(tiny_llama_dir)
    assert found["mixers"] == ["mamba2", "attention"] * 2 and found["parameters"] > 1000
    assert sorted(path for path in folder.rglob("*")) == before
