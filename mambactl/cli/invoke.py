"""The commands that run one stage: configuration from four layers, one call, one line on stdout."""

import os
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from mambactl import console
from mambactl.cli import io
from mambactl.cli.parameters import (
    COMMON,
    OUTPUT,
    ROW_OUTPUT,
    BenchModel,
    Compare,
    Model,
    Models,
    OptionalModel,
    Shared,
    Target,
    field_flags,
    with_parameters,
)
from mambactl.cli.processes import launch, of_this_run, shards
from mambactl.commands import STAGES
from mambactl.errors import OutputError, UsageError
from mambactl.options import ROW_WRITER, WRITERS, SpreadConfig, StageConfig
from mambactl.ranks import is_main, launched
from mambactl.recipes import REFERENCE, configure, load_recipe, parse_settings, writes

# the summary above them is the docstring of the stage's configuration
EXAMPLES = {
    "convert": (
        "mambactl convert llama3-8b --ratio 0.5",
        "mambactl convert smollm2-135m -o t.st",
        "mambactl convert smollm2-135m --window 64 -o w.st",
    ),
    "teacher-cache": (
        "mambactl teacher-cache llama3-8b --data chat.jsonl -o cache",
        "mambactl distill student.st --data chat.jsonl --teacher-cache cache --stages logits",
    ),
    "distill": (
        "mambactl distill runs/llama3-8b-convert --data chat.jsonl",
        "mambactl convert llama3-8b | mambactl distill - --data chat.jsonl",
    ),
    "sft": (
        "mambactl sft student.st --data chat.jsonl -o tuned.st",
        "mambactl sft student.st --data chat.jsonl --kl-weight 1",
        "mambactl sft student.st --data chat.jsonl=0.7 --data code.jsonl=0.3 --lora 16",
    ),
    "dpo": (
        "mambactl dpo tuned.st --data preferences.jsonl -o t.st",
        "mambactl dpo tuned.st --data preferences.jsonl --reference self --eval-share 0.1",
    ),
    "eval": (
        "mambactl eval t.st --data held-out.jsonl",
        "mambactl eval a.st b.st --compare --data held-out.jsonl --report compare.html",
        "mambactl eval t.st --tasks arc_easy,hellaswag --limit 200",
        "mambactl eval t.st --data held-out.jsonl --against other.st",
        "mambactl eval t.st --needle 1024,4096,8192 --needle-plot needle.png",
        "mambactl eval t.st --preferences preferences.jsonl",
        "mambactl eval t.st --tasks paper-zeroshot --task-dir sets",
    ),
    "spec-decode": (
        "mambactl spec-decode --draft d.st --target t.st",
        'mambactl spec-decode --draft ngram --target t.st -p "Once upon" --check',
    ),
    "bench": (
        "mambactl bench t.st",
        "mambactl bench t.st --input-len 128,2048 --baseline teacher",
        "mambactl bench --synthetic mamba-2.8b --draft mamba-130m -k 3",
    ),
    "generate": (
        'mambactl generate t.st -p "Why is the sky blue?"',
        "mambactl generate t.st --prompts questions.txt --draft ngram",
        "mambactl generate llama3-8b --dataset prompts.jsonl -o labels.jsonl",
    ),
}


def register(app: typer.Typer) -> None:
    """Add every stage command to the app."""
    for stage, examples in EXAMPLES.items():
        lines = "\n".join(f"  {example}" for example in examples)
        text = f"{STAGES[stage].__doc__}\n\n\b\nExamples:\n{lines}"
        app.command(stage, help=text)(_function(stage))


def _function(stage: str) -> Any:
    def command(**given: Any) -> None:
        run_stage(stage, given)

    model: dict[str, tuple[Any, Any]] = {"model": (Model, ...)}
    if stage == "spec-decode":
        model = {"model": (OptionalModel, None), "target": (Target, None)}
    elif stage == "bench":
        model = {"model": (BenchModel, None)}
    elif stage == "eval":
        model = {"model": (Models, ...), "compare": (Compare, False)}
    output = OUTPUT if stage in WRITERS else ROW_OUTPUT if stage == ROW_WRITER else {}
    with_parameters(command, {**model, **field_flags(STAGES[stage]), **output, **COMMON})
    return command


def run_stage(stage: str, given: dict[str, Any]) -> None:
    """Run one stage from parsed parameters and write its line to stdout."""
    shared = Shared.take(given)
    console.set_verbosity(shared.verbosity if is_main() else console.SILENT)
    if shared.resume and shared.force:
        raise UsageError("--resume and --force exclude each other", "give one of them")
    others = _others(given) if stage == "eval" else []
    model = _model(stage, given)
    flags = {key: value for key, value in given.items() if value not in (None, [])}
    if flags.get("prompt") == "-":
        if model == "-":
            raise UsageError("MODEL and the prompt cannot both be -", "give one of them as text")
        flags["prompt"] = io.read_text("-")
    config = of_this_run(stage, _config(stage, shared, flags))
    source = _source(stage, config, model)
    suffix = writes(stage, config)
    if suffix is None:
        _refuse_output(shared)
        _call(stage, config, source, None, shared, [io.read_model(other) for other in others])
        return
    out = Path(shared.out) if shared.out else io.default_out(source, stage, suffix)
    if made := _made_before(out, stage, config, source, shared):
        console.log(f"{out} is complete, nothing to do")
        content = {"checkpoint": str(out.absolute()), "metrics": made["metrics"]}
        _write(shared, stage, content, None)
        return
    _call(stage, config, source, out, shared)


