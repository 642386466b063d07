"""Streams, exit codes, precedence and output rules, with stages that only record their calls."""

import errno
import json
import os
import re
import signal
import sys
import tomllib
from pathlib import Path

import pytest

from mambactl import console, errors
from mambactl.cli.main import run
from mambactl.errors import ExitCode
from mambactl.files import default_out
from mambactl.requirements import EXTRAS

EXIT_CODES = {
    "DONE": 0,
    "BUG": 1,
    "USAGE": 2,
    "MODEL": 3,
    "UPSTREAM": 4,
    "OUTPUT": 5,
    "RESOURCE": 6,
    "CHECK": 7,
    "INTERRUPTED": 130,
    "TERMINATED": 143,
}


def test_exit_codes_are_frozen() -> None:
    assert {code.name: code.value for code in ExitCode} == EXIT_CODES


def test_stdout_is_one_absolute_path_and_noise_goes_to_stderr(cli, fake_stage, tmp_path) -> None:
    calls = fake_stage("convert")
    done = cli("convert", "org/llama-7b@main", "--ratio", "0.25")
    assert done.code == 0
    assert done.out == f"{tmp_path / 'runs' / 'llama-7b-convert'}\n"
    assert "noise of a C library" in done.err
    assert calls[0]["source"] == "org/llama-7b@main"
    assert calls[0]["config"].ratio == 0.25


def test_measuring_stages_pass_their_input_on(cli, fake_stage, tmp_path) -> None:
    calls = fake_stage("eval")
    (tmp_path / "t.st").write_text("weights")
    assert cli("eval", "t.st").out == f"{tmp_path / 't.st'}\n"
    assert cli("eval", "org/model").out == "org/model\n"
    assert calls[0]["out"] is None


def test_text_replaces_the_path(cli, fake_stage) -> None:
    fake_stage("generate", text="two\nlines")
    assert cli("generate", "m", "-p", "hi").out == "two\nlines\n"


def test_json_is_one_line_that_the_next_stage_reads(cli, fake_stage, tmp_path) -> None:
    fake_stage("convert")
    calls = fake_stage("sft")
    line = cli("convert", "m", "--json").out
    assert line.count("\n") == 1
    found = json.loads(line)
    assert found["checkpoint"] == str(tmp_path / "runs" / "m-convert")
    assert found["metrics"] == {"loss": 1.5}
    assert cli("sft", "-", stdin=line).code == 0
    assert calls[0]["source"] == found["checkpoint"]


def test_model_from_stdin(cli, fake_stage) -> None:
    calls = fake_stage("sft")
    assert cli("sft", "-", stdin="/a/b c\n").code == 0
    assert calls[0]["source"] == "/a/b c"
    assert cli("sft", "-", stdin="").code == 4
    assert cli("sft", "-", stdin='{"no": 1}').code == 2
    assert cli("sft", "-", stdin="{broken").code == 2
    assert len(calls) == 1


