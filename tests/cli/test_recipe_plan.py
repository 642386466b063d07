"""`recipe plan`: predictions beside what was measured, and options that make a recipe fit."""

import json
import re
from pathlib import Path

import pytest

from mambactl.checkpoint.decoder_sizes import PUBLISHED, decoder_sizes
from mambactl.cli.training_needs import Subject, needs, rate
from mambactl.options import DistillConfig
from mambactl.present import present

RESULTS = Path(__file__).parents[2] / "recipes" / "results"
LARGEST = "meta-llama/Llama-3.1-70B-Instruct"
PARAMETERS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    LARGEST: 70_553_706_496,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "HuggingFaceH4/zephyr-7b-beta": 7_241_732_096,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
}


def kept(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())


def timed(group: str) -> list[tuple[str, str, dict]]:
    """Command, model and point of steps that `bench --training` timed."""
    found = kept("smollm2-135m-distill-h200")["speed"][group]
    points = [point for point in found["points"] if point["stage"] in ("align", "logits")]
    model = "llama3-8b" if "llama3-8b" in found["command"] else "smollm2-135m"
    return [(found["command"], model, point) for point in points]


def predicted(command: str, model: str, stage: str, rows: int, length: int, ratio: float = 0.5):
    config = DistillConfig(
        stages=[stage],
        batch_size=rows,
        max_length=length,
        rest_lr=0 if "--no-train-rest" in command else 1e-4,
    )
    sizes = present(decoder_sizes(model))
    found = needs(config, Subject(sizes, ratio, sizes.parameters), 1, shards=False)[stage]
    return found.total, rate(sizes.parameters) / found.operations


@pytest.mark.parametrize("group", ["captured", "llama3_8b"])
def test_steps_that_were_timed(group: str) -> None:
    """The constants are fitted to these."""
    for command, model, point in timed(group):
        size, speed = predicted(
            command, model, point["stage"], point["batch_size"], point["input_len"]
        )
        assert size == pytest.approx(point["peak_bytes"], rel=0.2), point["stage"]
        assert speed == pytest.approx(point["tokens_per_second"], rel=0.2), point["stage"]


def test_runs_that_nothing_was_fitted_to() -> None:
    runs = kept("smollm2-135m-distill-h200")["runs"]
    checked = 0
    for run in runs:
        for command in run["commands"]:
            sizes = [
                re.search(rf"--{name} (\d+)", command) for name in ("batch-size", "max-length")
            ]
            if not command.startswith("mambactl distill") or None in sizes:
                continue
            rows, length = (int(present(found)[1]) for found in sizes)
            for stage, measured in run.get("training", {}).items():
                size, _ = predicted(command, "smollm2-135m", stage, rows, length)
                assert size == pytest.approx(measured["peak_bytes"], rel=0.2), command
                checked += 1
    assert checked >= 5
    start = kept("smollm2-135m-alignment-h100")["start"]["training"]["logits"]
    size, _ = predicted("", "smollm2-135m", "logits", 16, 512)
    assert size == pytest.approx(start["peak_bytes"], rel=0.2)


def test_sizes_are_those_that_were_published() -> None:
    for name, count in PARAMETERS.items():
        assert PUBLISHED[name].parameters == count


