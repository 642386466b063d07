"""Options of `eval` and `bench`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from mambactl.options.fields import (
    BatchSize,
    Branches,
    Compile,
    Counts,
    DataSpecs,
    Drafts,
    Names,
    StageConfig,
)


class EvalConfig(StageConfig):
    """Fidelity to a teacher, recall, and task accuracy."""

    on_card: ClassVar[bool] = True

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto",
        description="weights in memory; auto is bfloat16 on capable GPUs, else float32; float64 "
        "(on a CPU) scores alike in any batch",
    )
    teacher: str | None = Field(None, description="default: where the lineage started")
    data: DataSpecs = Field([], description="text or messages for fidelity")
    preferences: Names = Field([], description="pairs for reward accuracy, margin and KL, by set")
    tasks: Names = Field(
        [], description="harness names, .jsonl files, or paper-zeroshot, paper-fewshot"
    )
    limit: int | None = Field(None, ge=1, description="rows per task / documents per data set")
    max_length: int = Field(512, ge=16, description="tokens per row of --data")
    batch_size: BatchSize = Field(
        "auto", description="rows per forward pass; auto fills passes of tasks by tokens"
    )
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
    generation_agreement: str | None = Field(
        None, description="prompts (.txt, .jsonl): compare greedy texts with the teacher's"
    )
    generation_tokens: int = Field(64, ge=1, description="tokens per such text")
    recall: Counts = Field([], description="row lengths of generated recall probes, 1024,4096 say")
    recall_rows: int = Field(8, ge=1, description="rows per recall probe")
    control: Literal["window"] | None = Field(
        None, description="compare with the teacher under a window in the replaced layers"
    )
    control_window: int = Field(64, ge=1, description="tokens that window sees")
    control_sinks: int = Field(4, ge=0, description="first tokens that it sees as well")
    ablate: Branches = Field([], description="also measure with these branches putting out zero")
    against: str | None = Field(
        None, description="another student: paired test of the difference on the same documents"
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="share that an interval holds")
    bootstrap: int = Field(
        1000, ge=0, description="draws of documents behind intervals and tests; 0: none"
    )
    save_samples: bool = Field(False, description="keep numbers per document, and answers")
    per_layer: bool = Field(
        False, description="error of each new mixer against the teacher's attention, on --data"
    )
    needle: Counts = Field([], description="find a sentence in texts of so many tokens, 1024,8192")
    needle_depths: int = Field(10, ge=1, description="places in the text that it stands at")
    needle_text: DataSpecs = Field([], description="that text; default: --data, or the packaged")
    needle_scoring: Literal["generate", "argmax"] = Field(
        "generate", description="greedy answers, or whether the right answer is the likeliest"
    )
    needle_plot: str | None = Field(
        None, description="heat map (PNG); default: in results/ of a checkpoint folder"
    )
    long_context_data: DataSpecs = Field([], description="perplexity by position in long text")
    position_length: int = Field(8192, ge=128, description="tokens per row of it")
    position_rows: int = Field(8, ge=1, description="rows of it, from documents in turn")
    fail_under: Names = Field([], description="METRIC=VALUE; exit 7 when below")
    report: str | None = Field(None, description="also put it all on this page (HTML)")

    @property
    def rows(self) -> int:
        """Rows per forward pass where they cannot be filled by tokens."""
        return 4 if self.batch_size == "auto" else self.batch_size


class BenchConfig(StageConfig):
    """Prefill and decode speed."""

    without_model: ClassVar[Mapping[str, str]] = {"synthetic": "--synthetic NAME"}

    input_len: Counts = Field([128], min_length=1, description="context lengths")
    output_len: int = Field(32, ge=1, description="tokens decoded per measurement")
    batch_size: Counts = Field([1], min_length=1, description="rows decoded together")
    warmup: int = Field(1, ge=0, description="unmeasured rounds")
    iters: int = Field(3, ge=1, description="measured rounds")
    draft: str | None = Field(None, description="decode with it too: checkpoint, ngram or shape")
    k: Drafts = Field("auto", description="draft tokens per step; auto is what is fastest")
    baseline: str | None = Field(None, description="second model; `teacher` is the lineage's")
    min_speedup: float | None = Field(None, description="exit 7 when decode speed-up is below")
    report: str | None = Field(None, description="also put it all on this page (HTML)")
    synthetic: Names = Field([], description="no MODEL: random weights of published shapes")
    acceptance: float = Field(
        0.7, ge=0, le=1, description="share of a synthetic draft's tokens that the target keeps"
    )
    training: bool = Field(
        False, description="time steps of mixer alignment and of logits distillation instead"
    )
    train_rest: bool = Field(True, description="--training: in the logits step, not only mixers")
    compile: Compile = Field("auto", description="--training: compile blocks, as distill does")
    capture: bool = Field(False, description="--training: replay each step as one CUDA graph")
