"""`convert --select kl|recall`: choose what keeps attention by measuring; nothing is trained.

KV heads are chosen by what the teacher loses without them (`mambactl.conversion.select_heads`). Of
layers, without aligned mixers each is converted alone inside the source model (fitted in closed
form where there is calibration text). With `--mixers-from` attention is added back to the model of
aligned mixers, best layer first.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambactl import console
from mambactl.checkpoint.load import empty_model, load_model, load_tokenizer
from mambactl.checkpoint.vocabulary import vocabulary_size
from mambactl.conversion.choice import UNITS, Unit
from mambactl.conversion.fit import Streams
from mambactl.conversion.ranking import (
    Instruments,
    Score,
    Step,
    addition_forwards,
    cells,
    criterion_of,
    greedy_addition,
    headings,
    merit,
    score_of,
    swap_scores,
)
from mambactl.conversion.removal import removal_forwards
from mambactl.conversion.replace import Replacement, block_of, generator, new_block
from mambactl.conversion.select_heads import choose_heads, head_probes, package_text
from mambactl.data.format import Rules, encode_rows
from mambactl.data.pack import Batch, Row, collate, pack
from mambactl.data.sources import load_rows
from mambactl.errors import UsageError
from mambactl.evaluation.recall import kv_probe
from mambactl.generation.dealer import Dealer
from mambactl.json_values import JsonObject
from mambactl.models.block import HybridBlock
from mambactl.models.config import HybridConfig
from mambactl.models.device_map import Rooms
from mambactl.models.hybrid import HybridModel
from mambactl.options import ConvertConfig
from mambactl.present import present
from mambactl.ranks import placement, processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 4
# a GPU reads more rows at once, and of single heads no fewer tokens of text
FAST_BATCH = 8
FAST_TOKENS = 8192
# enough to rank layers; those that are replaced in the end are fitted on all of the text
FIT_TOKENS = 2048
RECALL_ROWS = 4

# layer -> its tensors in the source, by their names in a block
Layers = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Texts:
    """Batches for the closed-form fit, and others that choices are measured on."""

    fit: list[Batch]
    held_out: list[Batch]


@dataclass(frozen=True)
class Choice:
    """Units that stay attention, and the measurements behind the choice for the lineage."""

    kept: list[Unit]
    metrics: JsonObject


def read_texts(config: ConvertConfig, source: str) -> Texts:
    """Read `calibrate` and `select_data`; raises UsageError where a selection lacks text."""
    measured = config.select != "uniform"
    if config.by == "head" and measured:
        return _texts_of_heads(config, source)
    held_out = config.select_tokens if measured else 0
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    if config.select_data and measured:
        fit = _rows(config, source, tokenizer, config.calibrate, config.calibrate_tokens)
        return Texts(
            _batches(fit), _batches(_rows(config, source, tokenizer, config.select_data, held_out))
        )
    rows = _rows(config, source, tokenizer, config.calibrate, config.calibrate_tokens + held_out)
    # of little text, a quarter is held out
    count = min(-(-held_out // config.max_length), len(rows) // 4) if held_out else 0
    if held_out and not count:
        raise UsageError(
            f"the calibration text fills {len(rows)} rows of {config.max_length} tokens, too few "
            "to hold some out",
            "give more text, a smaller --max-length, or --select-data",
        )
    return Texts(_batches(rows[count:]), _batches(rows[:count]))


def _texts_of_heads(config: ConvertConfig, source: str) -> Texts:
    """Texts for the fit, all of it, and for choosing heads, measured on text of the package.

    A CPU measures on what stands around the needles alone, unless text is given.
    """
    fast = _placement(config)[0].type == "cuda"
    data = config.select_data or (package_text() if fast else [])
    if not (data or config.calibrate):
        return Texts([], [])
    tokens = max(config.select_tokens, FAST_TOKENS) if fast else config.select_tokens
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    fit = _rows(config, source, tokenizer, config.calibrate, config.calibrate_tokens)
    held_out = _rows(config, source, tokenizer, data, tokens)
    return Texts(_batches(fit), _batches(held_out, FAST_BATCH if fast else BATCH))


def _rows(
    config: ConvertConfig,
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    data: Sequence[str],
    tokens: int,
) -> list[Row]:
    if not data:
        return []
    rules = Rules(vocabulary=vocabulary_size(source, config.trust_remote_code))
    # twice what is used: rows that packing fills badly are left out
    budget = 2 * tokens
    examples = encode_rows(
        load_rows(data, used_tokens=budget),
        tokenizer,
        max_tokens=budget,
        seed=config.seed,
        rules=rules,
    )
    rows = pack(examples, config.max_length)
    # rows of full length first, so that a small budget is not spent on padding
    rows = sorted(rows, key=lambda row: -int(row.valid.sum()))
    count = max(1, tokens // config.max_length)
    order = torch.randperm(min(count, len(rows)), generator=generator(config.seed)).tolist()
    return [rows[index] for index in order]


def _batches(rows: Sequence[Row], size: int = BATCH) -> list[Batch]:
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def count_forwards(config: ConvertConfig, base: HybridConfig, keep: int) -> int:
    """Swapped models that the selection runs, each from its layer on (about half of the model)."""
    candidates = len(UNITS[present(config.by)].of(base))
    if config.by == "head":
        return removal_forwards(candidates, keep)
    return addition_forwards(candidates, keep) if config.mixers_from else candidates


def choose(
    config: ConvertConfig,
    source: str,
    replacement: Replacement,
    texts: Texts,
    layers: Layers,
    keep: int,
    unit_bytes: int,
) -> Choice:
    """Measure and choose `keep` units; prints the table and returns what the lineage keeps.

    `unit_bytes` is what one layer or KV head caches of a token. The processes of a run share what
    is measured, and all choose alike.
    """
    dealer = Dealer.of_run()
    instruments = _instruments(config, source, texts, dealer)
    metrics = {
        "select": config.select,
        "tokens": instruments.text_tokens,
        "data_sha256": {
            name: _digest(batches)
            for name, batches in (("fit", texts.fit), ("held_out", texts.held_out))
            if batches
        },
    }
    if instruments.probes:
        metrics["recall_probe"] = ",".join(probe.name for probe in instruments.probes.values())
    with _cores_shared(dealer):
        if config.by == "head":
            chosen, found = choose_heads(config, replacement, instruments, keep, unit_bytes)
        elif config.mixers_from:
            chosen, found = _by_addition(config, replacement, instruments, layers, keep, unit_bytes)
        else:
            chosen, found = _by_swaps(config, replacement, instruments, texts, layers, keep)
        dealer.finish()
    return Choice(chosen, metrics | found)


@contextmanager
def _cores_shared(dealer: Dealer) -> Iterator[None]:
    """Leave the other processes their cores: fits run on the CPU, wherever models are measured."""
    before = torch.get_num_threads()
    share = max(1, (os.cpu_count() or 1) // processes())
    if dealer.shared and share < before:
        torch.set_num_threads(share)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _instruments(config: ConvertConfig, source: str, texts: Texts, dealer: Dealer) -> Instruments:
    device, dtype = _placement(config)
    probes = []
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    if config.by == "head":
        probes = head_probes(config, tokenizer, device)
    elif config.select == "recall":
        probes = [kv_probe(tokenizer, config.select_recall, RECALL_ROWS, config.seed)]
    model = load_model(source, device, dtype, rooms=Rooms.of(config)).requires_grad_(False)
    return Instruments(model, texts.held_out, probes, BATCH, dealer)


def _placement(config: ConvertConfig) -> tuple[torch.device, torch.dtype]:
    # the type on disk does not decide what is computed in
    return placement(config.model_copy(update={"dtype": "auto"}))


def _by_swaps(
    config: ConvertConfig,
    replacement: Replacement,
    instruments: Instruments,
    texts: Texts,
    layers: Layers,
    keep: int,
) -> tuple[list[Unit], JsonObject]:
    teacher = instruments.model
    candidates = replacement.base.attention_layers
    swap = _Fitted(replacement, teacher, _some(texts.fit), layers)
    with console.progress("select", len(candidates)) as task:
        scores = swap_scores(list(teacher.layers), swap, candidates, instruments, task)
    base = 0.0
    if instruments.probes:
        base = present(score_of(list(teacher.layers), instruments).recall_loss)
    # what is lost without a layer's attention: everything, where the model diverges
    lost = {
        index: (math.inf if math.isnan(score.kl) else score.kl, (score.recall_loss or 0.0) - base)
        for index, score in scores.items()
    }
    ranking = _easiest_first(merit(lost, criterion_of(config)))
    kept = sorted(ranking[len(ranking) - keep :])
    console.table(
        "each layer's attention replaced alone, the most missed first",
        ("layer", *headings(scores.values()), "stays"),
        [
            (index, *cells(scores[index]), "yes" if index in kept else "")
            for index in reversed(ranking)
        ],
    )
    found = {"measure": "swap", "ranking": ranking, "scores": _listed(scores)}
    return _units(config, replacement, kept), found


def _by_addition(
    config: ConvertConfig,
    replacement: Replacement,
    instruments: Instruments,
    layers: Layers,
    keep: int,
    unit_bytes: int,
) -> tuple[list[Unit], JsonObject]:
    blocks = list(instruments.model.layers)
    attention = {index: blocks[index] for index in replacement.base.attention_layers}
    stack = [
        _sibling(replacement, block, replacement.layer(index, layers(index)))
        if index in attention
        else block
        for index, block in enumerate(blocks)
    ]
    with console.progress("select", addition_forwards(len(attention), keep)) as task:
        path, alone = greedy_addition(
            stack, attention, keep, criterion_of(config), instruments, task
        )
    added = [step.layer for step in path if step.layer is not None]
    gains = {index: path[0].score.gain(score) for index, score in alone.items()}
    rest = [
        index for index in _easiest_first(merit(gains, criterion_of(config))) if index not in added
    ]
    # with nothing to add nothing is known about the rest
    rest = rest or [index for index in attention if index not in added]
    front = [_point(step, count * unit_bytes) for count, step in enumerate(path)]
    console.table(
        "attention restored layer by layer in the aligned model",
        ("attention layers", "restored", *headings(alone.values()), "KV bytes/token"),
        [
            (
                count,
                "-" if step.layer is None else step.layer,
                *cells(step.score),
                f"{count * unit_bytes:,}",
            )
            for count, step in enumerate(path)
        ],
    )
    found = {
        "measure": "addition",
        "ranking": rest + added[::-1],
        "scores": _listed(alone),
        "front": front,
    }
    return _units(config, replacement, added), found


def _units(config: ConvertConfig, replacement: Replacement, layers: Sequence[int]) -> list[Unit]:
    units = UNITS[present(config.by)].of(replacement.base)
    return [unit for unit in units if unit.layer in layers]


class _Fitted:
    """Blocks with a mixer fitted in the source model, by layer; call it with ascending indices.

    The fit runs on the CPU in fp32, wherever the model that is measured lies.
    """

    def __init__(
        self,
        replacement: Replacement,
        model: HybridModel,
        batches: Sequence[Batch],
        layers: Layers,
    ):
        self.replacement, self.blocks, self.layers = replacement, model.layers, layers
        self.streams: Streams | None = None
        self.reached = 0
        if batches:
            guide = empty_model(replacement.base).model
            embedding = model.embed_tokens.weight.cpu()
            self.streams = Streams(guide, embedding, batches)

    def __call__(self, index: int) -> HybridBlock:
        if self.streams is not None:
            while self.reached < index:
                self._pass(self.reached)
        state = self.replacement.layer(index, self.layers(index), self.streams)
        if self.streams is not None:
            self.streams.student = list(self.streams.teacher)
            self.reached = index + 1
        return _sibling(self.replacement, self.blocks[index], state)

    def _pass(self, index: int) -> None:
        block = block_of(self.replacement.base, index, self.layers(index))
        present(self.streams).keep(block.float())
        self.reached = index + 1


def _sibling(
    replacement: Replacement, block: HybridBlock, state: Mapping[str, Tensor]
) -> HybridBlock:
    """A block with the mixer of `state` that shares everything else with `block`."""
    weight = block.first_norm.weight
    other = new_block(replacement.block_config(block.index), block.index)
    other.own_device, other.back = block.own_device, block.back
    for name, module in block.named_children():
        if name != block.mixer_name:
            setattr(other, name, module)
    prefix = f"{other.mixer_name}."
    mixer = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    other.mixer.load_state_dict(mixer, strict=True, assign=True)
    other.mixer.to(weight.device, weight.dtype)
    return other


def _some(batches: Sequence[Batch]) -> list[Batch]:
    """First batches that together hold `FIT_TOKENS` tokens."""
    taken, tokens = [], 0
    for batch in batches:
        if tokens >= FIT_TOKENS:
            break
        taken.append(batch)
        tokens += int(batch.valid.sum())
    return taken


def _easiest_first(worth: Mapping[int, float]) -> list[int]:
    return sorted(worth, key=lambda index: (worth[index], -index))


def _listed(scores: Mapping[int, Score]) -> list[JsonObject]:
    return [{"layer": index, **score.rounded()} for index, score in scores.items()]


def _point(step: Step, kv_bytes: int) -> JsonObject:
    return {"layer": step.layer, **step.score.rounded(), "kv_bytes_per_token": kv_bytes}


def _digest(batches: Sequence[Batch]) -> str:
    """sha256 of the tokens: sets on the hub have no file to digest."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.input_ids[batch.valid].numpy().tobytes())
    return digest.hexdigest()
