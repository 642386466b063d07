"""Local files as harness tasks: schemas, scores equal to the harness's own, padding, errors."""

import gzip
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS

from mambactl.errors import ResourceError, UsageError
from mambactl.evaluation.harness.task_plan import score_wanted
from mambactl.evaluation.harness.tasks import (
    HarnessOptions,
    Wanted,
    is_local,
    load_local_task,
    require_distinct,
)

MIXERS = ["mamba2", "attention", "mamba1", "attention"]


def score_tasks(model, tokenizer, specs, **options):
    """Scores on files, and on tasks that the harness knows by name."""
    wanted = [
        Wanted(local.name, local) if local else Wanted(spec)
        for spec in specs
        for local in [load_local_task(spec, options.get("limit")) if is_local(spec) else None]
    ]
    return score_wanted(model, tokenizer, wanted, HarnessOptions(**options))


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_rows(kind: str, count: int = 24, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        context, continuation = words(rng, 2, 30), words(rng, 1, 4)
        choices = [words(rng, 1, 6) for _ in range(rng.randint(2, 5))]
        gold = rng.randrange(len(choices))
        lm = {"id": index, "context": context, "continuation": continuation}
        rows.append(
            {
                "mc": {"id": index, "query": context, "choices": choices, "gold": gold},
                "partial": {
                    **{"query": context, "choices": choices, "gold": gold},
                    "context_options": [f"{context} {choice}" for choice in choices],
                    "continuation": continuation,
                },
                "lm": lm,
                "aliases": {**lm, "aliases": [continuation, words(rng, 1, 2)]},
                "number": {**lm, "answer": str(rng.randrange(100))},
                "line": {**lm, "subject": "words"},
            }[kind]
        )
    return rows


def write(path, rows):
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    names = {"mc": "mc.jsonl.gz", "partial": "partial.jsonl", "lm": "lm.jsonl"}
    generated = {"aliases": "aliases.jsonl", "number": "number.jsonl", "line": "line.jsonl"}
    return {
        kind: write(folder / name, make_rows(kind, 4 if kind in generated else 24))
        for kind, name in {**names, **generated}.items()
    }


def test_scores_equal_the_harness_on_plain_llama(
    files, llama, same_as_llama, tiny_tokenizer, tmp_path
):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def task(name, **fields):
        source = {"data_files": {"test": files[name]}, "cache_dir": str(tmp_path)}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": source, **fields}

    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=llama, tokenizer=tiny_tokenizer, batch_size=1),
        tasks=[
            task(
                "mc",
                test_split="test",
                output_type="multiple_choice",
                doc_to_text="{{query}}",
                doc_to_choice="{{choices}}",
                doc_to_target="{{gold}}",
                metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
            ),
            task(
                "partial",
                test_split="test",
                output_type="multiple_choice",
                doc_to_text="{{gold}}",
                doc_to_choice="{{context_options}}",
                doc_to_target="{{continuation}}",
                metric_list=[{"metric": "acc"}],
            ),
            task(
                "lm",
                test_split="test",
                output_type="loglikelihood",
                doc_to_text="{{context}}",
                doc_to_target="{{' ' + continuation}}",
                metric_list=[{"metric": "perplexity"}],
            ),
        ],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    specs = [files[name] for name in ("mc", "partial", "lm")]
    scores = score_tasks(same_as_llama, tiny_tokenizer, specs, batch_size=4).metrics
    assert scores["mc"]["acc"] == expected["mc"]["acc,none"]
    assert scores["mc"]["acc_norm"] == expected["mc"]["acc_norm,none"]
    assert scores["partial"]["acc"] == expected["partial"]["acc,none"]
    assert scores["lm"]["perplexity"] == pytest.approx(expected["lm"]["perplexity,none"], rel=1e-4)
    assert scores["lm"]["acc"] == 0
    assert 0 < scores["mc"]["acc"] < 1 and scores["mc"]["acc_stderr"] > 0


