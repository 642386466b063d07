"""`bench --training`: steps of mixer alignment and of logits distillation, as `distill` takes them.

A synthetic hybrid learns from the attention model of its shape, of which it has every tensor but
the mixers. With `--baseline teacher` both also learn the text alone, in the same steps: what a
hybrid costs to train against the model it came from.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from mambactl import console
from mambactl.checkpoint.load import load_model
from mambactl.checkpoint.teacher import teacher_of
from mambactl.data.pack import Batch
from mambactl.errors import ResourceError, UsageError
from mambactl.json_values import JsonObject
from mambactl.kernels.dispatch import triton_missing
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.registry import ATTENTION
from mambactl.options import BenchConfig, DistillConfig
from mambactl.present import present
from mambactl.speed.memory import release
from mambactl.speed.shapes import SHAPES, STD, build, materialise
from mambactl.speed.training_speed import (
    Step,
    gradient_error,
    random_batch,
    require_gradients,
    training_speed,
)
from mambactl.train.captured import WARMUP, CapturedObjective, recorder_for
from mambactl.train.compiled import compile_blocks, compiles
from mambactl.train.optimization import (
    AlignmentObjective,
    AnyObjective,
    LogitsObjective,
    build_optimizer,
    mixer_parameters,
    rest_parameters,
)
from mambactl.train.sharing import share_frozen

Pair = tuple[HybridForCausalLM, HybridForCausalLM]
DISTILLED = ("align", "logits")
# learning text alone: the hybrid, and the model it came from
TEXT, TEACHER_TEXT = "text", "teacher's text"


def training_points(
    config: BenchConfig, source: str | None, device: torch.device, dtype: torch.dtype
) -> list[JsonObject]:
    """Measure both stages of every model, at every row length and batch size."""
    if dtype == torch.float16:
        raise UsageError("float16 gradients underflow", "use --dtype bfloat16 or float32")
    points = []
    names = [source] if source is not None else config.synthetic
    with console.progress("training", len(names) * _sizes(config)) as progress:
        for name in names:
            for length in config.input_len:
                for rows in config.batch_size:
                    status = f"{name} {rows} x {length}"
                    found = _measure(config, name, source is None, (rows, length), device, dtype)
                    points += [{"model": name, **point} for point in found]
                    progress.advance(status=status)
    return points


def require_hybrids(config: BenchConfig) -> None:
    """Raise UsageError for a synthetic model without mixers to align, before anything is made."""
    for name in config.synthetic:
        shape = SHAPES[name]()
        if not shape.replaced_layers or shape.num_attention_heads == 1:
            known = [other for other in SHAPES if "hybrid" in other]
            raise UsageError(f"{name} is no hybrid", f"known: {', '.join(known)}")


def _sizes(config: BenchConfig) -> int:
    return len(config.input_len) * len(config.batch_size)


def _measure(
    config: BenchConfig,
    name: str,
    synthetic: bool,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> list[JsonObject]:
    # every size starts from the same weights, and no size pays for the memory of another
    pair = (_synthetic if synthetic else _loaded)(config, name, device, dtype)
    rows, length = size
    batch = random_batch(pair[0].config.vocab_size, rows, length, config.seed)
    share_frozen(*pair, set(_trained(config, pair[0])["logits"]), dtype)
    pair[0].train()
    compiling = compiles(config.compile, device)
    # compiled blocks keep their kernels, so gradients are compared first
    checked = {"align": _shallowest(pair[0]) if synthetic else None, "logits": None}
    errors = {
        stage: _error(config, stage, pair, batch, device, dtype, checked[stage])
        for stage in DISTILLED
    }
    if compiling:
        for model in pair:
            compile_blocks(model)
    about = {
        "compiled": compiling,
        "kernels": "triton" if triton_missing(device) is None else "reference",
    }
    found = []
    for stage, error in errors.items():
        objective = _objective(stage, pair, dtype, compiling)
        point = _timed(config, stage, pair[0], objective, batch, device)
        found.append(point | about | {"gradient_error": error})
    if config.baseline is not None:
        found += [
            _timed(
                config,
                stage,
                model,
                _objective("logits", (model, None), dtype, False),
                batch,
                device,
            )
            | about
            | {"gradient_error": None}
            for stage, model in _alone(pair, device)
        ]
    return found


def _alone(pair: Pair, device: torch.device) -> Iterator[tuple[str, HybridForCausalLM]]:
    """The student, then its teacher in the student's place: fp32 masters, everything trains."""
    student, teacher = pair
    yield TEXT, student
    student.to("meta")
    _forget(teacher, device)
    yield TEACHER_TEXT, teacher.float().train()


