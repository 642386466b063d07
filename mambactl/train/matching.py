"""TRL's SFT trainer on packed rows, with the KL to a live or cached teacher."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.sft_trainer import SFTTrainer

from mambactl.data.pack import Batch, Row, collate
from mambactl.json_values import JsonObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.present import of_kind, present
from mambactl.ranks import total
from mambactl.train.cached_teacher import TeacherCache
from mambactl.train.lora import plain
from mambactl.train.losses import Losses, SampledTeacher, Teacher, distillation_loss
from mambactl.train.optimization import autocast, last_hidden, next_tokens
from mambactl.train.sharding import add_inner_loss, shard_frozen
from mambactl.train.spread import SpreadTrainer

IGNORED = -100
# of a batch, what a cache holds for it: the fields of a `SampledTeacher`
CACHED = tuple(f"teacher_{name}" for name in SampledTeacher._fields)


class MatchingTrainer(SpreadTrainer, SFTTrainer):
    """Mean over learned tokens of ce_weight * CE + kl_weight * KL(teacher || student).

    The teacher is a model, or comes with the batches of a `cached` collator. Without one the loss
    is TRL's own, scaled. Metrics `train_kl` and `train_ce` are in nats per token.
    """

    def __init__(
        self,
        *args: Any,
        teacher: HybridForCausalLM | None,
        kl_weight: float,
        ce_weight: float,
        amp: torch.dtype | None,
        **kwargs: Any,
    ):
        self.teacher, self.amp = teacher, amp
        self.weights = {"kl_weight": kl_weight, "ce_weight": ce_weight}
        super().__init__(*args, **kwargs)
        add_inner_loss(of_kind(nn.Module, self.model))
        if teacher is not None:
            shard_frozen(teacher)
            add_inner_loss(teacher)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch; see the class."""
        if self.teacher is None and CACHED[0] not in inputs:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            scale = self.weights["ce_weight"]
            return (scale * loss[0], loss[1]) if return_outputs else scale * loss
        loss = self._matched(model, inputs, num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def _matched(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], items: Tensor | int | None
    ) -> Tensor:
        learned = inputs["labels"] != IGNORED
        batch = Batch(
            inputs["input_ids"], inputs.get("seq_idx"), inputs["position_ids"], learned, learned
        )
        with autocast(batch.input_ids.device, self.amp):
            guide = self._guide(batch, inputs)
            losses = model(inner_loss=lambda student: self._losses(plain(student), batch, guide))
        found, kl, ce = total(torch.stack((learned[:, 1:].sum(), losses.kl, losses.ce)))
        found = found.clamp(min=1)
        # they stay on the device until `log`: reading them here would hold back the backward pass
        metrics = self._metrics["train" if present(self.model).training else "eval"]
        metrics["train_kl"].append(kl / found)
        metrics["train_ce"].append(ce / found)
        # gradients are averaged over processes, items are counted in all of them
        return losses.total * self.accelerator.num_processes / (found if items is None else items)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Read the metrics of the steps that are done, and log their means."""
        for values in self._metrics["train" if present(self.model).training else "eval"].values():
            values[:] = map(float, values)
        super().log(logs, start_time)

    def _losses(
        self, student: HybridForCausalLM, batch: Batch, guide: Tensor | SampledTeacher
    ) -> Losses:
        teacher: Teacher | SampledTeacher = (
            Teacher(guide, present(self.teacher).lm_head.weight)
            if isinstance(guide, Tensor)
            else guide
        )
        return distillation_loss(
            last_hidden(student, batch),
            student.lm_head.weight,
            *next_tokens(batch),
            teacher,
            kl_weight=self.weights["kl_weight"],
            ce_weight=self.weights["ce_weight"],
        )

    @torch.no_grad()
    def _guide(self, batch: Batch, inputs: dict[str, Tensor]) -> Tensor | SampledTeacher:
        """Cached samples of the teacher, or its hidden states."""
        if CACHED[0] in inputs:
            return SampledTeacher(*(inputs[name] for name in CACHED))
        return present(self.teacher)(inner_loss=lambda teacher: last_hidden(teacher, batch))


def as_dataset(rows: Sequence[Row]) -> Dataset:
    """Rows as the table that a trainer samples from."""
    columns = zip(Row._fields, zip(*rows, strict=True), strict=True)
    return Dataset.from_dict(dict(columns)).with_format("numpy")


def collate_features(features: Sequence[JsonObject], trim: bool = True) -> dict[str, Tensor]:
    """A batch as keyword arguments of the model, labels -100 where nothing is learned."""
    return _arguments(collate([Row(**feature) for feature in features], trim))


def cached(
    cache: TeacherCache, trim: bool = True
) -> Callable[[Sequence[JsonObject]], dict[str, Tensor]]:
    """`collate_features` with the cached samples of the rows, found by their digests."""

    def looked_up(features: Sequence[JsonObject]) -> dict[str, Tensor]:
        batch = collate([Row(**feature) for feature in features], trim)
        return _arguments(batch) | dict(zip(CACHED, cache.batch(batch), strict=True))

    return looked_up


def _arguments(batch: Batch) -> dict[str, Tensor]:
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "labels": batch.input_ids.masked_fill(~batch.loss_mask, IGNORED),
    }
    return inputs if batch.seq_idx is None else inputs | {"seq_idx": batch.seq_idx}
