"""YAML files of tasks that somebody else wrote: data, unless a person trusts their code."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import write_sentences

from mambactl.commands.eval import plan, run
from mambactl.errors import ResourceError, UsageError
from mambactl.evaluation.harness.task_files import require_data
from mambactl.evaluation.harness.task_plan import score_wanted
from mambactl.evaluation.harness.tasks import HarnessOptions, Wanted
from mambactl.evaluation.probes import EvalConfig

CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
FUNCTION = CODE + "def text(doc):\n    return doc['text']\n"


def task(folder: Path, **fields: object) -> Path:
    """A task of the harness in a folder, on two rows of text."""
    rows = write_sentences(folder / "rows.jsonl", 0, 2)
    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": rows}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "acc"}],
        **fields,
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(config).replace("'!function u.text'", "!function u.text"))
    return path


@pytest.fixture
def scored(monkeypatch, tmp_path, same_as_llama, tiny_tokenizer):
    """scored() -> the scores of the task `mine` in tmp_path."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "kept"))

    def score(name: str = "mine"):
        options = HarnessOptions(task_dir=str(tmp_path))
        return score_wanted(same_as_llama, tiny_tokenizer, [Wanted(name)], options).metrics

    return score


def test_code_in_a_folder_of_tasks_takes_a_word(scored, tmp_path, tiny_llama_dir) -> None:
    task(tmp_path, doc_to_target="!function u.text")
    (tmp_path / "u.py").write_text(FUNCTION)
    asked = {"tasks": ["mine"], "task_dir": str(tmp_path), "device": "cpu"}
    for call in (plan, run):
        with pytest.raises(UsageError, match="mine.yaml names Python code .!function u.text") as no:
            call(EvalConfig(**asked), str(tiny_llama_dir))
        assert "--trust-remote-code" in no.value.hint
    assert not (tmp_path / "ran").exists()
    plan(EvalConfig(**asked, trust_remote_code=True), str(tiny_llama_dir))
    # what is refused would run
    assert "mine" in scored() and (tmp_path / "ran").exists()


def test_files_of_rows_take_no_yaml(tmp_path, tiny_llama_dir) -> None:
    task(tmp_path, doc_to_target="!function u.text")
    row = {"query": "the", "choices": ["of", "to"], "gold": 0}
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    asked = EvalConfig(tasks=["set"], task_dir=str(tmp_path), device="cpu")
    assert plan(asked, str(tiny_llama_dir))["tasks"] == {"set": 1}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"process_docs": "!function u.text"}, "names Python code"),
        ({"metric_list": [{"metric": "!function u.text"}]}, "names Python code"),
        ({"metric_list": [{"metric": "./evil"}]}, "a metric that is code: ./evil"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "code of the hub"),
        ({"class": "x.Task"}, "is a task in Python"),
        ({"use_prompt": "promptsource:x"}, "takes prompts from elsewhere"),
        ({"use_prompt": "/dev/zero.yaml:x"}, "takes prompts from elsewhere"),
        ({"dataset_path": "data.py"}, "by a script"),
        ({"dataset_kwargs": {"cache_dir": "/tmp/x"}}, "writes into /tmp/x"),
        ({"group": "g", "task": [{"task": "a", "metric_list": [{"metric": "b"}]}]}, "code: b"),
        ({"include": 3}, "`include` names no file"),
        ({"include": "/dev/zero"}, "is a pipe or device"),
        ({"include": ["gone.yaml"]}, "gone.yaml"),
    ],
)
def test_what_is_refused(fields, sentence, tmp_path) -> None:
    task(tmp_path, **fields)
    with pytest.raises(UsageError, match=sentence):
        require_data(tmp_path)


def test_columns_of_worked_examples_are_no_keys(tmp_path) -> None:
    task(tmp_path, fewshot_config={"samples": [{"class": 3, "metric": "x"}]})
    require_data(tmp_path)


def test_what_is_included_counts(tmp_path) -> None:
    sets = tmp_path / "sets"
    sets.mkdir()
    task(sets, include="../elsewhere/base")
    (tmp_path / "elsewhere").mkdir()
    base = tmp_path / "elsewhere" / "base"
    base.write_text("include: ../sets/mine.yaml\nmetric_list: [{metric: acc}]")
    require_data(sets)
    base.write_text("a: {b: [!function os.system]}")
    with pytest.raises(UsageError, match="elsewhere/base names Python code .!function os.system"):
        require_data(sets)


@pytest.mark.parametrize("text", ["a: [", "- " * 5000, "a: !!python/name:os.system", "a: \0", "x"])
def test_damaged_files_are_a_sentence(text, tmp_path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    if text == "x":
        require_data(tmp_path)
        return
    with pytest.raises(UsageError, match="x.yaml"):
        require_data(tmp_path)


def test_templates_reach_no_python(scored, tmp_path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() | length }}"
    task(tmp_path, doc_to_target=escape)
    require_data(tmp_path)
    # the harness renders the first row when it loads a task
    with pytest.raises(UsageError, match=r"mine.yaml.*'__class__'.*unsafe"):
        scored()
    from lm_eval import utils

    assert type(utils.env).__name__ == "Environment"
    assert int(utils.apply_template(escape, {})) > 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"doc_to_target": "{{ nothing }}"}, "mine.yaml.*'nothing' is undefined"),
        ({"doc_to_target": "{{ text"}, "mine.yaml"),
        ({"odd": 1}, "mine.yaml.*odd"),
        ({"output_type": "odd"}, "mine.yaml.*odd"),
        ({"test_split": "odd"}, "mine.yaml.*odd"),
        ({"num_fewshot": "odd"}, "mine"),
        ({"doc_to_text": "{% if text[0] != 't' %}{{ nothing }}{% endif %}"}, "mine"),
    ],
)
def test_tasks_that_fail_are_a_sentence(fields, sentence, scored, tmp_path) -> None:
    task(tmp_path, **fields)
    with pytest.raises(UsageError, match=sentence):
        scored()


def test_code_that_the_model_writes_is_not_run(scored, tmp_path) -> None:
    task(tmp_path, unsafe_code=True)
    with pytest.raises(UsageError, match="runs the code that the model writes"):
        scored()


def test_a_task_whose_data_is_not_there_says_where_it_would_be(scored, tmp_path) -> None:
    task(tmp_path, dataset_path="nobody/nothing-at-all", dataset_kwargs={})
    with pytest.raises((UsageError, ResourceError), match="mine"):
        scored()


def test_a_failure_of_the_model_is_no_fault_of_a_task(scored, tmp_path, same_as_llama, monkeypatch):
    task(tmp_path)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(same_as_llama, "forward", broken)
    monkeypatch.setattr(same_as_llama.model, "forward", broken)
    with pytest.raises(ZeroDivisionError):
        scored()
