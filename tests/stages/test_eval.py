"""The `eval` stage: what it reads, prints, keeps and refuses."""

import json
import random

import pytest
from conftest import WORDS

from mambactl.errors import CheckError, ModelError, UsageError
from mambactl.recipe import EvalConfig
from mambactl.stages.eval import plan, run


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


def test_single_files_equal_folders_and_keep_nothing_beside_them(folder, single, files):
    config = cpu(data=[files["words"]])
    fidelity = [run(config, str(path)).metrics["fidelity"] for path in (folder, single)]
    assert fidelity[0] == fidelity[1]
    assert [path.name for path in single.parent.iterdir()] == ["student.st"]


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
        ({"tasks": ["words"]}, "row 1: the columns text are of no known kind"),
        ({"data": ["choice"]}, "choice.jsonl, row 1"),
        ({"tasks": ["missing.jsonl"]}, "missing.jsonl does not exist"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(folder, files, fields, message, monkeypatch):
    from mambactl.stages import eval as stage

    monkeypatch.setattr(stage, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    named = {
        key: [files.get(name, name) for name in value] if key != "fail_under" else value
        for key, value in fields.items()
    }
    with pytest.raises(UsageError, match=message):
        run(cpu(**named), str(folder))


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
