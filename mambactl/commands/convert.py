"""`convert`: attention of a checkpoint becomes Mamba mixers, by layer or by KV head.

The rest is copied through. Tensors stream from reader to writer, so memory holds one layer, not the
model; only choosing by measurement (`--select kl|recall`) loads the model as a whole.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mambactl import console
from mambactl.checkpoint.adapted import Adapted, in_dtype
from mambactl.checkpoint.load import empty_model, open_strict
from mambactl.checkpoint.ownership import require_replaceable
from mambactl.checkpoint.provenance import lineage
from mambactl.checkpoint.reader import Reader
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.save import CheckpointWriter, stored_dtype
from mambactl.conversion.aligned import Aligned, open_aligned
from mambactl.conversion.choice import RETRIEVAL_DEPTH, UNITS, Unit, Units, kept_by
from mambactl.conversion.fit import LayerFit, Streams
from mambactl.conversion.form import check, describe_form
from mambactl.conversion.replace import Replacement, block_of
from mambactl.conversion.select import Choice, Texts, choose, count_forwards, read_texts
from mambactl.conversion.shipped import Ranking, ranking_of
from mambactl.data.pack import Batch
from mambactl.data.sources import count_rows
from mambactl.errors import ModelError
from mambactl.json_values import JsonObject
from mambactl.models.cache_bytes import cache_bytes
from mambactl.models.config import HybridConfig
from mambactl.options import ConvertConfig
from mambactl.options.fields import flags
from mambactl.present import present
from mambactl.ranks import is_main, placement
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
        work = _work(config, reader, adapted, aligned)
        config = work.config
        # wrong options and a taken place show before minutes of measuring
        target = work.target(work.by_rule())
        require_replaceable(out, force)
        measures = config.calibrate or config.select != "uniform"
        texts = read_texts(config, source) if measures else Texts([], [])
        choice = work.choose(source, texts)
        if not is_main():
            # the first process fits and writes: its cores are those of all
            return StageResult(str(out))
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
    if metrics["replaced_layers"]:
        console.log(describe_form(config, target))
    _report_fits(fits)
    return StageResult(str(out), metrics)


def plan(config: ConvertConfig, source: str) -> JsonObject:
    """Resolve and check everything, write nothing."""
    placement(config)
    reader, adapted = open_strict(resolve(source))
    with reader, open_aligned(config.mixers_from) as aligned:
        work = _work(config, reader, adapted, aligned)
        config = work.config
        target = work.target(work.by_rule())
        model = empty_model(target)
        dtype = work.dtype("model.embed_tokens.weight")
    parameters = sum(p.numel() for p in model.parameters())
    found = {
        "layers": target.mixers,
        "replaced": _replaced(adapted.config, target),
        "parameters": parameters,
        "bytes": parameters * dtype.itemsize,
        "form": config.form,
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


def _work(
    asked: ConvertConfig, reader: Reader, adapted: Adapted, aligned: Aligned | None
) -> "_Work":
    """The work that options ask for; raises UsageError where they contradict each other."""
    config = asked.of_form(adapted.config, aligned and aligned.adapted.config)
    if adapted.config.attention_layers:
        check(asked, config)
    replacement = Replacement(config, adapted.config, aligned)
    return _Work(asked, config, reader, adapted, replacement)


@dataclass(frozen=True)
class _Work:
    """One open source and how its layers are replaced; `config` is what was asked, completed."""

    asked: ConvertConfig
    config: ConvertConfig
    reader: Reader
    adapted: Adapted
    replacement: Replacement

    @property
    def units(self) -> Units:
        """Unit of replacement: layers or KV heads."""
        return UNITS[present(self.config.by)]

    def target(self, kept: Sequence[Unit]) -> HybridConfig:
        """The configuration with attention in `kept`; raises UsageError or ModelError."""
        if not self.adapted.config.attention_layers:
            raise ModelError(
                "this model has no attention layer to replace", "give a Llama or a hybrid"
            )
        return self.replacement.target(kept_by(kept))

    def by_rule(self) -> list[Unit]:
        """Choose what stays attention if nothing is measured, and how much if something is."""
        base = self.adapted.config
        if self._ranking_holds:
            keep = self.units.count(self.config, base, self._kv_itemsize)
            return present(self.ranking).best(self.units.of(base), keep)
        return self.units.chosen(self.config, base, self._kv_itemsize)

    @cached_property
    def ranking(self) -> Ranking | None:
        """Ranking of this model's heads in the package, where heads are chosen and not named."""
        config = self.config
        if config.by != "head" or config.keep_heads is not None or config.select != "uniform":
            return None
        return ranking_of(self.reader, self.adapted)

    @property
    def _ranking_holds(self) -> bool:
        """True if the ranking was measured with the requested window."""
        if self.ranking is None:
            return False
        form = self.ranking.form
        return (form.window, form.sinks) == (self.config.window, self.config.sinks)

    def choose(self, source: str, texts: Texts) -> Choice | None:
        """Choose by a measurement made earlier or now; None where the rule decides."""
        base = self.adapted.config
        if self.config.select == "uniform":
            return self._chosen_before(source)
        keep = self.units.count(self.config, base, self._kv_itemsize)
        size = self.units.size(base, self._kv_itemsize)
        return choose(self.config, source, self.replacement, texts, self.layer, keep, size)

    def _chosen_before(self, source: str) -> Choice | None:
        """Choose by a ranking in the package; suggests a better way where there is none."""
        kept, known = self.by_rule(), self.ranking
        is_open = self.config.by == "head" and self.config.keep_heads is None
        if not is_open or not 0 < len(kept) < len(self.units.of(self.adapted.config)):
            return None
        if self._ranking_holds:
            known = present(known)
            console.log(f"KV heads are chosen by the ranking of {known.model} in the package")
            return Choice(kept, {"select": "shipped", "model": known.model, **known.measured()})
        why = "no ranking of this model's KV heads comes with the package"
        if known is not None:
            why = (
                f"the ranking of {known.model} holds for a window of {known.form.window} tokens "
                f"and {known.form.sinks} sinks"
            )
        words = ["mambactl", "convert", source, *flags(self.asked), "--select", "recall"]
        console.log(
            f"{why}: heads around {RETRIEVAL_DEPTH:.0%} of the depth stay; better, by measuring: "
            f"{shlex.join(words)}"
        )
        return None

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
            present(LAYER.fullmatch(name))[2]: self.adapted.get(self.reader, name)
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


def _window(config: HybridConfig) -> dict[str, int] | list[dict[str, int]] | None:
    """The window of attention beside recurrences; layers with other ones have a list."""
    windows = [asdict(window) for window in config.windows]
    return windows[0] if len(windows) == 1 else windows or None


def _replaced(base: HybridConfig, target: HybridConfig) -> list[int]:
    pairs = zip(base.mixers, target.mixers, strict=True)
    return [index for index, (old, new) in enumerate(pairs) if old != new]


def _heads(base: HybridConfig, target: HybridConfig) -> JsonObject:
    """Describe how many KV heads were replaced, of how many, and which keep attention."""
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
) -> JsonObject:
    kept = target.attention_layers
    metrics: JsonObject = {
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


def _report(metrics: JsonObject) -> None:
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
