"""Help of every command: complete, fast, with flags that do not change."""

import re
import resource

import pytest
from fixtures.command_line import flags_in

from mambactl.cli.headings import COMMAND_GROUPS, COMMON, ORDER, heading_of, named_options
from mambactl.cli.parameters import parameters_of
from mambactl.commands import COMMANDS

HEAVY = ("torch", "transformers", "datasets", "numpy", "rich")

EVERY_STAGE = (
    "--seed --device --dtype --trust-remote-code --recipe --set --dry-run --json --quiet "
    "--verbose --help"
)
OUTPUT = "--out --resume --force"
ROWS = "--data --max-steps --epochs --batch-size --grad-accum --max-length --max-samples --packing"
ROWS = f"{ROWS} --skip-bad-rows"
HELD_OUT = "--teacher-cache --eval-data --eval-every --eval-tokens"
TEXT = "--append-eos"
MIXED = f"{TEXT} --recall-share"
SPREAD = "--nproc --shard"
MAPPED = "--nproc --device-map --max-memory"
STEPS = f"{ROWS} --warmup --grad-clip --log-every --save-every"
TRAINING = f"{STEPS} --teacher --grad-checkpointing --freeze-kept"
SAMPLING = (
    "--max-new-tokens --ignore-eos --temperature --top-k --top-p --draft --ngram --k --batch-size "
    "--chat --prompt --prompts --weights"
)
TOKENS = "--max-new-tokens --ignore-eos --temperature --top-k --top-p --draft --ngram --k --weights"
FLAGS = {
    "convert": f"--ratio --form --by --keep-attention --keep-heads --select --select-data {MAPPED} "
    "--select-tokens --select-recall --kv-budget --mixers-from --mixer --window --sinks --rotary "
    f"--init --calibrate --calibrate-tokens --max-length --max-shard-gb {OUTPUT} {EVERY_STAGE}",
    "distill": f"{TRAINING} {MIXED} {SPREAD} --log-to --compile --stages --align-steps "
    "--align-share --align-lr --stepwise-steps --stepwise-groups --stepwise-order "
    "--stepwise-rest-lr --lr --rest-lr --schedule --kl-weight --ce-weight --temperature "
    "--divergence --jsd-beta --capture --random-window --eval-recall --eval-recall-rows "
    "--keep-best --onpolicy-steps --onpolicy-share --onpolicy-tokens --onpolicy-temperature "
    "--onpolicy-divergence "
    f"{HELD_OUT} {OUTPUT} {EVERY_STAGE}",
    "sft": f"{TRAINING} {TEXT} {SPREAD} {HELD_OUT} --lr --ce-weight --kl-weight "
    f"--assistant-only-loss --lora --lora-alpha --log-to --compile {OUTPUT} {EVERY_STAGE}",
    "dpo": f"{TRAINING} {SPREAD} --log-to --lr --beta --reference --precompute-reference "
    "--loss-type --loss-weights --label-smoothing --ld-alpha --f-divergence --sft-weight --chat "
    f"--eval-data --eval-share --eval-every --eval-pairs --max-kl {OUTPUT} {EVERY_STAGE}",
    "draft": f"{STEPS} --kind --layers --vocabulary --unroll --text --answer-tokens "
    "--answer-temperature --answer-uses --lr --output-lr --schedule --kl-weight --ce-weight "
    "--eval-data --eval-every --eval-tokens "
    f"{OUTPUT} {EVERY_STAGE}",
    "teacher-cache": f"{ROWS} {MIXED} {MAPPED} --samples --temperature --power "
    f"--assistant-only-loss {OUTPUT} {EVERY_STAGE}",
    "eval": f"--teacher {MAPPED} --data --tasks --limit --max-length --batch-size --fail-under "
    "--recall --recall-rows --control --control-window --control-sinks --ablate --against "
    "--confidence --bootstrap --save-samples --per-layer --needle --needle-depths --needle-texts "
    "--needle-text --needle-scoring --needle-plot --long-context-data --position-length "
    "--position-rows --compare --report --preferences --task-dir --num-fewshot --weights "
    "--fewshot-seed --apply-chat-template --fewshot-as-multiturn --system-instruction "
    "--task-max-length --cache-requests --use-cache --log-samples --output-path "
    "--generation-agreement --generation-tokens "
    f"{EVERY_STAGE}",
    "spec-decode": f"--target {SAMPLING} --check {EVERY_STAGE}",
    "generate": f"{SAMPLING} --dataset --max-samples --samples-per-prompt --shard {MAPPED} "
    "--format --prefix-cache --prefix-cache-gb "
    f"--category-temperature --generator --keep-unfinished --skip-bad-rows {OUTPUT} {EVERY_STAGE}",
    "chat": f"{TOKENS} --system {EVERY_STAGE}",
    "serve": "--host --port --name --draft --k --ignore-eos --batch-size --max-length --keep-gb "
    f"--max-queue --max-body --read-timeout --grace --weights {EVERY_STAGE}",
    "bench": "--input-len --output-len --batch-size --warmup --iters --repeats --same-prompt "
    "--draft --k --baseline --min-speedup --synthetic --acceptance --training --train-rest "
    f"--compile --capture --report --weights {EVERY_STAGE}",
    "synthetic": f"--max-shard-gb {OUTPUT} {EVERY_STAGE}",
    "export": f"--to --layout --check --max-shard-gb {OUTPUT} {EVERY_STAGE}",
    "push": "--public --dry-run --json --help",
    "inspect": "--input-len --batch-size --k --tensors --lineage --json --help",
    "table": "--into --help",
    "plot": "--out --help",
    "report": "--out --title --help",
    "doctor": "--deep --json --help",
    "docs": "--man --help",
    "recipe plan": "--gpus --memory --set --json --help",
    "recipe run": "--out --from --to --skip --data --held-out --set --trust-remote-code --resume "
    "--force --dry-run --json --quiet --verbose --help",
}


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_frozen(cli, command) -> None:
    shown = cli(*command.split(), "--help").out
    assert sorted(flags_in(shown)) == sorted(FLAGS[command].split())


