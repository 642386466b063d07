"""One validated, frozen configuration per stage; recipes are YAML files made of them.

Field names equal flag names with `_` for `-`. Unknown keys are errors. `recipes.py`
reads the files.
"""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

WEIGHT = re.compile(r"\d+(\.\d*)?|\.\d+")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _split_commas(value: Any) -> Any:
    parts = [value] if isinstance(value, str | int) else value
    if not isinstance(parts, list | tuple):
        return value
    split = [part.split(",") if isinstance(part, str) else [part] for part in parts]
    return [piece.strip() if isinstance(piece, str) else piece for row in split for piece in row]


def _as_number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def split_weight(spec: str) -> tuple[str, float | None]:
    """A data set and its weight in a mixture: `DATA=0.7`, unless a file has that very name."""
    data, equals, number = spec.rpartition("=")
    if not (data and WEIGHT.fullmatch(number)) or os.path.exists(spec):
        return spec, None
    return data, float(number)


Drafts = Annotated[
    Annotated[int, Field(ge=1, le=32)] | Literal["auto"], BeforeValidator(_as_number)
]
BatchSize = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_as_number)]
Compile = bool | Literal["auto"]
DataSpecs = Annotated[list[str], BeforeValidator(_as_list)]
Names = Annotated[list[str], BeforeValidator(_split_commas)]
Integers = Annotated[list[int], BeforeValidator(_split_commas)]
Counts = Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_split_commas)]
Branches = Annotated[
    list[Literal["recurrent", "attention", "window"]], BeforeValidator(_split_commas)
]
Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(_split_commas)
]
Shares = Annotated[list[Annotated[float, Field(gt=0, le=1)]], BeforeValidator(_split_commas)]
DistillPhases = Annotated[
    list[Literal["align", "stepwise", "logits"]], BeforeValidator(_split_commas)
]

Losses = Annotated[
    list[
        Literal[
            "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair",
            "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
        ]
    ],
    BeforeValidator(_split_commas),
]  # fmt: skip
Weights = Annotated[list[Annotated[float, Field(ge=0)]], BeforeValidator(_split_commas)]


