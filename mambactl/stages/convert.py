"""`convert`: attention layers of a checkpoint become Mamba mixers; the rest is copied through.

Tensors stream from reader to writer, so memory holds one layer, not the model.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambactl import console
from mambactl.checkpoint.adapters import Adapted
from mambactl.checkpoint.load import empty_model, load_tokenizer, open_strict
from mambactl.checkpoint.provenance import lineage
from mambactl.checkpoint.reader import Reader
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.save import CheckpointWriter, stored_dtype
from mambactl.data.format import encode_rows
from mambactl.data.load import count_rows, load_rows
from mambactl.data.pack import Batch, collate, pack
from mambactl.errors import ModelError, UsageError
from mambactl.models.config import (
    HybridConfig,
    Mamba1Settings,
    Mamba2Settings,
    mamba1_from_attention,
    mamba2_from_attention,
)
from mambactl.models.hybrid import HybridBlock
from mambactl.models.init import initialise
from mambactl.models.layout import kept_attention
from mambactl.recipe import ConvertConfig
from mambactl.stages import StageResult
from mambactl.stages.placement import place
from mambactl.train.calibrate import LayerFit, Streams, attention_weights

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
CALIBRATION_BATCH = 4


def run(
    config: ConvertConfig, source: str, out: Path, *, resume: bool = False, force: bool = False
) -> StageResult:
    """Write the hybrid at `out`; there is nothing to resume, and what is done the CLI handles."""
    # it computes on the CPU, yet a device that does not exist is an error everywhere
    place(config)
    origin = resolve(source)
    reader, adapted = open_strict(origin)
    with reader:
        target = hybrid_config(adapted.config, config)
        replaced = _replaced(adapted.config, target)
        batches = _calibration_batches(config, source)
        shapes = {
            name: (tuple(tensor.shape), _dtype(name, config, reader, adapted))
            for name, tensor in empty_model(target).state_dict().items()
            if not (target.tie_word_embeddings and name == "lm_head.weight")
        }
        writer = CheckpointWriter(out, target, reader.files, None, force, config.max_shard_gb * 1e9)
        fits: dict[int, LayerFit] = {}
        with writer:
            writer.plan(shapes)
            with console.progress("convert", target.num_hidden_layers) as task:
                for name, tensor in _tensors(config, reader, adapted, target, batches, fits, task):
                    writer.write(name, tensor.to(shapes[name][1]))
            metrics = _metrics(replaced, target, fits)
            local = Path(source).expanduser().exists()
            writer.lineage = lineage(
                "convert",
                reader.lineage,
                origin.path if local else source,
                None,
                config.model_dump(mode="json"),
                config.seed,
                metrics,
                origin.path,
            )
    _report(metrics, fits)
    return StageResult(str(out), metrics)


def plan(config: ConvertConfig, source: str) -> dict[str, Any]:
    """Resolve and check everything, write nothing."""
    place(config)
    reader, adapted = open_strict(resolve(source))
    with reader:
        target = hybrid_config(adapted.config, config)
        model = empty_model(target)
        dtype = _dtype("model.embed_tokens.weight", config, reader, adapted)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "layers": target.mixers,
        "replaced": _replaced(adapted.config, target),
        "parameters": parameters,
        "bytes": parameters * dtype.itemsize,
        "init": config.init,
        "documents": count_rows(config.calibrate) if config.calibrate else 0,
    }


def hybrid_config(base: HybridConfig, config: ConvertConfig) -> HybridConfig:
    """The configuration after replacing layers; raises UsageError or ModelError."""
    if "attention" not in base.mixers:
        raise ModelError("this model has no attention layer to replace", "give a Llama or a hybrid")
    if config.calibrate and config.init != "calibrated":
        raise UsageError("--calibrate needs --init calibrated", "drop one of the two")
    kept = kept_attention(base.num_hidden_layers, config.ratio, config.keep_attention)
    mixers = [
        config.mixer if mixer == "attention" and index not in kept else mixer
        for index, mixer in enumerate(base.mixers)
    ]
    settings: dict[str, Mamba1Settings | Mamba2Settings] = {}
    if mixers != base.mixers:
        settings[config.mixer] = _settings(base, config)
    target = base.with_mixers(mixers, **settings)
    if config.dtype != "auto":
        target.dtype = config.dtype
    return target


def _settings(base: HybridConfig, config: ConvertConfig) -> Mamba1Settings | Mamba2Settings:
    """Form of the new mixers; layers of one kind share theirs, or this raises UsageError."""
    wanted = _wanted_settings(base, config)
    if config.mixer not in base.mixers:
        return wanted
    present = base.mamba2_settings if config.mixer == "mamba2" else base.mamba1_settings
    # a bias that is not needed stays zero
    if replace(wanted, proj_bias=wanted.proj_bias or present.proj_bias) != present:
        raise UsageError(
            f"the {config.mixer} layers of this model have another form than "
            f"--init {config.init} gives to new ones",
            "use the --init that made them, or the other --mixer",
        )
    return present


def _wanted_settings(base: HybridConfig, config: ConvertConfig) -> Mamba1Settings | Mamba2Settings:
    calibrated = config.init == "calibrated"
    bias = calibrated or base.attention_bias
    if config.mixer == "mamba2":
        return mamba2_from_attention(base, proj_bias=bias)
    if base.head_dim % 16:
        raise ModelError(
            f"mamba1 needs a head size divisible by 16, this model has {base.head_dim}",
            "use --mixer mamba2",
        )
    # the public code pairs 16-channel groups; whole heads keep each query with its own key
    return mamba1_from_attention(base, base.head_dim if calibrated else 16, proj_bias=bias)


def _replaced(base: HybridConfig, target: HybridConfig) -> list[int]:
    pairs = zip(base.mixers, target.mixers, strict=True)
    return [index for index, (old, new) in enumerate(pairs) if old != new]


def _dtype(name: str, config: ConvertConfig, reader: Reader, adapted: Adapted) -> torch.dtype:
    """Type on disk: the source's own for a copied tensor, its embedding's for a new one."""
    if config.dtype != "auto":
        return stored_dtype(name, getattr(torch, config.dtype))
    known = name if name in adapted.names else "model.embed_tokens.weight"
    return stored_dtype(name, reader.dtype(adapted.names[known]))


def _calibration_batches(config: ConvertConfig, source: str) -> list[Batch]:
    if not config.calibrate:
        return []
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    # twice what is used: rows that packing fills badly are left out
    budget = 2 * config.calibrate_tokens
    examples = encode_rows(
        load_rows(config.calibrate, used_tokens=budget),
        tokenizer,
        max_tokens=budget,
        seed=config.seed,
    )
    rows = pack(examples, config.max_length)
    # rows of full length first, so that a small budget is not spent on padding
    rows = sorted(rows, key=lambda row: -int(row.valid.sum()))
    count = max(1, config.calibrate_tokens // config.max_length)
    order = torch.randperm(min(count, len(rows)), generator=_generator(config.seed)).tolist()
    rows = [rows[index] for index in order]
    return [
        collate(rows[i : i + CALIBRATION_BATCH]) for i in range(0, len(rows), CALIBRATION_BATCH)
    ]


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed)


def _tensors(
    config: ConvertConfig,
    reader: Reader,
    adapted: Adapted,
    target: HybridConfig,
    batches: list[Batch],
    fits: dict[int, LayerFit],
    task: console.Task,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the hybrid, layer by layer; fills `fits` on the way."""
    layers: dict[int, list[str]] = {index: [] for index in range(target.num_hidden_layers)}
    for name in adapted.names:
        match = LAYER.fullmatch(name)
        if match:
            layers[int(match[1])].append(name)
        else:
            yield name, adapted.get(reader, name)
    streams = None
    if batches:
        embedding = adapted.get(reader, "model.embed_tokens.weight")
        # the source's model: what masks its attention needs may not exist in the target
        streams = Streams(empty_model(adapted.config).model, embedding, batches)
        del embedding
    last = max(_replaced(adapted.config, target), default=-1)
    for index, names in layers.items():
        state = {LAYER.fullmatch(name)[2]: adapted.get(reader, name) for name in names}
        if adapted.config.mixers[index] != target.mixers[index]:
            state = _new_layer(config, adapted.config, target, index, state, streams, fits)
        elif streams is not None and index < last:
            streams.keep(_block(adapted.config, index, state).float())
        for name, tensor in state.items():
            yield f"model.layers.{index}.{name}", tensor
        task.advance()


