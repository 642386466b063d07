"""`convert`: attention of a checkpoint becomes Mamba mixers, by layer or by KV head.

The rest is copied through. Tensors stream from reader to writer, so memory holds one layer, not the
model; only choosing by measurement (`--select kl|recall`) loads the model as a whole.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambactl import console
from mambactl.checkpoint.load import empty_model, open_strict
from mambactl.checkpoint.ownership import require_replaceable
from mambactl.checkpoint.provenance import lineage
from mambactl.checkpoint.reader import Adapted, Reader, in_dtype
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.save import CheckpointWriter, stored_dtype
from mambactl.conversion.aligned import open_aligned
from mambactl.conversion.choice import UNITS, Unit, Units, kept_by
from mambactl.conversion.fit import LayerFit, Streams
from mambactl.conversion.replace import Replacement, block_of, mixer_spec
from mambactl.conversion.select import Choice, Texts, choose, count_forwards, read_texts
from mambactl.data.pack import Batch
from mambactl.data.sources import count_rows
from mambactl.errors import ModelError, UsageError
from mambactl.models.cache_bytes import cache_bytes
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.registry import MIXERS
from mambactl.models.mixers.spec import MixerSpec
from mambactl.options import ConvertConfig
from mambactl.ranks import placement
from mambactl.stage_result import StageResult

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def run(
    config: ConvertConfig, source: str, out: Path, *, resume: bool = False, force: bool = False
) -> StageResult:
    """Write the hybrid at `out`; there is nothing to resume, and what is done the CLI handles."""
    # without a selection it computes on the CPU, yet a missing device is an error everywhere
    placement(config)
    origin = resolve(source)
    reader, adapted = open_strict(origin)
    with reader, open_aligned(config.mixers_from) as aligned:
        work = _Work(config, reader, adapted, Replacement(config, adapted.config, aligned))
        # wrong options and a taken place show before minutes of measuring
        target = work.target(work.by_rule())
        require_replaceable(out, force)
        measures = config.calibrate or config.select != "uniform"
        texts = read_texts(config, source) if measures else Texts([], [])
        choice = work.choose(source, texts)
        if choice is not None:
            target = work.target(choice.kept)
        if not _replaced(adapted.config, target) and aligned is None:
            console.warn(
                f"{source} has no attention left to replace at this ratio: {out} copies it"
            )
        shapes = {
            name: (tuple(tensor.shape), work.dtype(name))
            for name, tensor in empty_model(target).state_dict().items()
            if not (target.tie_word_embeddings and name == "lm_head.weight")
        }
        writer = CheckpointWriter(out, target, reader.files, None, force, config.max_shard_gb * 1e9)
        fits: dict[int, LayerFit] = {}
        with writer:
            writer.plan(shapes)
            with console.progress("convert", target.num_hidden_layers) as task:
                for name, tensor in work.tensors(target, texts.fit, fits, task):
                    writer.write(name, in_dtype(name, tensor, shapes[name][1]))
            metrics = _metrics(config, adapted.config, target, fits, choice)
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
    _report(metrics)
    _report_fits(fits)
    return StageResult(str(out), metrics)


def plan(config: ConvertConfig, source: str) -> dict[str, Any]:
    """Resolve and check everything, write nothing."""
    placement(config)
    reader, adapted = open_strict(resolve(source))
    with reader, open_aligned(config.mixers_from) as aligned:
        work = _Work(config, reader, adapted, Replacement(config, adapted.config, aligned))
        target = work.target(work.by_rule())
        model = empty_model(target)
        dtype = work.dtype("model.embed_tokens.weight")
    parameters = sum(p.numel() for p in model.parameters())
    found = {
        "layers": target.mixers,
        "replaced": _replaced(adapted.config, target),
        "parameters": parameters,
        "bytes": parameters * dtype.itemsize,
        "init": config.init,
        "window": _window(target),
        "rotary": target.rotates,
        "cache": cache_bytes(target, dtype.itemsize),
        "documents": _count(config.calibrate),
    }
    if config.by == "head":
        found |= _heads(adapted.config, target)
    if config.select != "uniform":
        keep = len(work.by_rule())
        # only how many is known before the measurement
        found |= {name: None for name in ("layers", "kept_heads") if name in found}
        found |= {"replaced": len(found["replaced"]), "kept": keep}
        found["selection"] = {
            "select": config.select,
            "forwards": count_forwards(config, adapted.config, keep),
            "documents": _count(config.select_data or config.calibrate),
        }
    return found


def _count(data: list[str]) -> int | None:
    return count_rows(data) if data else 0


@dataclass(frozen=True)
class _Work:
    """One open source and how its layers are replaced."""

    config: ConvertConfig
    reader: Reader
    adapted: Adapted
    replacement: Replacement

    @property
    def units(self) -> Units:
        """What is replaced or stays as one."""
        return UNITS[self.config.by]

    def target(self, kept: Sequence[Unit]) -> HybridConfig:
        """The configuration with attention in `kept`; raises UsageError or ModelError."""
        if not self.adapted.config.attention_layers:
            raise ModelError(
                "this model has no attention layer to replace", "give a Llama or a hybrid"
            )
        _check(self.config)
        return self.replacement.target(kept_by(kept))

    def by_rule(self) -> list[Unit]:
        """What stays attention if nothing is measured, and how much if something is."""
        return self.units.chosen(self.config, self.adapted.config, self._kv_itemsize)

    def choose(self, source: str, texts: Texts) -> Choice | None:
        """What a measurement chooses, or None where the rule decides."""
        if self.config.select == "uniform":
            return None
        base = self.adapted.config
        keep = self.units.count(self.config, base, self._kv_itemsize)
        size = self.units.size(base, self._kv_itemsize)
        return choose(self.config, source, self.replacement, texts, self.layer, keep, size)

    @property
    def _kv_itemsize(self) -> int:
        # a cache has the type of the model
        return self.dtype("model.embed_tokens.weight").itemsize

    def dtype(self, name: str) -> torch.dtype:
        """Type on disk: the source's own for a copied tensor, its embedding's for a new one."""
        if self.config.dtype != "auto":
            return stored_dtype(name, getattr(torch, self.config.dtype))
        names = self.adapted.names
        known = name if name in names else "model.embed_tokens.weight"
        return stored_dtype(name, self.reader.dtype(names[known]))

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """Tensors of the source by layer."""
        found = {index: [] for index in range(self.adapted.config.num_hidden_layers)}
        for name in self.adapted.names:
            if match := LAYER.fullmatch(name):
                found[int(match[1])].append(name)
        return found

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of one layer of the source by their names in a block."""
        return {
            LAYER.fullmatch(name)[2]: self.adapted.get(self.reader, name)
            for name in self.names[index]
        }

    def tensors(
        self,
        target: HybridConfig,
        batches: list[Batch],
        fits: dict[int, LayerFit],
        task: console.Task,
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the hybrid, layer by layer; fills `fits` on the way."""
        base = self.adapted.config
        for name in self.adapted.names:
            if not LAYER.fullmatch(name):
                yield name, self.adapted.get(self.reader, name)
        streams = None
        if batches:
            embedding = self.adapted.get(self.reader, "model.embed_tokens.weight")
            # the source's model: what masks its attention needs may not exist in the target
            streams = Streams(empty_model(base).model, embedding, batches)
            del embedding
        last = max(_replaced(base, target), default=-1)
        for index in self.names:
            state = self.layer(index)
            if base.mixers[index] != target.mixers[index]:
                kept = target.attention_heads[index]
                state = self.replacement.layer(index, state, streams, fits, kept)
            elif streams is not None and index < last:
                streams.keep(block_of(base, index, state).float())
            for name, tensor in state.items():
                yield f"model.layers.{index}.{name}", tensor
            task.advance()


def _check(config: ConvertConfig) -> None:
    """Raise UsageError for options that contradict each other."""
    _check_choice(config)
    if config.sinks is not None and not config.window_size:
        raise UsageError("--sinks belong to a window", "add --window 64")
    spec = mixer_spec(config.mixer)
    # heads that are replaced have a window too
    windowed = "--by head" if config.by == "head" else "--window"
    if config.window_size and spec.with_window is None:
        raise _not_with(config, windowed, lambda other: other.with_window is not None)
    if config.rotary and not spec.can_rotate:
        raise _not_with(config, "--rotary", lambda other: other.can_rotate)
    if config.window_size and config.init != "calibrated":
        raise UsageError(
            f"{windowed} starts as the attention that it keeps, which --init reference would "
            "disturb",
            "drop one of the two",
        )
    if config.calibrate and config.init != "calibrated":
        raise UsageError("--calibrate needs --init calibrated", "drop one of the two")
    if config.calibrate and config.mixers_from:
        raise UsageError(
            "--calibrate fits new mixers, --mixers-from brings its own",
            "drop one of the two; text to choose layers on is --select-data",
        )
    if config.select == "uniform":
        if config.select_data:
            raise UsageError("--select-data is for --select kl or recall", "add --select kl")
        return
    for name in ("keep_attention", "keep_heads"):
        if getattr(config, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} leaves nothing to select", "drop it, or --select")
    # heads are ranked on generated rows around a text of the package
    if config.by == "layer" and not (config.select_data or config.calibrate):
        raise UsageError(
            f"--select {config.select} measures on text and has none",
            "give --select-data DATA" + ("" if config.mixers_from else " or --calibrate DATA"),
        )


def _check_choice(config: ConvertConfig) -> None:
    """Raise UsageError for a choice of heads where layers are replaced, or of layers for heads."""
    if config.keep_heads is not None and config.by != "head":
        raise UsageError(
            f"--keep-heads chooses KV heads, and --by {config.by} replaces whole layers",
            "add --by head, or give --keep-attention",
        )
    if config.keep_attention is not None and config.by != "layer":
        raise UsageError(
            f"--keep-attention chooses layers, and --by {config.by} replaces KV heads",
            "give --keep-heads LAYER.HEAD,..., or --by layer",
        )


def _not_with(
    config: ConvertConfig, option: str, able: Callable[[MixerSpec[Any]], bool]
) -> UsageError:
    known = [spec.name for spec in MIXERS.values() if able(spec)]
    return UsageError(
        f"{option} does not go with --mixer {config.mixer}", f"use --mixer {known[0]}"
    )


def _window(config: HybridConfig) -> dict[str, int] | None:
    """The window of attention beside recurrences; layers with other ones have a list."""
    windows = [asdict(window) for window in config.windows]
    return windows[0] if len(windows) == 1 else windows or None


def _replaced(base: HybridConfig, target: HybridConfig) -> list[int]:
    pairs = zip(base.mixers, target.mixers, strict=True)
    return [index for index, (old, new) in enumerate(pairs) if old != new]


def _heads(base: HybridConfig, target: HybridConfig) -> dict[str, Any]:
    """How many KV heads were replaced, of how many, and which keep attention."""
    before, after = (
        [f"{index}.{head}" for index, heads in each.attention_heads.items() for head in heads]
        for each in (base, target)
    )
    every = base.num_hidden_layers * base.num_key_value_heads
    return {
        "kv_heads": every,
        "replaced_heads": len(before) - len(after),
        "kept_heads": ",".join(after),
    }


def _metrics(
    config: ConvertConfig,
    base: HybridConfig,
    target: HybridConfig,
    fits: dict[int, LayerFit],
    choice: Choice | None,
) -> dict[str, Any]:
    kept = target.attention_layers
    metrics: dict[str, Any] = {
        "replaced_layers": _replaced(base, target),
        "attention_layers": kept,
    }
    if config.by == "head":
        metrics |= _heads(base, target)
    if window := _window(target):
        metrics["window"] = window
    if target.rotates:
        metrics["rotary"] = True
    if fits:
        after = [fit.after_refit for fit in fits.values()]
        metrics["calibration_error"] = round(sum(after) / len(after), 4)
    if choice is not None:
        metrics["selection"] = choice.metrics
    return metrics


def _report(metrics: dict[str, Any]) -> None:
    if "kept_heads" in metrics:
        console.log(
            f"replaced {metrics['replaced_heads']} of {metrics['kv_heads']} KV heads, "
            f"kept {metrics['kept_heads'] or 'none'}"
        )
        return
    console.log(
        f"replaced {len(metrics['replaced_layers'])} attention layers, "
        f"kept {metrics['attention_layers'] or 'none'}"
    )


def _report_fits(fits: dict[int, LayerFit]) -> None:
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
