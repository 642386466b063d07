"""Functions of the commands that write: checkpoints, teacher caches, answers, whole recipes."""

from pathlib import Path

import typer

from mambactl import console
from mambactl.api.calls import Spec, make, spec_of
from mambactl.api.signatures import with_options
from mambactl.cli.pipeline import Handling, make_plan, run_plan
from mambactl.cli.processes import Report, RunFailure
from mambactl.errors import UsageError
from mambactl.options import (
    ConvertConfig,
    DistillConfig,
    DpoConfig,
    DraftConfig,
    ExportConfig,
    GenerateConfig,
    SftConfig,
    TeacherCacheConfig,
)
from mambactl.options.measurement import SyntheticConfig
from mambactl.recipes import load_recipe
from mambactl.stage_result import StageResult


@with_options("convert", ConvertConfig)
def convert(
    config: ConvertConfig,
    model: Spec,
    out: Spec | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Write a copy of a checkpoint in which Mamba mixers replace attention, by KV head or layer.

    `model` is a folder, .st file, GGUF, hub id or alias. `out` is a folder or a name that ends in
    .st, by default `runs/<model>-convert`. An output that is there is an error, unless `force`
    replaces it, or `resume` accepts one that was made from the same model with the same options.

    Returns the new checkpoint as `path`, and `metrics` that say what was replaced.

    Raises UsageError for a wrong option, ModelError for a model that cannot be converted,
    OutputError for a place that is taken or cannot be written, and ResourceError for a full disk.

    >>> half = mambactl.convert("llama", "half.st", ratio=0.5)
    >>> half.metrics["kept_heads"]
    '1.0,1.1,2.0,2.1'
    >>> mambactl.convert("llama", "layers.st", form="portable").metrics["replaced_layers"]
    [0, 2]
    >>> mambactl.convert("llama", "half.st", ratio=0.5, resume=True).path == half.path
    True
    """
    return make("convert", config, model, out, resume, force)


@with_options("teacher-cache", TeacherCacheConfig)
def teacher_cache(
    config: TeacherCacheConfig,
    model: Spec,
    out: Spec | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Keep ids that a teacher draws for every token, from which `distill` and `sft` learn.

    `out` is a folder, by default `runs/<model>-teacher-cache`; `resume` and `force` are those of
    `convert`, and `resume` also continues a cache that was stopped.

    Returns the folder as `path`, and its size and entropy as `metrics`.

    Raises UsageError for wrong options or data, ModelError for an unusable model and OutputError
    for a place that is taken or cannot be written.

    >>> cache = mambactl.teacher_cache(
    ...     "llama", "cache", data=["chat.jsonl"], max_steps=2, batch_size=2, max_length=32
    ... )
    >>> learned = mambactl.distill(
    ...     "student.st", "cached.st", data=["chat.jsonl"], teacher_cache="cache",
    ...     stages=["logits"], max_steps=2, batch_size=2, max_length=32,
    ... )
    >>> Path(learned.path).name
    'cached.st'
    """
    return make("teacher-cache", config, model, out, resume, force)


@with_options("distill", DistillConfig)
def distill(
    config: DistillConfig,
    model: Spec,
    out: Spec | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Train the mixers of a converted model to do what the teacher's attention did.

    `out` is by default `runs/<model>-distill`; `resume` and `force` are those of `convert`, and
    `resume` also continues a run that was stopped. `nproc` processes are started as the command
    line starts them, which only the main thread can do.

    Returns the trained checkpoint as `path`, and losses and speed as `metrics`.

    Raises UsageError for wrong options or data, ModelError for an unusable model, OutputError for
    a place that is taken, ResourceError for what this machine has not, and CheckError when the
    loss is no longer finite.

    >>> tuned = mambactl.distill(
    ...     "student.st", "tuned.st", data=["chat.jsonl"], max_steps=4, batch_size=2, max_length=32
    ... )
    >>> {phase: found["steps"] for phase, found in tuned.metrics.items()}
    {'align': 1, 'logits': 3}
    """
    return make("distill", config, model, out, resume, force)


@with_options("sft", SftConfig)
def sft(
    config: SftConfig,
    model: Spec,
    out: Spec | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Fine-tune a model on text or conversations, with distillation from a teacher if asked for.

    Parameters, result and errors are those of `distill`; `out` is by default `runs/<model>-sft`.

    >>> tuned = mambactl.sft(
    ...     "student.st", "sft.st", data=["chat.jsonl"], max_steps=2, batch_size=2, max_length=32
    ... )
    >>> tuned.metrics["sft"]["steps"]
    2
    """
    return make("sft", config, model, out, resume, force)


@with_options("dpo", DpoConfig)
def dpo(
    config: DpoConfig,
    model: Spec,
    out: Spec | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Train a model on preferences: pairs of a chosen and a rejected answer.

    Parameters, result and errors are those of `distill`; `out` is by default `runs/<model>-dpo`.

    >>> tuned = mambactl.dpo(
    ...     "student.st", "dpo.st", data=["preferences.jsonl"], reference="self", max_steps=2,
    ...     batch_size=2, max_length=64,
    ... )
    >>> tuned.metrics["dpo"]["steps"]
    2
    """
    return make("dpo", config, model, out, resume, force)


@with_options("draft", DraftConfig)
def draft(
    config: DraftConfig,
    model: Spec,
    out: Spec | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Train a draft for speculative decoding on a model's own text; the model stays as it is.

    A head, by default, reads the model's last stream, and works in mambactl and with these weights
    alone; a model of some of its layers is a checkpoint like any other. Parameters, result and
    errors are otherwise those of `distill`; `out` is by default `runs/<model>-draft`.

    >>> head = mambactl.draft(
    ...     "student.st", "draft.st", data=["chat.jsonl"], max_steps=2, batch_size=2,
    ...     max_length=48, answer_tokens=8, vocabulary=64,
    ... )
    >>> head.metrics["vocabulary"], head.metrics["head"]["steps"]
    (64, 2)
    """
    return make("draft", config, model, out, resume, force)


@with_options("generate", GenerateConfig)
def generate_dataset(
    config: GenerateConfig,
    model: Spec,
    out: Spec | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Answer every prompt of `dataset` into a file that `sft` and judges read.

    It is `mambactl generate --dataset`. `out` is by default `runs/<model>-generate.jsonl`; `resume`
    and `force` are those of `convert`, and `resume` also continues a run that was stopped. `nproc`
    processes are started as the command line starts them.

    Returns the file as `path`, and counts and speed as `metrics`.

    Raises UsageError for wrong options, data or a missing `dataset`, ModelError for an unusable
    model and OutputError for a place that is taken or cannot be written.

    >>> answers = mambactl.generate_dataset(
    ...     "student.st", "answers.jsonl", dataset=["chat.jsonl"], max_samples=3,
    ...     max_new_tokens=4, keep_unfinished=True,
    ... )
    >>> answers.metrics["answers"]
    3
    """
    if not config.dataset:
        raise UsageError("no dataset", "mambactl.generate answers single prompts")
    return make("generate", config, model, out, resume, force)


@with_options("export", ExportConfig)
def export_model(
    config: ExportConfig,
    model: Spec,
    out: Spec | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Write a checkpoint in the form of another program.

    `out` is a folder, or a file that ends in .gguf for that form, by default
    `runs/<model>-export`; `resume` and `force` are those of `convert`.

    Returns what was written as `path`; `metrics` name the architecture and, if it was compared with
    the original, the difference.

    Raises UsageError for options of another form, ModelError for a model that the form cannot hold,
    OutputError for a place that is taken, ResourceError for a full disk, and CheckError where the
    result computes something else.

    >>> llama = mambactl.export_model("llama", "exported", to="transformers")
    >>> llama.metrics["architecture"]
    'LlamaForCausalLM'
    >>> llama.metrics["difference"]["texts"]
    0
    """
    return make("export", config, model, out, resume, force)


@with_options("synthetic", SyntheticConfig)
def synthetic(
    config: SyntheticConfig,
    model: Spec,
    out: Spec | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Write random weights of a published shape as a checkpoint, to try and to time stages with.

    `model` is the name of a shape, such as `llama3-8b`. `out` is by default
    `runs/<name>-synthetic`; `resume` and `force` are those of `convert`.

    Returns the new checkpoint as `path`, and its size as `metrics`.

    Raises UsageError for a shape that nobody knows, OutputError for a place that is taken or cannot
    be written, ResourceError for a full disk, and ModelError where the tokenizer cannot be fetched.

    >>> made = mambactl.synthetic("tiny", "tiny.st", seed=1)
    >>> made.metrics["shape"]
    'tiny'
    """
    return make("synthetic", config, model, out, resume, force)


def run_recipe(
    recipe: Spec,
    out: Spec | None = None,
    resume: bool = False,
    force: bool = False,
    *,
    settings: list[str] | None = None,
    first: str | None = None,
    last: str | None = None,
    trust_remote_code: bool = False,
) -> StageResult:
    """Run the sections of a recipe in order, one process each, as `mambactl recipe run` does.

    `recipe` is a file or the name of a shipped recipe. `out` is the working folder, by default
    `runs/<recipe>`. `settings` are `section.key=value`; `first` and `last` name sections to start
    and to stop at. `trust_remote_code` allows code that checkpoints ship, where the recipe asks for
    it, which is refused otherwise. `resume` goes on where a run stopped, `force` starts again. Only
    the main thread can start the processes.

    Returns the last checkpoint as `path` (None where there is none), and every section's result as
    `metrics`.

    Raises UsageError for a wrong recipe, OutputError for results of another run, and RunFailure
    (of `mambactl.cli.processes`) with the exit code of a section that failed, after its message
    on stderr.

    >>> made = mambactl.run_recipe("recipe.yaml", "made")
    >>> list(made.metrics)
    ['convert']
    """
    if resume and force:
        raise UsageError("resume and force exclude each other", "give one of them")
    found = load_recipe(spec_of(recipe), settings or ())
    folder = Path(out) if out is not None else Path("runs") / found.name
    loudness = {0: ("-q",), 2: ("-v",)}.get(console.verbosity(), ())
    again = f"mambactl.run_recipe({str(recipe)!r}, {str(folder)!r}, ...)"
    handling = Handling(loudness, resume, force, trusted=trust_remote_code, json=False, again=again)
    plan = make_plan(found, folder, first, last, handling)
    try:
        checkpoint, results = run_plan(plan)
    except typer.Exit as stopped:
        message = f"a section of {found.name} failed"
        hint = "its message is above; resume=True continues after mending"
        raise RunFailure(Report(stopped.exit_code, message, hint, None, False)) from None
    return StageResult(checkpoint, results)