class StageConfig(BaseModel):
    """What every stage accepts."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, defer_build=True
    )

    seed: int = Field(0, ge=0, description="one integer for everything random")
    device: str = Field("auto", description="cpu, cuda, cuda:1 or auto")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights in memory; auto is bfloat16 on capable GPUs, else float32"
    )
    trust_remote_code: bool = Field(False, description="allow code that a checkpoint ships")

    @property
    def needs_model(self) -> bool:
        """Whether the stage works on a checkpoint."""
        return True


class ConvertConfig(StageConfig):
    """Attention layers become Mamba mixers; nothing else changes."""

    ratio: float = Field(0.5, ge=0, le=1, description="share of attention layers replaced")
    keep_attention: Integers | None = Field(None, description="layers that stay attention")
    select: Literal["uniform", "kl", "recall"] = Field(
        "uniform", description="how they are chosen: by rule, or measured on text and recall"
    )
    select_data: DataSpecs = Field(
        [], description="text to choose them on; default: held-out rows of --calibrate"
    )
    select_tokens: int = Field(1024, ge=64, description="tokens of text a choice is measured on")
    select_recall: int = Field(1024, ge=64, description="tokens per recall row (--select recall)")
    kv_budget: int | None = Field(
        None, ge=0, description="bytes of keys and values per token, in place of --ratio"
    )
    mixers_from: str | None = Field(
        None, description="take the mixers from this converted and aligned checkpoint"
    )
    mixer: Literal["mamba2", "mamba1"] = Field("mamba2", description="what replaces attention")
    window: int | None = Field(
        None, ge=1, description="keep attention to the last W tokens beside each new mixer"
    )
    sinks: int | None = Field(
        None, ge=0, description="first tokens that the window sees as well; default: 4"
    )
    init: Literal["calibrated", "reference"] = Field(
        "calibrated", description="reference is the paper's Algorithm 1"
    )
    calibrate: DataSpecs = Field([], description="text for the closed-form fit (calibrated init)")
    calibrate_tokens: int = Field(10240, ge=512, description="tokens the fit may use")
    max_length: int = Field(512, ge=16, description="tokens per calibration row")
    max_shard_gb: float = Field(5.0, gt=0, description="largest file of a folder, in 10^9 bytes")


class RowsConfig(StageConfig):
    """Which rows of tokens a stage sees."""

    data: DataSpecs = Field(
        [], description="ID[:config][@split], .jsonl[.gz], .parquet or .txt; DATA=0.7 weighs it"
    )
    max_steps: int = Field(200, ge=1, description="optimiser steps")
    batch_size: int = Field(8, ge=1, description="rows per step, of each process")
    grad_accum: int = Field(1, ge=1, description="batches per optimiser step")
    max_length: int = Field(512, ge=16, description="tokens per row")
    max_samples: int | None = Field(None, ge=1, description="use at most this many documents")
    packing: bool = Field(True, description="fill rows with several documents")
    skip_bad_rows: bool = Field(False, description="go on without rows that cannot be learned")


class MixedRowsConfig(RowsConfig):
    """Rows of text with generated documents among them."""

    recall_share: float = Field(
        0.0, ge=0, le=0.5, description="of the tokens: generated key-value, MQAR and copy documents"
    )


class TrainConfig(RowsConfig):
    """Shared by the stages that follow gradients."""

    teacher: str | None = Field(None, description="default: where the lineage started")
    warmup: int = Field(10, ge=0, description="warm-up steps")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    grad_checkpointing: bool = Field(False, description="recompute activations in backward")
    compile: Compile = Field("auto", description="compile blocks; auto: on CUDA where it can be")
    save_every: int = Field(100, ge=1, description="steps between resumable states")


class HeldOutConfig(TrainConfig):
    """What follows a teacher, or what was kept of one, and is measured on the way."""

    teacher_cache: str | None = Field(
        None, description="what teacher-cache wrote, in place of the teacher when matching logits"
    )
    eval_data: DataSpecs = Field([], description="held-out text, measured while training")
    eval_every: int = Field(100, ge=1, description="steps between measurements of eval_data")
    eval_tokens: int = Field(16384, ge=64, description="tokens of eval_data that are measured")


class TrackedConfig(TrainConfig):
    """What transformers' trainers can report to."""

    log_to: Trackers = Field(
        [], description="tensorboard, wandb, trackio: curves there too, files in OUT.logs"
    )


class AdaptedConfig(TrainConfig):
    """What may train low-rank adapters in place of the weights."""

    lora: int | None = Field(None, ge=1, description="rank of adapters to train, merged at the end")
    lora_alpha: float | None = Field(None, gt=0, description="their scale; default: twice the rank")


def _several(count: int | None) -> int | None:
    return None if count == 1 else count


class SpreadConfig(TrainConfig):
    """Training that several processes share, each with rows of its own."""

    nproc: Annotated[int | None, AfterValidator(_several)] = Field(
        None, ge=1, description="processes, one per GPU; each takes --batch-size rows a step"
    )

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.nproc or 1


class ShardConfig(SpreadConfig):
    """Weights, too, that processes can share."""

    shard: bool | None = Field(
        None, description="split weights over them (FSDP2); default: where a GPU cannot hold all"
    )


