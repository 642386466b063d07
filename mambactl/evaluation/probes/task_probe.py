"""`eval --tasks`: scores of lm-evaluation-harness, on its tasks and on files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mambactl import console
from mambactl.evaluation.harness.task_options import TaskNames, TaskOptions, TaskPrompts
from mambactl.evaluation.probes.probe import (
    STUDENT,
    TEACHER,
    Asked,
    Numbers,
    Probe,
    Subject,
    bootstrap_of,
    interval_heading,
)
from mambactl.json_values import JsonObject
from mambactl.metrics import MEAN_DIFFERENCE, exact, signed, span
from mambactl.present import present

if TYPE_CHECKING:
    from mambactl.evaluation.harness.task_metrics import TaskScores
    from mambactl.evaluation.harness.task_plan import TaskPlan
    from mambactl.models.hybrid import HybridForCausalLM

# the student's scores less the teacher's among the results
DIFFERENCES, BY_TASK, MEAN = "task_differences", "by_task", "mean"


@dataclass(frozen=True)
class Scored:
    """Scores from the harness, and the plan that asked for them.

    `theirs` are the teacher's scores, and `differences` the student's from them.
    """

    plan: "TaskPlan"
    scores: "TaskScores"
    theirs: "TaskScores | None" = None
    differences: Numbers = field(default_factory=dict)


class TaskProbe(Probe[TaskOptions, "TaskPlan", Scored]):
    """Scores by task, and the parts of tasks that have any."""

    name, title, group = "tasks", "Tasks", "tasks"
    about = "Lines are 95 % intervals, 1.96 standard errors to each side, where errors are known."
    options = (TaskNames, TaskPrompts)
    example = "--tasks NAME,FILE.jsonl"
    teacher = "welcome"
    alone = True
    packages = ("lm_eval",)

    def asked(self, config: TaskOptions) -> bool:
        """True if there are tasks."""
        return bool(config.tasks)

    def read(self, config: TaskOptions, asked: Asked) -> "TaskPlan":
        """Resolve and check everything about tasks."""
        from mambactl.evaluation.harness.task_plan import read

        return read(config, asked.source)

    def plan(self, inputs: "TaskPlan | None") -> JsonObject:
        """Rows of every task."""
        return {self.name: {} if inputs is None else inputs.rows()}

    def labels(self, inputs: "TaskPlan") -> list[str]:
        """The tasks as they were asked for."""
        return inputs.names

    def known(self, inputs: "TaskPlan", teacher: str | None) -> dict[str, Sequence[str]] | None:
        """Scores of local tasks: only the harness knows those of its own, once it loads them."""
        found = inputs.metrics()
        if found is None:
            return None
        known: dict[str, Sequence[str]] = {**found}
        return known if teacher is None else {**known, self.name: [MEAN_DIFFERENCE.name]}

    def measure(self, config: TaskOptions, inputs: "TaskPlan", subject: Subject) -> Scored:
        """Score the student, and a teacher that is another model on the same documents."""
        from mambactl.evaluation.harness.task_comparison import compare_scores
        from mambactl.evaluation.harness.task_plan import harness_options, score_wanted

        teacher = subject.models.get(TEACHER)

        def scored(name: str, model: "HybridForCausalLM") -> "TaskScores":
            options = harness_options(inputs, config, name, model, compared=teacher is not None)
            return score_wanted(model, subject.tokenizer, inputs.wanted, options, subject.dealer)

        if not subject.dealer.leads:
            return _followed(config, inputs, subject)
        ours = scored(subject.source, subject.model)
        if teacher is None:
            return Scored(inputs, ours)
        theirs = scored(present(subject.teacher_name), teacher)
        found = compare_scores(ours, theirs, inputs.presets, bootstrap_of(config))
        return Scored(inputs, ours, theirs, found)

    def show(self, subject: Subject, found: Scored) -> None:
        """Print the harness's table, those of the presets, and one of student and teacher."""
        from mambactl.evaluation.harness.task_plan import show_presets

        console.log(found.scores.table.rstrip())
        show_presets(found.plan, subject.source, found.scores.metrics)
        if found.differences:
            _show_differences(subject, found.differences)

    def keep(self, kept: Numbers, found: Scored) -> None:
        """Keep scores, and groups of tasks; write the samples where they are asked for.

        The teacher's scores stand beside the student's.
        """
        from mambactl.evaluation.harness.task_plan import write_samples

        kept[self.name] = scores = _with_presets(found.plan, found.scores)
        if found.theirs is not None:
            for name, theirs in _with_presets(found.plan, found.theirs).items():
                if name in scores:
                    scores[name] = {**scores[name], TEACHER: theirs}
            kept[DIFFERENCES] = found.differences
        if found.scores.groups:
            kept["task_groups"] = found.scores.groups
        if found.plan.samples is not None:
            write_samples(found.plan.samples, found.scores.samples)

    def scores(self, kept: Numbers) -> dict[str, dict[str, float]]:
        """Every score of the student, known to the table or not, and the mean difference."""
        found = {
            name: {key: value for key, value in scores.items() if key != TEACHER}
            for name, scores in kept.get(self.name, {}).items()
        }
        mean = kept.get(DIFFERENCES, {}).get(MEAN)
        return found | ({self.name: {MEAN_DIFFERENCE.name: mean["difference"]}} if mean else {})


def _followed(config: TaskOptions, inputs: "TaskPlan", subject: Subject) -> Scored:
    """Answer what the process that scores the models is asked; it alone has the scores."""
    from mambactl.evaluation.harness.answerer import Answerer
    from mambactl.evaluation.harness.task_metrics import TaskScores
    from mambactl.models.hybrid import HybridForCausalLM

    for model in (subject.models.get(name) for name in (STUDENT, TEACHER)):
        # others run code of their own, in one process
        if isinstance(model, HybridForCausalLM):
            tokenizer = subject.tokenizer
            Answerer(model, tokenizer, config.batch_size, subject.dealer).follow()
    return Scored(inputs, TaskScores({}, ""))


def _with_presets(plan: "TaskPlan", scores: "TaskScores") -> dict[str, Numbers]:
    """Scores by task, and by column of every list of the paper that was asked for."""
    from mambactl.evaluation.harness.presets import PRESETS, summary

    found: dict[str, Numbers] = dict(scores.metrics)
    for name in plan.presets:
        numbers = summary(PRESETS[name], scores.metrics)
        found[name] = {key: value for key, value in numbers.items() if value is not None}
    return found


def _show_differences(subject: Subject, found: Numbers) -> None:
    """A line per task, and one of the mean."""
    lines = [(name, one["metric"], *_written(one)) for name, one in found[BY_TASK].items()]
    if MEAN in found:
        lines.append((f"mean of {found[MEAN]['tasks']}", "", *_written(found[MEAN])))
    heading = interval_heading([found])
    columns = ("task", "", STUDENT, TEACHER, "difference", heading)
    console.table(f"tasks of {subject.source} beside {subject.teacher_name}", columns, lines)


def _written(found: Numbers) -> tuple[str, ...]:
    scores = (exact(found[name]) for name in (STUDENT, TEACHER))
    return (*scores, signed(found["difference"]), span(found["interval"], signed) or "-")