def test_mixers_are_as_large_as_those_that_convert_makes() -> None:
    from mambactl.checkpoint.load import empty_model
    from mambactl.speed.shapes import SHAPES
    from mambactl.train.phases import mixer_parameters

    made = sum(
        each.numel()
        for each in mixer_parameters(empty_model(SHAPES["llama3-8b-heads-75"]())).values()
    )
    subject = Subject(PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"], 0.75, 0)
    assert subject.mixers == pytest.approx(made, rel=0.001)


def test_a_student_that_is_split_has_its_frozen_weights_beside_the_teachers() -> None:
    sizes = PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"]
    subject = Subject(sizes, 0.5, sizes.parameters)
    config = DistillConfig(stages=["logits"], rest_lr=0)
    found = [needs(config, subject, 2, shards)["logits"].memory for shards in (False, True)]
    # masters of the mixers; the rest is the teacher's
    assert found[0]["weights"] == 4 * subject.mixers
    assert found[1]["weights"] * 2 == 4 * subject.mixers + 2 * sizes.parameters
    assert found[1]["teacher"] * 2 == found[0]["teacher"] == 2 * sizes.parameters


def plan(cli, *words: str) -> dict:
    done = cli("recipe", "plan", *words, "--json")
    found = json.loads(done.out)
    assert done.code == (0 if all(each["fits"] for each in found["sections"]) else 6), done.err
    return found


def test_one_eight_and_seventy_billion_parameters(cli) -> None:
    totals = {}
    for name, words in {
        "1b": ("llama3.2-1b",),
        "8b": ("llama3-8b",),
        "70b": ("llama3-8b", "--set", f"convert.model={LARGEST}"),
    }.items():
        found = plan(cli, *words, "--gpus", "8", "--memory", "80")
        assert found["predicted"] and found["gpus"] == 8 and found["hours"] > 0
        distill = found["sections"][0]
        largest = max(phase["bytes"]["total"] for phase in distill["phases"])
        # the largest alone needs GPUs that share the weights, where the stage can
        assert distill["fits"] == (largest < 76e9) and distill["sharded"] <= (name == "70b")
        assert name == "70b" or distill["fits"]
        totals[name] = largest * (8 if distill["sharded"] else 1)
    assert totals["70b"] > 5 * totals["8b"] and totals["70b"] > 80e9


def test_what_does_not_fit_is_named_with_options_that_make_it_fit(cli) -> None:
    words = ("llama3.2-1b", "--memory", "24")
    found = {each["section"]: each for each in plan(cli, *words)["sections"]}
    sft = found["sft"]
    assert not sft["fits"] and sft["options"] == ["--lora 16"]
    assert sft["bytes_with_options"] < 24e9 < sft["phases"][0]["bytes"]["total"]
    shown = cli("recipe", "plan", *words)
    assert shown.code == 6 and "sft does not fit" in shown.err
    # what changes no result comes first
    assert f"try --gpus {sft['gpus_that_hold_it']}, or with less" in shown.err
    assert "trains, with --lora 16" in shown.err
    more = plan(cli, *words, "--gpus", str(sft["gpus_that_hold_it"]))
    again = {each["section"]: each for each in more["sections"]}["sft"]
    assert not {"--lora 16"} & set(again["options"])
    assert "predicted, not measured" in shown.out and "distill logits" in shown.out
    # the options that are named are options of the command
    lora = plan(cli, *words, "--set", "sft.lora=16", "--set", "sft.grad_checkpointing=true")
    again = {each["section"]: each for each in lora["sections"]}["sft"]
    assert again["fits"]


def test_a_recipe_for_a_cpu_is_called_one_and_short_runs_take_no_tenth_of_an_hour(cli) -> None:
    shown = cli("recipe", "plan", "quickstart")
    assert shown.code == 0 and "quickstart is made for a CPU" in shown.err
    assert "< 0.1" in shown.out


def test_gpus_share_weights_that_one_does_not_hold(cli) -> None:
    alone, shared = (
        {each["section"]: each for each in plan(cli, "llama3-8b@paper-50", *words)["sections"]}
        for words in (("--memory", "141"), ("--gpus", "8", "--memory", "80"))
    )
    assert not alone["sft"]["fits"] and shared["sft"]["fits"] and shared["sft"]["sharded"]
    one, eight = (each["sft"]["phases"][0] for each in (alone, shared))
    assert eight["bytes"]["optimizer"] == pytest.approx(one["bytes"]["optimizer"] / 8, rel=1e-6)
    assert eight["bytes"]["activations"] == one["bytes"]["activations"]
    assert eight["tokens_per_second"] == pytest.approx(8 * one["tokens_per_second"], rel=1e-4)
    said = cli("recipe", "plan", "llama3-8b@paper-50", "--gpus", "8", "--memory", "80").err
    assert "sft: its 8 GPUs share the weights" in said


def test_a_model_of_unknown_sizes_is_named(cli, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(
        "stages: {convert: {model: org/other}, sft: {data: [org/set]}}"
    )
    assert plan(cli, "r.yaml")["unknown"] == ["sft"]
    assert "the shape of its model is not known" in cli("recipe", "plan", "r.yaml").err