class DistillConfig(HeldOutConfig, SpreadConfig, MixedRowsConfig):
    """Align each mixer with the attention it replaces, then match the teacher's logits."""

    stages: DistillPhases = Field(["align", "logits"], description="what runs, in this order")
    align_steps: int | None = Field(None, ge=0, description="of max_steps; default: equal shares")
    align_lr: float = Field(2e-3, gt=0, description="learning rate of mixers while aligning")
    stepwise_steps: int | None = Field(None, ge=0, description="of max_steps, for all groups")
    stepwise_groups: Shares | None = Field(
        None, description="shares of all layers replaced after each group; default: 0.25,0.5,..."
    )
    stepwise_order: Integers | None = Field(
        None, description="replaced layers, easy ones first; default: as selected, else ascending"
    )
    stepwise_rest_lr: float = Field(0.0, ge=0, description="rest_lr while stepwise (0 freezes)")
    lr: float = Field(3e-4, gt=0, description="learning rate of mixers when matching logits")
    rest_lr: float = Field(1e-4, ge=0, description="learning rate of everything else (0 freezes)")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="wsd holds the rate and lowers it over the last 15 % of a phase"
    )
    kl_weight: float = Field(1.0, ge=0, description="weight of the KL to the teacher's logits")
    ce_weight: float = Field(0.0, ge=0, description="weight of the cross entropy on the text")
    temperature: float = Field(1.0, gt=0, description="softens both distributions of the KL")
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        "forward", description="forward is KL(teacher || student)"
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="weight of the teacher in the jsd mixture")
    capture: bool = Field(False, description="replay each training step as one CUDA graph")


class TeacherCacheConfig(MixedRowsConfig):
    """Keep ids that MODEL draws for every token, from which distill learns without it."""

    samples: int = Field(12, ge=1, le=1024, description="ids drawn per token")
    temperature: float = Field(1.0, gt=0, description="softens the distribution to be matched")
    power: float = Field(
        1.0, gt=0, description="draw from its power; weights keep the estimate unbiased"
    )
    assistant_only_loss: bool = Field(
        False, description="for assistant turns only, as sft learns them"
    )

    @property
    def teacher(self) -> None:
        """No other model than MODEL."""
        return None


class SftConfig(HeldOutConfig, TrackedConfig, AdaptedConfig, ShardConfig):
    """Supervised fine-tuning with optional word-level distillation."""

    lr: float = Field(2e-5, gt=0, description="learning rate")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross entropy on the text")
    kl_weight: float = Field(0.0, ge=0, description="weight of the KL to the teacher's logits")
    assistant_only_loss: bool = Field(True, description="train on assistant turns only")


class DpoConfig(TrackedConfig, ShardConfig):
    """Direct preference optimisation."""

    lr: float = Field(5e-7, gt=0, description="learning rate")
    beta: float = Field(0.1, gt=0, description="pull towards the reference policy")
    reference: Literal["teacher", "self"] = Field("teacher", description="the paper's is teacher")
    precompute_reference: bool = Field(
        True, description="ask the reference once, before training, and free it"
    )
    loss_type: Losses = Field(["sigmoid"], min_length=1, description="TRL's names, added up")
    loss_weights: Weights = Field([], description="one per loss type; default: 1 each")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of flipped labels (robust, exo_pair, aot)"
    )
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="weight of what the longer answer has more (LD-DPO)"
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description="pull towards the reference (f-DPO)"
    )
    sft_weight: float = Field(0.0, ge=0, description="weight of the cross entropy on chosen")
    chat: bool = Field(True, description="wrap text in the chat template if there is one")
    eval_data: DataSpecs = Field([], description="held-out preferences, measured by set")
    eval_share: float = Field(
        0.0, ge=0, le=0.5, description="share of the prompts of --data held out instead"
    )
    eval_every: int = Field(100, ge=1, description="steps between measurements of what is held out")
    eval_pairs: int = Field(200, ge=1, description="held-out pairs measured, per set")
    max_kl: float | None = Field(
        None,
        gt=0,
        description="stop at this KL of a held-out set to the reference, per token",
    )


class EvalConfig(StageConfig):
    """Fidelity to a teacher, recall, and task accuracy."""

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


class SamplingConfig(StageConfig):
    """How tokens are chosen."""

    max_new_tokens: int = Field(128, ge=1, description="tokens after the prompt")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="0 is off")
    top_p: float = Field(1.0, gt=0, le=1, description="1 is off")
    draft: str | None = Field(None, description="checkpoint, or ngram")
    k: Drafts = Field("auto", description="draft tokens per step; auto is what is fastest")
    batch_size: int = Field(1, ge=1, description="prompts decoded together")
    chat: bool = Field(True, description="wrap prompts in the chat template if there is one")


