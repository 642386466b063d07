"""TRL's DPO trainer on pairs that are tokenised and scored by the reference already.

TRL pads the answers of a batch to one rectangle. Here a batch may travel packed as well: documents
side by side in rows whose recurrent state is reset between them, and the states are put back into
the rectangle before TRL's head sees them. Its padding is always behind a document, where a causal
model sees it from no token of it, so no mask is needed either way.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from mambactl.data.pack import collate, pack_whole
from mambactl.data.preferences import Pair
from mambactl.json_values import JsonObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.present import of_kind
from mambactl.train.sharding import shard_frozen
from mambactl.train.spread import SpreadTrainer

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# what TRL logs for every token, and the entropy whose mean is a sign of collapse
PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1")

# name of a number -> value, or None where it is not time to measure
Measure = Callable[[int], Mapping[str, float] | None]


class PreferenceTrainer(SpreadTrainer, DPOTrainer):
    """DPO on a `preference_dataset`; rows with reference log-probabilities need no reference model.

    `measure(step)` may give numbers that join that step's metrics; training ends with a step
    whose numbers are `enough`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel | None,
        *args: Any,
        measure: Measure | None = None,
        enough: Callable[[Mapping[str, float]], bool] | None = None,
        **kwargs: Any,
    ):
        self.measure, self.enough = measure, enough
        if reference is not None:
            # TRL would split it as one piece, which needs all of it at once
            shard_frozen(reference)
        super().__init__(model, reference, *args, **kwargs)
        for each in (self.model, self.ref_model):
            if isinstance(each, HybridForCausalLM):
                _read_packed(each)
        # TRL rounds logits to the mixed-precision type: of size 20 they would be off by 0.06 nats
        trained = of_kind(PreTrainedModel, self.model)
        del trained.forward
        add_fused_lm_head(trained, cast_lm_head_to_fp32=True, outputs=PER_TOKEN)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the measurements due at this step to its metrics."""
        found = self.measure(self.state.global_step) if self.measure and "loss" in logs else None
        super().log(logs | dict(found or {}), start_time)
        if found and self.enough is not None and self.enough(found):
            self.control.should_training_stop = True

    def _prepare_dataset(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, dataset: Dataset, *_: object
    ) -> Dataset:
        return dataset

    def _precompute_ref_logps(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, dataset: Dataset, *_: object
    ) -> Dataset:
        return dataset


def preference_dataset(
    pairs: Sequence[Pair], reference: Sequence[np.ndarray] | None, tail_weight: float | None
) -> Dataset:
    """Pairs as the table TRL samples from, with the reference's log-probabilities if given.

    `reference` holds those of the tokens of every answer [2 N]. Tokens beyond the length of the
    shorter answer count `tail_weight` times (LD-DPO, arXiv 2409.06411), fully if it is None.
    """
    table = {
        "prompt_ids": [pair.prompt.tolist() for pair in pairs],
        "chosen_ids": [pair.chosen.tolist() for pair in pairs],
        "rejected_ids": [pair.rejected.tolist() for pair in pairs],
    }
    if reference is not None:
        weight = 1.0 if tail_weight is None else tail_weight
        both = [
            [_weighted(one, min(len(chosen), len(rejected)), weight) for one in (chosen, rejected)]
            for chosen, rejected in zip(reference[0::2], reference[1::2], strict=True)
        ]
        table |= dict(zip(REFERENCE_COLUMNS, map(list, zip(*both, strict=True)), strict=True))
    return Dataset.from_dict(table)


def _weighted(logps: np.ndarray, shared: int, weight: float) -> float:
    return float(logps[:shared].sum() + weight * logps[shared:].sum())


class PairCollator:
    """TRL's rectangle of a batch, and with `packing` the rows that the model reads in its place.

    Rows have `width` tokens; `packed_indices` [2 B, T] say where in them each token of the
    rectangle is.
    """

    def __init__(self, pad_token_id: int, width: int, packing: bool):
        self.width, self.packing = width, packing
        self._padded = DataCollatorForPreference(pad_token_id=pad_token_id)

    def __call__(self, features: Sequence[JsonObject]) -> dict[str, Tensor]:
        """[chosen..., rejected...] as TRL has them."""
        batch = self._padded(list(features))
        return batch | self._rows(features, batch["input_ids"].shape) if self.packing else batch

    def _rows(self, features: Sequence[JsonObject], shape: torch.Size) -> dict[str, Tensor]:
        pairs = [
            Pair("", 0, *(np.asarray(one[f"{name}_ids"], np.int32) for name in Pair._fields[2:]))
            for one in features
        ]
        texts = [pair.answers[side] for side in (0, 1) for pair in pairs]
        rows, members = pack_whole(texts, self.width)
        batch = collate(rows)
        length = batch.input_ids.shape[1]
        # padding points anywhere: its gradient is zero, and one index for all would be a queue
        indices = np.arange(shape.numel()).reshape(shape) % batch.input_ids.numel()
        for row, group in enumerate(members):
            start = row * length
            for index in group:
                size = len(texts[index].input_ids)
                indices[index, :size] = np.arange(start, start + size)
                start += size
        found = {
            "packed_ids": batch.input_ids,
            "packed_positions": batch.position_ids,
            "packed_indices": torch.from_numpy(indices),
        }
        # where every row is one document, kernels take their plain causal route
        return found if batch.seq_idx is None else found | {"packed_documents": batch.seq_idx}


def _read_packed(model: HybridForCausalLM) -> None:
    """Let the model's body take TRL's rectangle, read its packed rows, and answer as asked."""
    asked: dict[str, Tensor | None] = {}

    def before(
        body: nn.Module, args: tuple[object, ...], kwargs: JsonObject
    ) -> tuple[tuple[object, ...], JsonObject]:
        kwargs = dict(kwargs)
        kwargs.pop("attention_mask", None)
        rows = kwargs.pop("packed_ids", None)
        positions = kwargs.pop("packed_positions", None)
        documents = kwargs.pop("packed_documents", None)
        asked["indices"] = kwargs.pop("packed_indices", None)
        if rows is not None:
            kwargs["input_ids"] = rows
        if documents is not None:
            kwargs |= {"seq_idx": documents, "position_ids": positions}
        return args, kwargs

    def after(body: nn.Module, args: tuple[object, ...], output: Any) -> Any:
        indices = asked.pop("indices", None)
        if indices is not None:
            states = output.last_hidden_state.flatten(0, 1)
            taken = states.index_select(0, indices.flatten())
            output.last_hidden_state = taken.unflatten(0, indices.shape)  # [2 B, T, D]
        return output

    model.model.register_forward_pre_hook(before, with_kwargs=True)
    model.model.register_forward_hook(after)