def _refuse_output(shared: Shared) -> None:
    for flag in ("out", "resume", "force"):
        if getattr(shared, flag):
            raise UsageError(f"--{flag} goes with --dataset", f"drop --{flag}")


def _call(
    stage: str,
    config: StageConfig,
    source: str | None,
    out: Path | None,
    shared: Shared,
    others: Sequence[str] = (),
) -> None:
    spreads = isinstance(config, SpreadConfig) and config.nproc and not launched()
    if spreads and not shared.dry_run:
        with io.guarded_stdout():
            line = launch(config, stage, source, shared.flags(out))
        io.write_out(line)
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with io.guarded_stdout():
        module = import_module(f"mambactl.commands.{stage.replace('-', '_')}")
        if others or getattr(config, "report", None):
            compare = import_module("mambactl.report.compare")
            call, plan = (
                partial(function, command=module) for function in (compare.run, compare.plan)
            )
            source = [source, *others]
        else:
            call, plan = module.run, module.plan
        if shared.dry_run:
            split = {"sharded": shards(config, source)} if spreads else {}
            _show_plan(plan(config, source) | split, out)
            return
        if out is not None:
            again = {"resume": shared.resume, "force": shared.force}
            result = call(config, source, out, **again)
        else:
            result = call(config, source)
        if launched():
            import_module("mambactl.train.distributed").leave()
    checkpoint = result.path
    if checkpoint is not None and (path := Path(checkpoint).expanduser()).exists():
        checkpoint = str(path.absolute())
    _write(shared, stage, {"checkpoint": checkpoint, "metrics": result.metrics}, result.text)


def _write(shared: Shared, stage: str, content: dict[str, Any], text: str | None) -> None:
    if not is_main():
        return
    if shared.json:
        extra = {} if text is None else {"text": text}
        io.write_json({"stage": stage, **content, **extra})
    else:
        io.write_out(content["checkpoint"] if text is None else text)


def _others(given: dict[str, Any]) -> list[str]:
    """Leave the first of the models in `given`, return those it is compared with."""
    models, compare = given["model"], given.pop("compare")
    if compare and len(models) < 2:
        raise UsageError("--compare needs two MODELs or more", "mambactl eval A B --compare")
    if not compare and len(models) > 1:
        raise UsageError(f"{len(models)} MODELs without --compare", "add --compare")
    given["model"], *others = models
    return others


def _model(stage: str, given: dict[str, Any]) -> str | None:
    model, target = given.pop("model"), given.pop("target", None)
    if model is not None and target is not None:
        raise UsageError("MODEL and --target are the same thing", "give one of them")
    if model is not None or target is not None:
        return target if model is None else model
    if stage == "bench":
        return None
    if io.stdin_is_pipe():
        return "-"
    raise UsageError("no target", "mambactl spec-decode --draft DRAFT --target MODEL")


def _source(stage: str, config: StageConfig, model: str | None) -> str | None:
    if not config.needs_model:
        if model is not None:
            raise UsageError(
                "--synthetic, --kernels and --loss work without a MODEL",
                f"drop {model}, or the option",
            )
        return None
    if model is None:
        raise UsageError("no MODEL", f"mambactl {stage} MODEL, or --synthetic NAME")
    return io.read_model(model)


def _config(stage: str, shared: Shared, flags: dict[str, Any]) -> StageConfig:
    section: dict[str, Any] = {}
    if shared.recipe:
        section = load_recipe(shared.recipe).section(stage).values
    config = configure(stage, section, parse_settings(shared.settings), flags)
    for name in REFERENCE.findall(str(section)):
        if f"${{{name}}}" in str(config):
            hint = f"mambactl recipe run {shared.recipe}, or set the option yourself"
            raise UsageError(f"${{{name}}} has a meaning only inside `recipe run`", hint)
    return config


def _made_before(
    out: Path, stage: str, config: StageConfig, source: str, shared: Shared
) -> dict[str, Any] | None:
    """The lineage of `out` if it is what this command would make; OutputError if it is another."""
    # unlike Path.exists this is no error for a name that is too long: resolving it says so
    if shared.force or not os.path.exists(out):
        return None
    if not shared.resume:
        hint = "--resume accepts it as done, --force replaces it, -o writes elsewhere"
        raise OutputError(f"{out} exists", hint)
    with io.guarded_stdout():
        from mambactl.checkpoint.load import load_lineage
        from mambactl.checkpoint.provenance import header_digest
        from mambactl.checkpoint.resolve import resolve
        from mambactl.checkpoint.run_folder import differences

        if stage == ROW_WRITER:
            from mambactl.generation.dataset import read_record

            lineage = read_record(out) or {}
        else:
            lineage = load_lineage(str(out)) or {}
        parent = header_digest(resolve(source).path)
    recipe = lineage.get("recipe", {})
    made = {
        "stage": lineage.get("stage"),
        "parent": lineage.get("parent", {}).get("sha256"),
        **{key: value for key, value in recipe.items() if key not in config.place},
    }
    asked = {
        "stage": stage,
        "parent": parent,
        **config.model_dump(mode="json", exclude=config.place),
    }
    if changed := differences(made, asked):
        message = f"{out} was made differently: {'; '.join(changed)}"
        raise OutputError(message, "--force replaces it, -o writes elsewhere")
    return lineage


def _show_plan(plan: dict[str, Any], out: Path | None) -> None:
    import json

    if out is not None:
        plan = {"out": str(out.absolute()), **plan}
    console.log(json.dumps(plan, indent=2, ensure_ascii=False, default=str), level=0)