class PromptConfig(SamplingConfig):
    """What is continued."""

    prompt: str | None = Field(None, description="text, or - to read it from stdin")
    prompts: str | None = Field(None, description="file: .txt lines, or .jsonl")


class GenerateConfig(PromptConfig):
    """Text from a prompt; with --dataset a file of answers that sft learns from."""

    dataset: DataSpecs = Field(
        [],
        description="answer every row's prompt, turns or messages (but for a last answer) into "
        "--out: ID[:config][@split], .jsonl[.gz], .parquet or .txt",
    )
    max_samples: int | None = Field(None, ge=1, description="use at most this many rows")
    samples_per_prompt: int = Field(1, ge=1, description="answers drawn for each prompt")
    shard: str | None = Field(None, description="I/N: only the I-th of N parts, from 1/N to N/N")
    format: Literal["jsonl", "alpaca-eval", "mt-bench"] = Field(
        "jsonl", description="jsonl is what --data reads, the others what their judges read"
    )
    category_temperature: bool = Field(
        False, description="MT-Bench's own temperature for each category, in place of --temperature"
    )
    generator: str | None = Field(
        None, description="name of the model in alpaca-eval and mt-bench; default: as in MODEL"
    )
    keep_unfinished: bool | None = Field(
        None,
        description="answers cut at --max-new-tokens, and empty ones; default: kept for judges, "
        "left out of jsonl",
    )
    skip_bad_rows: bool = Field(False, description="leave out rows that cannot be answered")


class SpecDecodeConfig(PromptConfig):
    """Speculative decoding measured against plain decoding."""

    check: bool = Field(False, description="fail unless greedy output equals plain decoding")


class BenchConfig(StageConfig):
    """Prefill and decode speed."""

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
    verify: bool = Field(
        False,
        description="also time reading K + 1 tokens with a replay against one token (needs a GPU)",
    )
    training: bool = Field(
        False, description="time steps of mixer alignment and of logits distillation instead"
    )
    train_rest: bool = Field(True, description="--training: in the logits step, not only mixers")
    compile: Compile = Field("auto", description="--training: compile blocks, as distill does")
    capture: bool = Field(False, description="--training: replay each step as one CUDA graph")
    kernels: bool = Field(False, description="no MODEL: the recurrent kernel on its own")
    loss: bool = Field(False, description="no MODEL: the distillation loss through the head")
    tokens: int | None = Field(None, ge=1, description="rows of --loss (8192 on a GPU)")
    hidden: int | None = Field(None, ge=1, description="width of --loss (4096 on a GPU)")
    vocab: int | None = Field(None, ge=2, description="vocabulary of --loss (128256 on a GPU)")

    @property
    def needs_model(self) -> bool:
        """Shapes, kernels and losses come without weights."""
        return not (self.synthetic or self.kernels or self.loss)


STAGES: dict[str, type[StageConfig]] = {
    "convert": ConvertConfig,
    "teacher-cache": TeacherCacheConfig,
    "distill": DistillConfig,
    "sft": SftConfig,
    "dpo": DpoConfig,
    "eval": EvalConfig,
    "spec-decode": SpecDecodeConfig,
    "generate": GenerateConfig,
    "bench": BenchConfig,
}
MODEL_WRITERS = ("convert", "distill", "sft", "dpo")
WRITERS = (*MODEL_WRITERS, "teacher-cache")
# what `generate` writes only with --dataset is a file of rows, no checkpoint
ROW_WRITER = "generate"
ROW_SUFFIXES = {"jsonl": ".jsonl", "alpaca-eval": ".json", "mt-bench": ".jsonl"}
# where a run happens is no part of what it makes
PLACE = {"device", "trust_remote_code", "compile", "capture", "log_to", "shard"}
