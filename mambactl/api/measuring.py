"""Functions of the commands that measure, and the plan of any command."""

from collections.abc import Callable, Sequence

from mambactl.api.calls import Spec, measure, show_plan
from mambactl.api.signatures import keywords, with_options
from mambactl.commands import stages
from mambactl.errors import UsageError
from mambactl.evaluation.probes import EvalConfig
from mambactl.options import BenchConfig, SpecDecodeConfig, StageConfig
from mambactl.options.evaluation import EvalBase
from mambactl.options.fields import nearest
from mambactl.present import of_kind
from mambactl.stage_result import StageResult

# its probes bring the options, which type checkers therefore do not know
EVAL_OPTIONS: Callable[..., EvalBase] = EvalConfig


@with_options("eval", EVAL_OPTIONS)
def evaluate(config: EvalBase, model: Spec, compare: Sequence[Spec] = ()) -> StageResult:
    """Measure fidelity to a teacher, recall, and task accuracy: `mambactl eval`.

    Models in `compare` are measured in the same way, and all of them put on one page (`report`).

    Returns the numbers as `metrics`: those of the model, or with `compare` a list of all `models`.

    Raises UsageError for wrong options or data, ModelError for an unusable model, and CheckError
    after measuring where a bound of `fail_under` does not hold.

    >>> found = mambactl.evaluate("student.st", data=["chat.jsonl"], limit=4, max_length=32)
    >>> 0 <= found.metrics["fidelity"]["chat"]["agreement"] <= 1
    True
    """
    return measure("eval", config, [model, *compare])


@with_options("spec-decode", SpecDecodeConfig)
def spec_decode(config: SpecDecodeConfig, model: Spec) -> StageResult:
    """Measure speculative decoding against plain decoding of the same prompts.

    `model` is the target, the option `draft` what helps it. Without `prompt` and `prompts` a small
    set of prompts is decoded.

    Returns acceptance, tokens per step and speeds as `metrics`, and a summary as `text`: with
    `prompt` what was written instead.

    Raises UsageError without a draft, ModelError for an unusable model or a draft of another
    vocabulary, and CheckError where `check` finds another token than plain decoding.

    >>> found = mambactl.spec_decode(
    ...     "student.st", draft="ngram", k=3, prompt="the old house", max_new_tokens=8, check=True
    ... )
    >>> found.metrics["identical"]
    True
    """
    return measure("spec-decode", config, [model])


@with_options("bench", BenchConfig)
def bench(config: BenchConfig, model: Spec | None = None) -> StageResult:
    """Measure the speed of reading prompts and of decoding.

    `model` is None where an option names what is measured in its place, such as `synthetic`.

    Returns speeds and memory as `metrics`.

    Raises UsageError for wrong options, ModelError for an unusable model, ResourceError for what
    this machine has not, and CheckError where `min_speedup` is not reached.

    >>> found = mambactl.bench("student.st", input_len=[8], output_len=2, iters=1)
    >>> [(point["input_len"], point["output_len"]) for point in found.metrics["points"]]
    [(8, 2)]
    """
    return measure("bench", config, [model])


def plan(command: str, model: Spec | None = None, **options: object) -> dict[str, object]:
    """Return the plan of a command, the object that `--dry-run` prints, without writing anything.

    Raises what the command itself would raise before it starts.

    >>> mambactl.plan("convert", "llama", ratio=0.75)["kept_heads"]
    '2.0,2.1'
    """
    if command not in (known := stages()):
        raise UsageError(f"{command} is no command with a plan", nearest(command, known))
    return show_plan(command, of_kind(StageConfig, keywords(command, options)), model)
