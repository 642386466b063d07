"""Headings of the help: which options stand together, and in which order the headings come.

An option that is not named here stands under `OWN`, the first heading. `COMMAND.OPTION` is for a
name that means something else in one command.
"""

from collections.abc import Iterable, Mapping

OWN, COMMON = "Options", "Common options"

_NAMES: Mapping[str, Iterable[str]] = {
    OWN: (),
    "What is replaced": (
        "ratio",
        "by",
        "keep_attention",
        "keep_heads",
        "kv_budget",
        "select",
        "select_data",
        "select_tokens",
        "select_recall",
    ),
    "What takes its place": ("form", "mixer", "window", "sinks", "rotary", "mixers_from"),
    "Initial weights": ("init", "calibrate", "calibrate_tokens", "convert.max_length"),
    "Data": (
        "data",
        "max_samples",
        "packing",
        "skip_bad_rows",
        "append_eos",
        "recall_share",
        "random_window",
        "eval.max_length",
        "eval.batch_size",
        "limit",
        "preferences",
        "assistant_only_loss",
        "dpo.chat",
    ),
    "Answers to a data set": (
        "dataset",
        "samples_per_prompt",
        "generate.shard",
        "format",
        "category_temperature",
        "generator",
        "keep_unfinished",
        "generate.max_samples",
        "generate.skip_bad_rows",
    ),
    "Tasks": (
        "tasks",
        "task_dir",
        "num_fewshot",
        "fewshot_seed",
        "apply_chat_template",
        "fewshot_as_multiturn",
        "system_instruction",
        "task_max_length",
        "cache_requests",
        "use_cache",
        "log_samples",
        "output_path",
    ),
    "Recall, needles and long text": (
        "recall",
        "recall_rows",
        "needle",
        "needle_depths",
        "needle_texts",
        "needle_text",
        "needle_scoring",
        "needle_plot",
        "long_context_data",
        "position_length",
        "position_rows",
    ),
    "Comparison": (
        "compare",
        "against",
        "control",
        "control_window",
        "control_sinks",
        "ablate",
        "per_layer",
        "confidence",
        "bootstrap",
        "generation_agreement",
        "generation_tokens",
        "baseline",
    ),
    "Steps": (
        "stages",
        "max_steps",
        "epochs",
        "teacher-cache.batch_size",
        "distill.batch_size",
        "sft.batch_size",
        "dpo.batch_size",
        "draft.batch_size",
        "grad_accum",
        "max_length",
        "align_steps",
        "align_share",
        "stepwise_steps",
        "stepwise_groups",
        "stepwise_order",
        "onpolicy_steps",
        "save_every",
    ),
    "Text that the target writes": (
        "draft.text",
        "answer_tokens",
        "answer_temperature",
        "answer_uses",
    ),
    "Text that the student writes": (
        "onpolicy_share",
        "onpolicy_tokens",
        "onpolicy_temperature",
    ),
    "Learning": (
        "lr",
        "output_lr",
        "rest_lr",
        "align_lr",
        "stepwise_rest_lr",
        "schedule",
        "warmup",
        "grad_clip",
        "freeze_kept",
        "lora",
        "lora_alpha",
    ),
    "Loss": (
        "distill.teacher",
        "sft.teacher",
        "dpo.teacher",
        "teacher_cache",
        "unroll",
        "kl_weight",
        "ce_weight",
        "distill.temperature",
        "divergence",
        "jsd_beta",
        "onpolicy_divergence",
        "beta",
        "reference",
        "precompute_reference",
        "loss_type",
        "loss_weights",
        "label_smoothing",
        "ld_alpha",
        "f_divergence",
        "sft_weight",
    ),
    "Measured while training": (
        "eval_data",
        "eval_share",
        "eval_every",
        "eval_tokens",
        "eval_pairs",
        "eval_recall",
        "eval_recall_rows",
        "keep_best",
        "max_kl",
        "log_every",
        "log_to",
    ),
    "Choice of tokens": (
        "max_new_tokens",
        "ignore_eos",
        "temperature",
        "top_k",
        "top_p",
    ),
    "Draft": ("draft", "ngram", "k", "acceptance"),
    "Rounds": ("bench.warmup", "iters", "repeats", "same_prompt"),
    "Training steps": ("training", "train_rest", "bench.compile", "bench.capture"),
    "Result": ("fail_under", "min_speedup", "report", "save_samples"),
    "Machine": (
        "device",
        "dtype",
        "weights",
        "nproc",
        "device_map",
        "max_memory",
        "shard",
        "compile",
        "capture",
        "grad_checkpointing",
    ),
    "Output": ("out", "resume", "force", "max_shard_gb"),
    COMMON: (
        "recipe",
        "settings",
        "seed",
        "trust_remote_code",
        "dry_run",
        "json",
        "quiet",
        "verbose",
        # as parameters of `recipe run` are called, and of the program itself
        "trusted",
        "as_json",
        "help",
    ),
}
ORDER = tuple(_NAMES)
_HEADINGS = {name: heading for heading, names in _NAMES.items() for name in names}
_NUMBERS = {name: number for number, name in enumerate(_HEADINGS)}
# commands in the help of the program, as their rows name the group
COMMAND_GROUPS = {
    "make": "Make a student",
    "measure": "Measure",
    "use": "Use",
    "look": "Look",
}


def heading_of(command: str, option: str) -> str:
    """The heading under which the help of `command` shows an option."""
    own = _HEADINGS.get(f"{command}.{option}")
    return own or _HEADINGS.get(option, OWN)


def number_of(command: str, option: str) -> int:
    """Sort key of an option within its heading; -1 leaves the options of `OWN` as declared."""
    return _NUMBERS.get(f"{command}.{option}", _NUMBERS.get(option, -1))


def named_options() -> frozenset[str]:
    """All names in the table: options, or `COMMAND.OPTION`."""
    return frozenset(_HEADINGS)
