"""Worked examples, chat templates, answers, folders: against the harness's own wrapper."""

import json
import random

import pytest
from conftest import WORDS

from mambactl.errors import UsageError
from mambactl.evaluation.harness.task_plan import score_wanted
from mambactl.evaluation.harness.tasks import (
    HarnessOptions,
    Wanted,
    find_local,
    load_local_task,
    matching,
)


def words(rng, low, high):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_rows(kind, count, seed):
    rng = random.Random(f"{kind}{seed}")
    rows = []
    for index in range(count):
        query, choices = words(rng, 3, 20), [words(rng, 1, 5) for _ in range(rng.randint(2, 4))]
        gold, number = rng.randrange(len(choices)), rng.randrange(10)
        mc = {"query": query, "choices": choices, "gold": gold}
        rows.append(
            {
                "mc": mc,
                "letters": {
                    "subject": ("red", "blue")[index % 2],
                    "query": f"{('red', 'blue')[index % 2]} {query}",
                    "choices": ["a", "b", "c"],
                    "gold": gold % 3,
                },
                "partial": {
                    **mc,
                    "context_options": [f"{query} {choice}" for choice in choices],
                    "continuation": words(rng, 2, 6),
                },
                "mc2": {"query": query, "correct": choices[:1], "incorrect": choices[1:]},
                "lm": {"context": query, "continuation": words(rng, 1, 3)},
                "maths": {
                    "context": f"Question: {query}\nAnswer:",
                    "continuation": f"{words(rng, 2, 5)} #### {number}",
                    "answer": str(number),
                },
            }[kind]
        )
    return rows


# the same tasks as somebody would write them for the harness
_SCORES = [{"metric": "acc"}, {"metric": "acc_norm"}]
_CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{query}}"}
CONFIGS = {
    "mc": _CHOICE | {"doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
    "letters": _CHOICE | {"doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
    "partial": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{gold}}",
        "doc_to_choice": "{{context_options}}",
        "doc_to_target": "{{continuation}}",
        "metric_list": [{"metric": "acc"}],
    },
    "maths": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "temperature": 0.0,
        },
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": ["(?s).*#### "]}],
        "filter_list": [
            {
                "name": name,
                "filter": [{"function": "regex", **regex}, {"function": "take_first"}],
            }
            for name, regex in {
                "strict-match": {"regex_pattern": "#### (\\-?[0-9\\.\\,]+)"},
                "flexible-extract": {
                    "group_select": -1,
                    "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)",
                },
            }.items()
        ],
    },
}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sets")
    for kind in CONFIGS:
        write(place / f"{kind}.jsonl", make_rows(kind, 6 if kind == "maths" else 12, 0))
        write(place / "fewshot" / f"{kind}.jsonl", make_rows(kind, 10, 1))
    for kind in ("mc2", "lm"):
        write(place / f"{kind}.jsonl", make_rows(kind, 8, 0))
    return place


def expected(folder, cache, llama, tokenizer, kind, **options):
    """The harness's own results for a set: its samples by row and its scores."""
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # seconds of asking the system for its versions
    evaluator.add_env_info = lambda storage: None
    files = {"test": str(folder / f"{kind}.jsonl"), "train": str(folder / f"fewshot/{kind}.jsonl")}
    config = {
        "task": kind,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(cache)},
        "test_split": "test",
        "fewshot_split": "train",
        "metric_list": _SCORES,
        **CONFIGS[kind],
    }
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1),
        tasks=[config],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )


def run(model, tokenizer, path, shots=0, **options):
    task = load_local_task(str(path), shots=shots)
    return score_wanted(
        model,
        tokenizer,
        [Wanted(task.name, task)],
        HarnessOptions(num_fewshot=shots, log_samples=True, **options),
    )


@pytest.mark.parametrize(
    ("kind", "shots", "chat", "turns"),
    [
        ("mc", 0, False, False),
        ("mc", 3, False, False),
        ("mc", 2, True, True),
        ("mc", 2, True, False),
        ("letters", 0, False, False),
        ("partial", 3, False, False),
        ("maths", 0, False, False),
        ("maths", 2, False, False),
        ("maths", 2, True, True),
    ],
)
def test_requests_and_scores_are_the_harness_s(
    folder, llama, same_as_llama, tiny_tokenizer, tmp_path, kind, shots, chat, turns
):
    chat = {"apply_chat_template": chat, "fewshot_as_multiturn": turns}
    theirs = expected(folder, tmp_path, llama, tiny_tokenizer, kind, num_fewshot=shots, **chat)
    ours = run(same_as_llama, tiny_tokenizer, folder / f"{kind}.jsonl", shots, **chat)

    def requests(samples):
        ordered = sorted(samples, key=lambda row: (row["filter"], row["doc_id"]))
        return [
            (tuple(pair[0] for pair in row["arguments"]), [answer[0] for answer in row["resps"]])
            for row in ordered
        ]

    asked, answered = zip(*requests(theirs["samples"][kind]), strict=True)
    found, given = zip(*requests(ours.samples[kind]), strict=True)
    assert found == asked
    if kind == "maths":
        assert given == answered and len({str(texts) for texts in given}) > 3
    else:
        values = [float(answer[0]) for row in given for answer in row]
        assert values == pytest.approx([float(a[0]) for r in answered for a in r], abs=1e-4)
    for key, value in theirs["results"][kind].items():
        name, _, extraction = key.partition(",")
        if not extraction or name.endswith("_stderr"):
            continue
        plain = name if extraction == "none" else f"{name}:{extraction}"
        assert ours.metrics[kind][plain] == value
        assert ours.metrics[kind][f"{plain}".replace(name, f"{name}_stderr")] >= 0