@pytest.mark.parametrize(
    "name, defined",
    [
        ("boolq", "super_glue/boolq/default"),
        ("commonsense_qa", "commonsense_qa/default"),
        ("copa", "super_glue/copa/default"),
        ("mmlu_validation", "mmlu/default/_default_template_yaml"),
        ("pubmedqa", "pubmedqa/pubmedqa"),
        ("social_iqa", "siqa/siqa"),
        ("truthfulqa_mc", "truthfulqa/truthfulqa_mc1"),
        ("arc_easy", "arc/arc_easy"),
        ("hellaswag", "hellaswag/hellaswag"),
        ("openbookqa", "openbookqa/openbookqa"),
        ("piqa", "piqa/piqa"),
    ],
)
def test_a_local_set_has_the_scores_of_the_harness_task(tmp_path, name, defined):
    lm_eval = pytest.importorskip("lm_eval")
    task = load_local_task(write(tmp_path / f"{name}.jsonl.gz", make_rows("mc", 4)))
    found = Path(lm_eval.__file__).parent / "tasks" / defined
    text = (found if found.is_file() else found.with_name(f"{found.name}.yaml")).read_text("utf-8")
    assert task.schema.metrics == re.findall(r"metric: (\w+)", text)


def test_a_batch_equals_single_rows(make_hybrid, tiny_tokenizer, files):
    from lm_eval.api.instance import Instance

    from mambactl.evaluation.harness.harness_model import HarnessModel

    model = make_hybrid(MIXERS, seed=4)
    rows = make_rows("lm", 16)
    until = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}

    def requests(kind):
        for index, row in enumerate(rows):
            second = f" {row['continuation']}" if kind == "loglikelihood" else dict(until)
            yield Instance(kind, row, (row["context"], second), index)

    likelihoods, texts = [], []
    for size in (1, 8):
        lm = HarnessModel(pretrained=model, tokenizer=tiny_tokenizer, batch_size=size)
        likelihoods.append([v for v, _ in lm.loglikelihood(list(requests("loglikelihood")))])
        texts.append(lm.generate_until(list(requests("generate_until"))))
    torch.testing.assert_close(*map(torch.tensor, likelihoods), atol=1e-4, rtol=0)
    assert texts[0] == texts[1] and len(set(texts[0])) > 4


def test_generated_answers_are_matched_exactly(make_hybrid, tiny_tokenizer, files, tmp_path):
    from mambactl.evaluation.harness.harness_model import HarnessModel

    model = make_hybrid(MIXERS, seed=4)
    scores = score_tasks(
        model, tiny_tokenizer, [files[kind] for kind in ("aliases", "line")], batch_size=4, limit=2
    ).metrics
    assert scores["aliases"]["exact_match"] == scores["line"]["exact_match"] == 0

    # what the model writes becomes the answer of every other row
    from lm_eval.api.instance import Instance

    lm = HarnessModel(pretrained=model, tokenizer=tiny_tokenizer)
    rows = make_rows("line", 4)
    asked = [
        Instance("generate_until", row, (row["context"], {"until": ["\n"], "max_gen_toks": 64}), 0)
        for row in rows
    ]
    for row, text in list(zip(rows, lm.generate_until(asked), strict=True))[::2]:
        row["continuation"] = text.strip()
    spec = write(tmp_path / "own.jsonl", rows)
    assert score_tasks(model, tiny_tokenizer, [spec]).metrics["own"]["exact_match"] == 0.5


def test_an_answer_that_does_not_fit_is_a_sentence(make_hybrid, tiny_tokenizer, files):
    task, options = load_local_task(files["mc"]), HarnessOptions(max_length=2)
    with pytest.raises(UsageError, match="tokens does not fit in the 2 tokens") as raised:
        score_wanted(
            make_hybrid(MIXERS, seed=4), tiny_tokenizer, [Wanted(task.name, task)], options
        )
    assert "--task-max-length" in raised.value.hint