def test_model_from_a_terminal_is_refused(monkeypatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(errors.UsageError, match="terminal"):
        console.read_model("-")


def test_target_of_spec_decode(cli, fake_stage) -> None:
    calls = fake_stage("spec_decode", text="3.1 tokens per step")
    assert cli("spec-decode", "--draft", "d.st", "--target", "t.st").out == "3.1 tokens per step\n"
    cli("spec-decode", "--draft", "d.st", "t.st")
    cli("spec-decode", "--draft", "d.st", "--target", "-", stdin="t.st\n")
    cli("spec-decode", "--draft", "d.st", "-k", "6", stdin="t.st\n")
    assert [call["source"] for call in calls] == ["t.st"] * 4
    assert [call["config"].draft for call in calls] == ["d.st"] * 4
    assert calls[-1]["config"].k == 6
    assert cli("spec-decode", "--draft", "d.st").code == 4
    assert cli("spec-decode", "t.st", "--target", "t.st").code == 2


def test_prompt_from_stdin(cli, fake_stage) -> None:
    calls = fake_stage("generate", text="ok")
    cli("generate", "m", "-p", "-", stdin="a long\nprompt")
    assert calls[0]["config"].prompt == "a long\nprompt"
    assert cli("generate", "-", "-p", "-", stdin="m").code == 2


def test_precedence_flag_set_recipe_default(cli, fake_stage, tmp_path) -> None:
    calls = fake_stage("convert")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stages: {convert: {model: m, ratio: 0.1, init: reference, seed: 7}}")
    given = ("convert", "m", "--recipe", str(recipe), "--set", "ratio=0.2", "--set", "seed=8")
    assert cli(*given, "--ratio", "0.3").code == 0
    config = calls[0]["config"]
    assert (config.ratio, config.seed) == (0.3, 8)
    assert (config.init, config.mixer) == ("reference", "mamba2")


def test_lists_repeat_or_split_on_commas(cli, fake_stage) -> None:
    calls = fake_stage("eval")
    cli("eval", "m", "--tasks", "a,b", "--tasks", "c", "--data", "x,1.jsonl")
    assert calls[0]["config"].tasks == ["a", "b", "c"]
    assert calls[0]["config"].data == ["x,1.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "sentence", "hint"),
    [
        (["convert", "m", "--set", "ratoi=1"], "convert has no option ratoi", "ratio"),
        (["convert", "m", "--ratio", "1.5"], "ratio: input should be less than", "--help"),
        (["convert", "m", "--ratoi", "1"], "--ratoi", "convert --help"),
        (["convert"], "MODEL", "convert --help"),
        (["recipe", "show", "nothing"], "no recipe file or name nothing", "quickstart"),
        (["convert", "m", "--set", "ratio"], "not key=value", "--set"),
        (["convert", "m", "--resume", "--force"], "exclude", "one of them"),
        (["convert", "m", "--recipe", "nothing"], "no recipe file or name nothing", "quickstart"),
        (["sft", "m", "--recipe", "quickstart"], "no section sft", "convert"),
        (["convrt", "m"], "convrt", "--help"),
        (["bench", "m", "--input-len", "-5"], "input-len: input should be greater", "--help"),
        (["bench", "m", "--input-len", "0"], "input-len: input should be greater", "--help"),
        (["bench", "m", "--batch-size", "2,0"], "batch-size: input should be greater", "--help"),
        (["bench"], "no MODEL", "--synthetic NAME"),
        (["bench", "m", "--synthetic", "tiny"], "without a MODEL", "drop m"),
        (["bench", "m", "--kernels"], "No such option: --kernels", "bench --help"),
        (["bench", "--loss", "--tokens", "8"], "No such option: --loss", "bench --help"),
        (["bench", "m", "--verify"], "No such option: --verify", "bench --help"),
        (["bench", "m", "--set", "kernels=true"], "bench has no option kernels", "known"),
        (["bench", "m", "--k", "many"], "k: input should be", "--help"),
        (["bench", "m", "--set", "batch_size=[]"], "batch-size: list should have", "--help"),
    ],
)
def test_usage_errors_say_what_to_do(cli, arguments, sentence, hint) -> None:
    done = cli(*arguments)
    error, _, rest = done.err.partition("\n")
    assert done.code == 2
    assert done.out == ""
    assert error.startswith("error: ") and sentence in error
    assert rest.startswith("hint: ") and hint in rest


def test_an_empty_model_is_an_unusable_model(cli) -> None:
    assert cli("convert", " ").code == 3


def raised(kind: str) -> BaseException:
    if kind == "disk":
        return OSError(errno.ENOSPC, "No space left on device")
    if kind == "wrapped disk":
        wrapped = RuntimeError("serialisation failed")
        wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
        return wrapped
    if kind == "device":
        return type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")
    if kind == "extra":
        return ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval.tasks")
    return getattr(errors, kind)("what is wrong", "what to do")


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("UsageError", 2, "hint: what to do"),
        ("ModelError", 3, "error: what is wrong"),
        ("OutputError", 5, "error: what is wrong"),
        ("ResourceError", 6, "error: what is wrong"),
        ("CheckError", 7, "error: what is wrong"),
        ("disk", 6, "the disk is full"),
        ("wrapped disk", 6, "the disk is full"),
        ("device", 6, "out of memory"),
        ("extra", 6, 'pip install "mambactl[eval]"'),
    ],
)
def test_failures_have_their_code_and_no_traceback(cli, fake_stage, kind, code, message) -> None:
    fake_stage("convert", raises=raised(kind))
    done = cli("convert", "m")
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_every_extra_is_one_that_a_message_can_ask_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == {*(extra.name for extra in EXTRAS), "dev"}


def test_a_bug_shows_its_traceback(cli, fake_stage, monkeypatch) -> None:
    fake_stage("convert", raises=ZeroDivisionError("x"))
    done = cli("convert", "m")
    assert done.code == 1
    assert "Traceback" in done.err and "please report" in done.err


def test_debug_shows_the_traceback_of_an_expected_error(cli, fake_stage, monkeypatch) -> None:
    monkeypatch.setenv("MAMBACTL_DEBUG", "1")
    fake_stage("convert", raises=errors.ModelError("broken"))
    assert "Traceback" in cli("convert", "m").err


