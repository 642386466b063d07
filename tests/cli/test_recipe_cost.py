"""Predicted cost of a recipe: the sums over its sections in `recipe list` and in a dry run."""

import json

import pytest

from mambactl.cli.recipe_cost import cost_of, parameters_of
from mambactl.cli.training_needs import OTHER
from mambactl.recipes import load_recipe
from tests.performance.kept_tables import RESULTS

TINY = """
stages:
  convert: {model: %s}
  distill: {data: [x.jsonl, org/set], max_steps: 10, batch_size: 2, max_length: 64, rest_lr: 0}
  sft: {data: [org/set], max_steps: 5, batch_size: 4, max_length: 32, grad_accum: 3}
  dpo: {data: [org/pairs], max_steps: 1, batch_size: 1, max_length: 100}
  eval: {data: [org/other]}
"""


@pytest.fixture
def tiny(tmp_path, tiny_llama_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY % tiny_llama_dir)
    return load_recipe(path)


def test_tokens_are_those_of_all_training(tiny) -> None:
    total = cost_of(tiny)
    tokens = {each.key: each.tokens for each in total.sections}
    assert tokens == {
        "convert": 0, "distill": 10 * 2 * 64, "sft": 5 * 4 * 3 * 32, "dpo": 2 * 100, "eval": 0
    }  # fmt: skip
    assert total.tokens == sum(tokens.values())
    assert total.data == ("org/set", "org/pairs", "org/other")
    assert total.models == () and total.download_bytes == 0 and total.needs_gpu is False
    assert cost_of(tiny, tiny.sections[2:3]).tokens == tokens["sft"]


def test_memory_and_disk_follow_what_trains(tiny, tiny_llama_dir) -> None:
    size = parameters_of(str(tiny_llama_dir))
    total = cost_of(tiny)
    by_key = {each.key: each for each in total.sections}
    assert by_key["eval"].memory == by_key["convert"].disk == 2 * size
    beyond = {key: by_key[key].memory - OTHER for key in ("distill", "sft", "dpo")}
    # everything trains, no teacher, and the reference is asked once; activations on top
    assert 16 * size < beyond["sft"] < beyond["dpo"] < 64 * size
    # the mixers alone train, beside a teacher
    assert 4 * size < beyond["distill"] < beyond["sft"]
    assert total.memory == OTHER + beyond["dpo"]
    assert total.disk == 4 * 2 * size + 16 * size


def test_an_unknown_model_has_no_numbers(tmp_path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("stages: {convert: {model: org/other}, sft: {data: [org/set]}}")
    total = cost_of(load_recipe(path))
    assert total.tokens > 0 and total.models == ("org/other",)
    assert (total.hours, total.memory, total.disk, total.needs_gpu) == (None,) * 4


def test_hours_are_near_those_that_were_measured() -> None:
    """Speeds that were measured: 8B aligns at 29,100 tokens a second; 135M as it is kept."""
    large = {each.key: each for each in cost_of(load_recipe("llama3-8b")).sections}
    measured = (4000 * 8 * 2048 / 11_700 + 2000 * 8 * 2048 / 29_100) / 3600
    # activations are computed twice there, which was not so in the measurement
    assert measured < large["distill"].hours < 1.6 * measured
    small = {each.key: each for each in cost_of(load_recipe("smollm2-135m")).sections}
    kept = json.loads((RESULTS / "smollm2-135m-students-h200.json").read_text("utf-8"))
    students = [each["training"]["seconds_of_steps"] / 3600 for each in kept["students"]]
    # other runs shared their machine
    assert small["distill"].hours < min(students) < 1.6 * small["distill"].hours


def test_the_list_has_a_row_for_each_recipe(cli) -> None:
    found = json.loads(cli("recipe", "list", "--json").out)["recipes"]
    by_name = {each["name"]: each for each in found}
    assert len(by_name) == len(found) and not any("@" in name for name in by_name)
    assert by_name["quickstart"]["needs_gpu"] is False
    assert by_name["llama3-8b"]["needs_gpu"] and by_name["llama3-8b"]["download_bytes"] > 1.6e10
    assert "paper-50" in by_name["llama3-8b"]["variants"]
    shown = cli("recipe", "list").out
    assert shown.count("llama3-8b ") == 1 and "@50,75" in shown


def test_a_dry_run_adds_up_what_would_run(cli, tiny) -> None:
    done = cli("recipe", "run", str(tiny.path), "--dry-run", "--to", "sft", "--json")
    cost = json.loads(done.out)["cost"]
    assert cost["tokens"] == 10 * 2 * 64 + 5 * 4 * 3 * 32
    assert "together" in done.err and f"{cost['tokens']:,}" in done.err
    assert "org/set" in done.err and "org/pairs" not in done.err


@pytest.mark.parametrize("closer", ["--keep-heads=0.1", "--keep-attention=1", "--kv-budget=64"])
def test_a_share_and_a_choice_by_hand_exclude_each_other(cli, closer) -> None:
    flag = closer.partition("=")[0]
    for ratio in ("--ratio=0.5", "--set=ratio=0.5"):
        done = cli("convert", "m", ratio, closer)
        assert (done.code, done.out) == (2, "")
        assert f"--ratio and {flag} exclude each other" in done.err


def test_the_choice_by_hand_counts_across_recipe_and_flags(cli, fake_stage, tmp_path) -> None:
    calls = fake_stage("convert")
    share, hand = tmp_path / "share.yaml", tmp_path / "hand.yaml"
    share.write_text("stages: {convert: {model: m, ratio: 0.75}}")
    hand.write_text("stages: {convert: {model: m, keep_heads: '0.1'}}")
    done = cli("convert", "m", "--recipe", str(share), "--keep-heads", "1.0")
    assert "--keep-heads counts, not --ratio 0.75 of the recipe" in done.err
    assert _chosen(calls) == ("1.0", 0.5)
    done = cli("convert", "m", "--recipe", str(hand), "--ratio", "0.75", "-o", "other")
    assert "--keep-heads counts, not --ratio 0.75 on the command line" in done.err
    assert _chosen(calls) == ("0.1", 0.5)


def _chosen(calls) -> tuple[str, float]:
    config = calls[-1]["config"]
    return config.keep_heads, config.ratio
