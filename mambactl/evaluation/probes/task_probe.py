"""`eval --tasks`: scores of lm-evaluation-harness, on its tasks and on files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mambactl import console
from mambactl.evaluation.harness.task_options import TaskNames, TaskOptions, TaskPrompts
from mambactl.evaluation.probes.probe import Asked, Numbers, Probe, Subject

if TYPE_CHECKING:
    from mambactl.evaluation.harness.scoring import TaskScores
    from mambactl.evaluation.harness.task_plan import TaskPlan


@dataclass(frozen=True)
class Scored:
    """What the harness found, and what was asked of it."""

    plan: "TaskPlan"
    scores: "TaskScores"


class TaskProbe(Probe[TaskOptions, "TaskPlan", Scored]):
    """Scores by task, and the parts of tasks that have any."""

    name, title, group = "tasks", "Tasks", "tasks"
    about = "Lines are 95 % intervals, 1.96 standard errors to each side, where errors are known."
    options = (TaskNames, TaskPrompts)
    example = "--tasks NAME,FILE.jsonl"
    teacher = "unused"
    alone = True

    def asked(self, config: TaskOptions) -> bool:
        """Whether there are tasks."""
        return bool(config.tasks)

    def read(self, config: TaskOptions, asked: Asked) -> "TaskPlan":
        """Resolve and check everything about tasks."""
        from mambactl.evaluation.harness.task_plan import read

        return read(config, asked.source)

    def plan(self, inputs: "TaskPlan | None") -> dict[str, Any]:
        """Rows of every task."""
        return {self.name: {} if inputs is None else inputs.rows()}

    def labels(self, inputs: "TaskPlan") -> list[str]:
        """The tasks as they were asked for."""
        return inputs.names

    def known(self, inputs: "TaskPlan", teacher: str | None) -> dict[str, Sequence[str]] | None:
        """Scores of local tasks: only the harness knows those of its own, once it loads them."""
        return inputs.metrics()

    def measure(self, config: TaskOptions, inputs: "TaskPlan", subject: Subject) -> Scored:
        """Score the student alone."""
        from mambactl.evaluation.harness.task_plan import harness_options, score_wanted

        options = harness_options(inputs, config, subject.source, subject.model)
        scores = score_wanted(subject.model, subject.tokenizer, inputs.wanted, options)
        return Scored(inputs, scores)

    def show(self, subject: Subject, found: Scored) -> None:
        """Print the harness's table and those of the presets."""
        from mambactl.evaluation.harness.task_plan import show_presets

        console.log(found.scores.table.rstrip())
        show_presets(found.plan, subject.source, found.scores.metrics)

    def keep(self, kept: Numbers, found: Scored) -> None:
        """Keep scores, and groups of tasks; write the samples where they are asked for."""
        from mambactl.evaluation.harness.presets import PRESETS, summary
        from mambactl.evaluation.harness.task_plan import write_samples

        scores = dict(found.scores.metrics)
        for name in found.plan.presets:
            numbers = summary(PRESETS[name], found.scores.metrics)
            scores[name] = {key: value for key, value in numbers.items() if value is not None}
        kept[self.name] = scores
        if found.scores.groups:
            kept["task_groups"] = found.scores.groups
        if found.plan.samples is not None:
            write_samples(found.plan.samples, found.scores.samples)

    def scores(self, kept: Numbers) -> dict[str, dict[str, float]]:
        """Every score, known to the table or not."""
        return kept.get(self.name, {})