def test_error_object_with_json(cli, fake_stage) -> None:
    fake_stage("convert", raises=errors.ModelError("broken", "mend it"))
    done = cli("convert", "m", "--json")
    assert done.out == ""
    assert json.loads(done.err.splitlines()[-1]) == {
        "error": "broken",
        "hint": "mend it",
        "code": 3,
    }


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_unwind_the_stage(cli, fake_stage, monkeypatch, number, code) -> None:
    fake_stage("convert")
    cleaned = []

    def interrupted(config, source, out, **how):
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(sys.modules["mambactl.commands.convert"], "run", interrupted)
    before = signal.getsignal(number)
    done = cli("convert", "m")
    assert (done.code, done.out, cleaned) == (code, "", [True])
    assert f"stopped by {number.name}" in done.err
    assert signal.getsignal(number) is before


def test_only_what_can_resume_offers_it(cli, fake_stage) -> None:
    fake_stage("bench", raises=KeyboardInterrupt())
    fake_stage("sft", raises=KeyboardInterrupt())
    for module in ("bench", "sft"):
        stage = sys.modules[f"mambactl.commands.{module}"]
        stage.run = lambda *given, **how: os.kill(os.getpid(), signal.SIGINT)
    assert "--resume" not in cli("bench", "m").err
    assert "--resume" in cli("sft", "m").err


def test_existing_output_is_refused_without_a_word(cli, fake_stage, tmp_path) -> None:
    calls = fake_stage("convert")
    (tmp_path / "t.st").write_text("older")
    done = cli("convert", "m", "-o", "t.st")
    assert (done.code, calls) == (5, [])
    assert "--resume" in done.err and "--force" in done.err
    assert cli("convert", "m", "-o", "t.st", "--force").code == 0
    assert calls[0]["force"] is True and calls[0]["resume"] is False


def test_nothing_on_stdin_is_no_stage_that_failed(monkeypatch, fake_stage, capfd) -> None:
    calls = fake_stage("spec_decode")
    with open("/dev/null") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert run(["spec-decode", "--draft", "d.st"]) == 2
    assert calls == [] and "no target" in capfd.readouterr().err


def test_a_dry_run_with_json_is_one_object_on_stdout(cli, fake_stage, tmp_path) -> None:
    fake_stage("convert")
    done = cli("convert", "m", "--dry-run", "--json", "-o", "t.st")
    found = json.loads(done.out)
    assert found == {
        "stage": "convert",
        "checkpoint": None,
        "out": str(tmp_path / "t.st"),
        "parameters": 12345,
    }
    assert "12345" not in done.err


def test_dry_run_plans_and_writes_nothing(cli, fake_stage, tmp_path) -> None:
    calls = fake_stage("convert")
    done = cli("convert", "m", "--dry-run", "-o", "t.st")
    assert (done.code, done.out) == (0, "")
    assert "12,345" in done.err and str(tmp_path / "t.st") in done.err
    assert [call.get("planned") for call in calls] == [True]
    assert list(tmp_path.iterdir()) == []


def test_quiet_prints_nothing_of_its_own(cli, fake_stage) -> None:
    fake_stage("convert")
    assert cli("convert", "m", "-q").err == "noise of a C library\n"


def test_no_arguments_is_a_usage_error_with_the_help_on_stderr(cli) -> None:
    done = cli()
    assert (done.code, done.out) == (2, "")
    assert "spec-decode" in done.err


def test_a_closed_stdout_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    console.write_out("nobody reads this", writer)
    os.close(writer)


def test_a_result_that_cannot_be_written_to_stdout_is_said_elsewhere() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(errors.ResourceError) as caught:
        console.write_out("/runs/t.st", descriptor)
    os.close(descriptor)
    assert "/runs/t.st" in caught.value.hint


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/Llama-3-8B@main", "Llama-3-8B"),
        ("/x/t.st", "t"),
        ("runs/a-convert/", "a-convert"),
        ("m.Q4.gguf", "m.Q4"),
    ],
)
def test_default_output(model, name) -> None:
    assert default_out(model, "distill") == Path(f"runs/{name}-distill")


def test_inspect_and_recipe_content_goes_to_stdout(cli) -> None:
    listed = cli("recipe", "list")
    assert listed.code == 0 and "quickstart" in listed.out
    shown = cli("recipe", "show", "quickstart").out
    assert re.search(r"fail_under: \[agreement.*\]  # recipe", shown)
    assert json.loads(cli("recipe", "schema").out)["title"] == "mambactl recipe"
