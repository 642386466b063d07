"""`generate --dataset` as it is typed: one path on stdout, exit codes, sections of a recipe."""

import json

import pytest


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the old house"}\n{"prompt": "the king"}\n')
    return path


@pytest.fixture
def given(tiny_llama_dir, prompts):
    options = ("--max-new-tokens", "4", "--device", "cpu", "--keep-unfinished")
    return ("generate", str(tiny_llama_dir), "--dataset", str(prompts), *options)


def test_the_path_of_the_file_is_what_stdout_says(cli, given, tmp_path) -> None:
    done = cli(*given, "-o", "a.jsonl")
    out = tmp_path / "a.jsonl"
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    assert "tokens/s" in done.err
    again = cli(*given, "-o", "a.jsonl")
    assert (again.code, again.out) == (5, "")
    assert "--resume accepts it" in again.err
    before = out.stat().st_mtime_ns
    resumed = cli(*given, "-o", "a.jsonl", "--resume", "--json")
    shown = json.loads(resumed.out)
    assert (shown["checkpoint"], shown["metrics"]["rows_written"]) == (str(out), 2)
    assert out.stat().st_mtime_ns == before
    other = cli(*given, "-o", "a.jsonl", "--resume", "--seed", "1")
    assert (other.code, "seed 0 -> 1" in other.err) == (5, True)
    # which part is answered is no matter of place, unlike `--shard` of sft
    part = cli(*given, "-o", "a.jsonl", "--resume", "--shard", "1/2")
    assert (part.code, 'shard null -> "1/2"' in part.err) == (5, True)
    assert cli(*given, "-o", "a.jsonl", "--force", "--seed", "1").code == 0


def test_a_dry_run_shows_a_prompt_and_writes_nothing(cli, given, prompts, tmp_path) -> None:
    done = cli(*given, "--dry-run", "--json")
    plan = json.loads(done.out)
    assert plan["out"] == str(tmp_path / "runs" / "llama-generate.jsonl")
    assert plan["answers"] == 2
    assert "the old house" in plan["first_prompt"]
    assert list(tmp_path.iterdir()) == [prompts]


def test_wrong_use_has_its_exit_codes(cli, given, prompts, tiny_llama_dir, tmp_path) -> None:
    prompts.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    bad = cli(*given, "-o", "a.jsonl")
    assert (bad.code, bad.out) == (2, "")
    assert "row 2: has an empty prompt" in bad.err
    assert "--skip-bad-rows" in bad.err
    text = cli("generate", str(tiny_llama_dir), "-p", "the", "-o", "a.jsonl")
    assert text.code == 2
    assert "--out goes with --dataset" in text.err
    assert cli("generate", "./none", "--dataset", str(prompts), "-o", "a.jsonl").code == 3
    assert list(tmp_path.iterdir()) == [prompts]


def test_a_recipe_may_train_on_what_its_teacher_wrote(
    cli, tiny_llama_dir, prompts, tmp_path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""
        stages:
          generate@labels:
            model: {tiny_llama_dir}
            dataset: [prompts.jsonl]
            max_new_tokens: 4
            keep_unfinished: true
          convert: {{model: {tiny_llama_dir}}}
          sft: {{data: ["${{generate@labels}}"], max_steps: 1, batch_size: 1, max_length: 32}}
        """
    )
    done = cli("recipe", "run", "r.yaml", "-o", "run", "--dry-run")
    assert done.code == 0, done.err
    labels = tmp_path / "run" / "generate-labels.jsonl"
    first, _, last = [line for line in done.err.splitlines() if "mambactl" in line]
    assert f"-o {labels} --set" in first
    assert f'dataset=["{prompts}"]' in first
    assert f'data=["{labels}"]' in last
