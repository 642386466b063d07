"""Options of tasks."""

from pydantic import Field

from mambactl.options.evaluation import EvalOptions
from mambactl.options.fields import Names


class TaskNames:
    """Names of the tasks to measure."""

    tasks: Names = Field(
        [], description="harness names, .jsonl files, or paper-zeroshot, paper-fewshot"
    )


class TaskPrompts:
    """Text around the rows of a task in its prompts, and what is kept of the results."""

    task_dir: str | None = Field(None, description="folder of .jsonl sets and harness YAML files")
    num_fewshot: int | None = Field(None, ge=0, description="worked examples in a task's prompts")
    fewshot_seed: int = Field(1234, ge=0, description="which ones are drawn, as in the harness")
    apply_chat_template: bool = Field(False, description="wrap tasks' prompts in the template")
    fewshot_as_multiturn: bool | None = Field(
        None, description="worked examples as chat turns; default: with the template"
    )
    system_instruction: str | None = Field(None, description="what opens tasks' prompts")
    task_max_length: int | None = Field(
        None, ge=16, description="tokens per request of tasks; default: the model's"
    )
    cache_requests: bool = Field(False, description="keep the prompts of tasks for later runs")
    use_cache: str | None = Field(None, description="folder that keeps the model's answers")
    log_samples: bool = Field(False, description="write requests and answers of tasks")
    output_path: str | None = Field(
        None, description="folder for them; default: results/ in a checkpoint folder"
    )


class TaskOptions(TaskNames, TaskPrompts, EvalOptions):
    """Options that scoring tasks reads."""