def test_every_command_shows_a_summary_and_examples(cli) -> None:
    for command in FLAGS:
        usage, summary, *rest = cli(*command.split(), "--help").out.split("\n\n")
        assert usage.startswith(f"Usage: mambactl {command} [OPTIONS]")
        assert summary.endswith("."), command
        row = COMMANDS.get(command)
        if row is None or row.examples:
            assert rest[0].startswith("  Examples:\n    mambactl"), command


def test_the_help_of_the_program_has_groups_and_whole_summaries(cli, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = cli("--help").out
    places = [shown.index(f"\n{heading}:\n") for heading in COMMAND_GROUPS.values()]
    assert places == sorted(places)
    assert shown.count("...") == 1  # of the usage
    assert max(map(len, shown.splitlines())) <= 80
    listed = re.findall(r"^  ([a-z][a-z-]+)  +\S", shown, re.MULTILINE)
    assert sorted(listed) == sorted([*COMMANDS, "recipe", "docs"])


@pytest.mark.parametrize("command", ["convert", "distill", "sft", "dpo", "eval", "bench"])
def test_options_stand_under_headings_and_common_ones_last(cli, command, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = cli(command, "--help").out
    assert max(map(len, shown.splitlines())) <= 80
    headings = re.findall(r"^([A-Z][\w ,]+):$", shown, re.MULTILINE)
    assert headings[0] == "Arguments" and headings[-1] == COMMON
    assert len(headings) >= 5 and headings[1:] == sorted(headings[1:], key=ORDER.index)
    common = shown.partition(f"\n{COMMON}:\n")[2].splitlines()
    # one line each where nothing has to be explained
    assert len(common) <= 10


def test_help_is_as_wide_as_the_terminal(cli, monkeypatch) -> None:
    widths = {}
    for columns in ("80", "140"):
        monkeypatch.setenv("COLUMNS", columns)
        widths[columns] = max(map(len, cli("distill", "--help").out.splitlines()))
    assert widths["80"] <= 80 < widths["140"] <= 140


def test_headings_name_options_that_are_there() -> None:
    options = {name: set(parameters_of(command)) for name, command in COMMANDS.items()}
    known = {"help", "trusted", "as_json"}.union(*options.values())
    known |= {f"{command}.{name}" for command, names in options.items() for name in names}
    assert named_options() <= known
    # the same name means something else where a command says so
    assert heading_of("convert", "max_length") != heading_of("distill", "max_length")


def test_help_is_light_on_imports(python) -> None:
    code = (
        "import sys; from mambactl.cli.main import run; run(sys.argv[1:]);"
        f"sys.exit(', '.join(m for m in {HEAVY} if m in sys.modules) or 0)"
    )
    for command in (
        ["--help"],
        ["bench", "--help"],
        ["recipe", "run", "--help"],
        ["table", "--help"],
        ["report", "--help"],
    ):
        done = python("-c", code, *command)
        assert (done.code, done.err) == (0, ""), command
        assert "Usage: mambactl" in done.out


def test_help_takes_at_most_five_times_the_import_of_typer(python) -> None:
    def seconds(*arguments: str, **env: str) -> float:
        # processor time: what others do on the machine is not ours
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(*arguments, **env).code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    program = ("-m", "mambactl")
    words = {"COMP_WORDS": "mambactl distill --", "COMP_CWORD": "2"}
    limit, *measured = (
        min(times)
        for times in zip(
            *(
                (
                    5 * seconds("-c", "import typer"),
                    seconds(*program, "--help"),
                    seconds(*program, "distill", "--help"),
                    seconds(*program, _MAMBACTL_COMPLETE="complete_bash", **words),
                )
                for _ in range(5)
            ),
            strict=True,
        )
    )
    assert max(measured) < limit
