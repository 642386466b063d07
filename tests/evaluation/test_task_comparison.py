"""Differences of a student's scores from its teacher's, document by document."""

import random
from types import SimpleNamespace

import pytest

from mambactl.evaluation.harness.task_comparison import compare_scores
from mambactl.evaluation.statistics import Bootstrap


def scored(documents, groups=None, **others):
    """Scores that are means over documents, and `others` that are not: task -> metrics."""
    metrics = {
        task: {name: sum(found.values()) / len(found) for name, found in by_metric.items()}
        for task, by_metric in documents.items()
    }
    return SimpleNamespace(metrics=metrics | others, groups=groups or {}, documents=documents)


def answers(seed, count, wrong=()):
    rng = random.Random(seed)
    right = {index: float(rng.random() < 0.6) for index in range(count)}
    return right | dict.fromkeys(wrong, 0.0)


def test_documents_are_paired_and_every_task_counts_once():
    theirs = {"big": {"acc": answers(0, 400)}, "small": {"acc": answers(1, 50)}}
    # the student misses twenty of the big set that its teacher knows, and nothing else
    known = [index for index, right in theirs["big"]["acc"].items() if right][:20]
    ours = {"big": {"acc": theirs["big"]["acc"] | dict.fromkeys(known, 0.0)}} | {
        "small": theirs["small"]
    }
    found = compare_scores(scored(ours), scored(theirs), [], Bootstrap(0.95, 1000, 0))
    big, small = found["by_task"]["big"], found["by_task"]["small"]
    assert big["difference"] == pytest.approx(-20 / 400) and big["documents"] == 400
    low, high = big["interval"]
    # 20 of 400 that differ: a standard error of 0.011, where unpaired scores have one of 0.035
    assert -0.075 < low < -0.05 < high < -0.025
    assert (small["difference"], small["interval"]) == (0, [0, 0])
    assert found["mean"]["difference"] == pytest.approx(-10 / 400)
    assert found["mean"]["tasks"] == 2
    assert found["mean"]["interval"] == pytest.approx([low / 2, high / 2])


def test_a_group_is_one_task_of_the_documents_of_its_parts():
    def made(seed):
        parts = {name: {"acc": answers(seed + size, size)} for name, size in (("a", 30), ("b", 90))}
        every = [right for part in parts.values() for right in part["acc"].values()]
        return scored(parts, {"whole": ["a", "b"]}, whole={"acc": sum(every) / len(every)})

    found = compare_scores(made(0), made(5), [], Bootstrap())
    assert list(found["by_task"]) == ["whole"] and found["by_task"]["whole"]["documents"] == 120
    assert found["mean"]["tasks"] == 1 and found["by_task"]["whole"]["interval"] is not None


def test_a_score_that_is_no_mean_has_a_difference_without_an_interval():
    texts = {"words": {"word_perplexity": {0: 1.5, 1: 1.0}}}
    ours = scored({"choice": {"acc": answers(0, 20)}} | texts, words={"word_perplexity": 30.0})
    theirs = scored({"choice": {"acc": answers(1, 20)}} | texts, words={"word_perplexity": 25.0})
    found = compare_scores(ours, theirs, [], Bootstrap())
    words = found["by_task"]["words"]
    assert (words["difference"], words["interval"]) == (5, None) and "documents" not in words
    assert found["mean"]["tasks"] == 1
    none = compare_scores(scored(texts, words={"word_perplexity": 1.0}), theirs, [], Bootstrap())
    assert "mean" not in none


def test_a_list_of_the_paper_says_which_score_counts():
    found = {"hellaswag": {"acc": answers(0, 40), "acc_norm": answers(1, 40)}}
    for presets, metric in ((["paper-zeroshot"], "acc_norm"), ([], "acc")):
        result = compare_scores(scored(found), scored(found), presets, Bootstrap())
        assert result["by_task"]["hellaswag"]["metric"] == metric