def test_number_is_the_last_of_the_answer(files):
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

    task = ConfigurableTask(config=load_local_task(files["number"]).config())
    texts = ["first 3 then $1,234.", "none", "12", "7 or 8"]
    task._instances = [Instance("generate_until", {}, ("", {}), 0) for _ in texts]
    for instance, text in zip(task._instances, texts, strict=True):
        instance.resps = [text]
    task.apply_filters()
    answers = [instance.filtered_resps["none"] for instance in task._instances]
    assert answers == ["$1,234.", "[invalid]", "12", "8"]
    doc = {"context": "", "continuation": "x", "answer": "1234"}
    assert task.process_results(doc, answers[:1])["exact_match"] == 1
    assert task.process_results(doc, answers[1:2])["exact_match"] == 0


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("mc", "mc"),
        ("partial", "mc+partial"),
        ("lm", "lm"),
        ("aliases", "gen"),
        ("number", "gen"),
        ("line", "gen"),
    ],
)
def test_schema_is_read_from_the_columns(files, kind, schema):
    task = load_local_task(files[kind], limit=3)
    assert (task.schema.name, task.name, len(task.rows)) == (schema, kind, 3)


GOOD = {"query": "a", "choices": ["b", "c"], "gold": 0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"question": "a", "b": 1}], r"row 1: the columns question, b are of no known kind"),
        ([GOOD, ["a"]], "row 2: holds a list"),
        ([GOOD, {"query": "a"}], r"row 2: found the columns query, but choices, gold is missing"),
        ([GOOD, {**GOOD, "gold": 2}], "row 2: `gold` must be the index"),
        ([{**GOOD, "gold": "0"}], "row 1: `gold` must be the index"),
        ([{**GOOD, "gold": True}], "row 1: `gold` must be the index"),
        ([{**GOOD, "choices": ["a", ""]}], "row 1: `choices` must be a list of texts"),
        ([{**GOOD, "query": None}], "row 1: `query` must be text"),
        ([{"context": "a", "continuation": ""}], "`continuation` must be text that is not empty"),
    ],
)
def test_bad_files_name_the_row(tmp_path, rows, message):
    with pytest.raises(UsageError, match=f"bad.jsonl.*{message}"):
        load_local_task(write(tmp_path / "bad.jsonl", rows))


def test_two_files_of_one_name_are_refused(files, tmp_path):
    other = write(tmp_path / "mc.jsonl", make_rows("mc", 1))
    with pytest.raises(UsageError, match="two tasks are called mc"):
        require_distinct([load_local_task(path).name for path in (files["mc"], other)])


def test_unknown_task_names_its_neighbours(make_hybrid, tiny_tokenizer, monkeypatch):
    from lm_eval.tasks import TaskManager

    from mambactl.evaluation.harness import scoring

    class Few(TaskManager):
        all_tasks = ("hellaswag", "piqa")

        def __init__(self, **_):
            super().__init__(include_defaults=False)

    monkeypatch.setattr(scoring, "TaskManager", Few)
    with pytest.raises(UsageError, match="no task 'helaswag'") as raised:
        score_tasks(make_hybrid(["attention"]), tiny_tokenizer, ["helaswag"])
    assert "hellaswag" in raised.value.hint


def test_missing_harness_says_what_to_install(make_hybrid, tiny_tokenizer, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ResourceError) as raised:
        score_tasks(make_hybrid(["attention"]), tiny_tokenizer, [files["mc"]])
    assert raised.value.hint == 'pip install "mambactl[eval]"'


def test_nothing_is_printed_on_stdout(same_as_llama, tiny_tokenizer, files, capfd):
    result = score_tasks(same_as_llama, tiny_tokenizer, [files["lm"]], batch_size=8, limit=3)
    out, err = capfd.readouterr()
    assert out == "" and "%|" not in err and "git" not in err
    assert "perplexity" in result.table and "lm" in result.table