def _timed(
    config: BenchConfig,
    stage: str,
    student: HybridForCausalLM,
    objective: AnyObjective,
    batch: Batch,
    device: torch.device,
) -> JsonObject:
    """Speed and memory of one kind of step."""
    rows, length = batch.input_ids.shape
    recorder = recorder_for(device) if config.capture else None
    captures = recorder is not None
    # a recording is made once in the step after these, and no step of it is timed
    warmup = max(config.warmup, WARMUP + 1) if captures else config.warmup
    try:
        if captures and recorder is not None:
            trains = list(_trained(config, student)[stage].values())
            objective = CapturedObjective(objective, trains, recorder, adds=False)
        step = _step(config, stage, student, objective)
        point = training_speed(step, batch, device, warmup, config.iters)
    except torch.OutOfMemoryError as problem:
        raise ResourceError(
            f"{stage} of {rows} rows of {length} tokens does not fit: {problem}",
            "give a smaller --batch-size, or --no-train-rest",
        ) from problem
    captured = isinstance(objective, CapturedObjective) and objective.replays
    del step, objective
    _forget(student, device)
    return point | {"captured": captured}


def _error(
    config: BenchConfig,
    stage: str,
    pair: Pair,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    checked: list[nn.Parameter] | None,
) -> float | None:
    step = _step(config, stage, pair[0], _objective(stage, pair, dtype, compiling=False))
    if checked is not None:
        step = replace(step, parameters=checked)
    error = gradient_error(step, batch, device)
    pair[0].zero_grad(set_to_none=True)
    require_gradients(stage, dtype, error)
    return error


def _shallowest(student: HybridForCausalLM) -> list[nn.Parameter]:
    """The parameters of the mixer whose input the fewest layers have rounded.

    For random weights, which amplify rounding: bf16 products alone move the gradients of 32 layers
    of Llama-3-8B's gain by 5 %, what a wrong kernel may be allowed. All mixers share kernels.
    """
    first = f".layers.{student.config.replaced_layers[0]}."
    return [p for name, p in mixer_parameters(student).items() if first in name]


def _trained(config: BenchConfig, student: HybridForCausalLM) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters that train in each stage, by name."""
    mixers = mixer_parameters(student)
    rest = rest_parameters(student) if config.train_rest else {}
    whole = dict(student.named_parameters()) if config.train_rest else mixers
    return {"align": mixers, "logits": mixers | rest, TEXT: whole, TEACHER_TEXT: whole}


def _objective(
    stage: str,
    pair: tuple[HybridForCausalLM, HybridForCausalLM | None],
    dtype: torch.dtype,
    compiling: bool,
) -> AnyObjective:
    amp = None if dtype == torch.float32 else dtype
    if stage == "align":
        return AlignmentObjective(pair[0], present(pair[1]), amp, compile=compiling)
    return LogitsObjective(*pair, ce_weight=0.0 if pair[1] is not None else 1.0, amp=amp)


def _step(
    config: BenchConfig, stage: str, student: HybridForCausalLM, objective: AnyObjective
) -> Step:
    usual = DistillConfig()
    rates = (usual.align_lr, 0.0) if stage == "align" else (usual.lr, usual.rest_lr)
    trained = _trained(config, student)[stage]
    student.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    mixers = mixer_parameters(student)
    rest = {name: p for name, p in trained.items() if name not in mixers}
    optimizer = build_optimizer([(mixers, rates[0]), (rest, rates[1])])
    parameters = list(trained.values())

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, usual.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Step(stage, objective.count, objective.backward, update, parameters)


def _loaded(config: BenchConfig, source: str, device: torch.device, dtype: torch.dtype) -> Pair:
    student = load_model(source, device)
    teacher = load_model(teacher_of(source, None, "--synthetic"), device, dtype)
    problem = student.config.misfit(teacher.config)
    if problem or not student.config.replaced_layers:
        raise UsageError(
            f"{source} cannot be trained: {problem or 'it has no Mamba layer'}",
            f"first: mambactl convert {source}",
        )
    return student, teacher.requires_grad_(False)


def _synthetic(config: BenchConfig, name: str, device: torch.device, dtype: torch.dtype) -> Pair:
    student = build(name, device, dtype, config.seed)
    shape = student.config.with_mixers([ATTENTION.name] * student.config.num_hidden_layers)
    teacher = materialise(shape, device, dtype, config.seed).requires_grad_(False)
    # as large as `script` makes it: a stream that the blocks drown amplifies rounding (bf16
    # products alone moved gradients by 16 to 26 % through 8 to 32 such layers, and so by 4 to 7 %)
    teacher.model.embed_tokens.weight.div_(STD)
    own = dict(student.named_parameters())
    for key, parameter in teacher.named_parameters():
        if key in own:
            own[key].data = parameter.data.clone()
    return student, teacher


def _forget(student: HybridForCausalLM, device: torch.device) -> None:
    """Drop gradients and the caching allocator's blocks, so that the next peak is its own."""
    student.zero_grad(set_to_none=True)
    release(device)