def test_answers_of_mathematics_are_extracted_both_ways(folder, make_hybrid, tiny_tokenizer):
    from lm_eval.api.instance import Instance

    from mambactl.evaluation.harness.scoring import LocalConfigurableTask

    task = LocalConfigurableTask(load_local_task(str(folder / "maths.jsonl")))
    texts = ["it is 3 so #### 1,234 ok", "so 7 or 1234.", "#### 12", "none"]
    task._instances = [Instance("generate_until", {}, ("", {}), 0) for _ in texts]
    for instance, text in zip(task._instances, texts, strict=True):
        instance.resps = [text]
    task.apply_filters()
    doc = {"context": "", "continuation": "x #### 1234", "answer": "1234"}
    for name, right in {"strict-match": [1, 0, 0, 0], "flexible-extract": [1, 1, 0, 0]}.items():
        found = [instance.filtered_resps[name] for instance in task._instances]
        assert [task.process_results(doc, [one])["exact_match"] for one in found] == right


def test_share_of_true_answers(folder, same_as_llama, tiny_tokenizer):
    import math

    from mambactl.evaluation.harness.schemas import MC2_SCHEMA

    task = load_local_task(str(folder / "mc2.jsonl"), schema=MC2_SCHEMA)
    options = HarnessOptions(log_samples=True)
    scores = score_wanted(same_as_llama, tiny_tokenizer, [Wanted("mc2", task)], options)
    shares = []
    for row in scores.samples["mc2"]:
        weights = [math.exp(float(answer[0][0])) for answer in row["resps"]]
        shares.append(weights[0] / sum(weights))
    assert scores.metrics["mc2"]["acc"] == pytest.approx(sum(shares) / len(shares))


def test_worked_examples_are_of_the_subject_and_in_order(folder, same_as_llama, tiny_tokenizer):
    place = folder / "own"
    pool = make_rows("letters", 10, 2)
    path = write(place / "letters.jsonl", make_rows("letters", 4, 0))
    write(place / "letters_dev.jsonl", pool)
    samples = run(same_as_llama, tiny_tokenizer, path, 2).samples["letters"]
    for row in samples:
        shown = [shot for shot in pool if shot["subject"] == row["doc"]["subject"]][:2]
        texts = [f"{shot['query']} {shot['choices'][shot['gold']]}" for shot in shown]
        assert row["arguments"][0][0] == "\n\n".join([*texts, row["doc"]["query"]])
    assert len({row["doc"]["subject"] for row in samples}) == 2


def test_without_a_pool_other_rows_are_shown(folder, same_as_llama, tiny_tokenizer):
    path = write(folder / "bare" / "alone.jsonl", make_rows("mc", 6, 0))
    task = load_local_task(path, limit=2, shots=4)
    options = HarnessOptions(num_fewshot=4, limit=2, log_samples=True)
    samples = score_wanted(same_as_llama, tiny_tokenizer, [Wanted("alone", task)], options).samples[
        "alone"
    ]
    assert len(samples) == 2
    for row in samples:
        *shown, asked = row["arguments"][0][0].split("\n\n")
        assert asked == row["doc"]["query"]
        assert len(shown) == 4 and not any(text.startswith(asked) for text in shown)
    with pytest.raises(UsageError, match="6 worked examples are asked for, and there are 5"):
        load_local_task(path, shots=6)


def test_names_and_patterns_in_a_folder(folder):
    assert find_local("mc", str(folder))[0] == folder / "mc.jsonl"
    assert find_local("mc", None) is None and find_local("piqa", str(folder)) is None
    assert matching("m*", str(folder)) == ["maths", "mc", "mc2"]
    assert matching("mc", str(folder)) == []


def test_tasks_written_for_the_harness_are_found_in_a_folder(
    folder, same_as_llama, tiny_tokenizer, tmp_path
):
    import yaml

    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "mc.jsonl")},
            "cache_dir": str(tmp_path),
        },
        "test_split": "test",
        "metric_list": _SCORES,
        **CONFIGS["mc"],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config), "utf-8")
    options = HarnessOptions(task_dir=str(tmp_path))
    scores = score_wanted(same_as_llama, tiny_tokenizer, [Wanted("mine")], options)
    same = run(same_as_llama, tiny_tokenizer, folder / "mc.jsonl")
    assert scores.metrics["mine"] == same.metrics["mc"]
    assert "|mine " in scores.table


def test_what_is_kept_is_not_done_again(folder, make_hybrid, tiny_tokenizer, tmp_path, monkeypatch):
    model = make_hybrid(["mamba2", "attention"], seed=1)
    kept = {"requests": tmp_path / "requests", "answers": tmp_path / "model.db"}
    path = write(tmp_path / "set.jsonl", make_rows("mc", 5, 0))
    first = run(model, tiny_tokenizer, path, **kept)
    with monkeypatch.context() as patch:
        patch.setattr(model.model, "forward", lambda *_, **__: pytest.fail("the model was asked"))
        assert run(model, tiny_tokenizer, path, **kept).metrics == first.metrics
    # a file of the same name with other rows is another task
    write(tmp_path / "set.jsonl", make_rows("mc", 5, 7))
    second = run(model, tiny_tokenizer, path, **kept)
    asked = [row["doc"]["query"] for row in second.samples["set"]]
    assert asked == [row["query"] for row in make_rows("mc", 5, 7)]