def _block(config: HybridConfig, index: int, state: dict[str, Tensor]) -> HybridBlock:
    """A block around the tensors of `state`, which it does not copy."""
    with torch.device("meta"):
        block = HybridBlock(config, index)
    block.load_state_dict(state, strict=True, assign=True)
    return block.eval().requires_grad_(False)


def _new_layer(
    config: ConvertConfig,
    base: HybridConfig,
    target: HybridConfig,
    index: int,
    state: dict[str, Tensor],
    streams: Streams | None,
    fits: dict[int, LayerFit],
) -> dict[str, Tensor]:
    """The state of a replaced layer: MLP and norms are the tensors of `state`."""
    teacher = _block(base, index, state)
    if streams is not None:
        teacher = teacher.float()
    with torch.device("meta"):
        student = HybridBlock(target, index).eval().requires_grad_(False)
    student.mixer.to_empty(device="cpu")
    kept = {k: v for k, v in teacher.state_dict().items() if not k.startswith("self_attn.")}
    student.load_state_dict(kept, strict=False, assign=True)
    initialise(
        student.mixer, attention_weights(teacher), config.init, _generator(config.seed, index)
    )
    if streams is not None:
        fits[index] = streams.replace(teacher, student)
    return {name: state.get(name, tensor) for name, tensor in student.state_dict().items()}


def _metrics(
    replaced: list[int], target: HybridConfig, fits: dict[int, LayerFit]
) -> dict[str, Any]:
    kept = [index for index, mixer in enumerate(target.mixers) if mixer == "attention"]
    metrics: dict[str, Any] = {"replaced_layers": replaced, "attention_layers": kept}
    if fits:
        after = [fit.after_refit for fit in fits.values()]
        metrics["calibration_error"] = round(sum(after) / len(after), 4)
    return metrics


def _report(metrics: dict[str, Any], fits: dict[int, LayerFit]) -> None:
    console.log(
        f"replaced {len(metrics['replaced_layers'])} attention layers, "
        f"kept {metrics['attention_layers'] or 'none'}"
    )
    if not fits:
        return
    rows = [
        (
            index,
            f"{fit.before_refit:.3f}",
            f"{fit.after_refit:.3f}",
            "-" if fit.ridge is None else f"{fit.ridge:g}",
            " ".join("inf" if h >= 1e4 else f"{h:g}" for h in fit.half_lives),
        )
        for index, fit in fits.items()
    ]
    columns = ("layer", "error", "after refit", "ridge", "half-life per head (tokens)")
    console.table(
        "held-out error of each mixer's output (1 = no better than the mean)", columns, rows
    )
