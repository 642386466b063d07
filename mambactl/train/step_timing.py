"""Speed of a device at the work of a training step, and the activations kept for backward.

Blocks, mixers, the head with its loss and the optimiser run for a moment with random weights of
the real shapes, in the real types, compiled where the run compiles them and, where it replays its
steps, replayed as well: launched one by one they would be timed with the host's share. What they
reach is cached for the process.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor, nn

from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridModel
from mambactl.models.mixers.registry import looks_up
from mambactl.models.mixers.spec import StepContext
from mambactl.present import present
from mambactl.train.captured import WARMUP, recorder_for
from mambactl.train.compiled import compiled
from mambactl.train.ledger import Work, head_cost
from mambactl.train.losses import Teacher, distillation_loss
from mambactl.train.optimization import autocast, build_optimizer

# operations of one probed call on a CPU: a fraction of a second; a GPU takes the whole batch
CPU_BUDGET = 1e10
REPEATS = 3
OPTIMIZED = {"cpu": 1 << 20, "cuda": 1 << 26}
DOCUMENTS_PER_ROW = 4


@dataclass(frozen=True)
class Setup:
    """Device and types of a run: the teacher in `dtype`, the student in fp32 under `amp`.

    `compiles` its blocks; `replays` its steps as CUDA graphs.
    """

    device: torch.device
    dtype: torch.dtype
    amp: torch.dtype | None
    compiles: bool = False
    replays: bool = False


@dataclass
class Measured:
    """Operations per second by (what, how), and bytes kept per token by the same."""

    rates: dict[tuple[str, str], float] = field(default_factory=dict)
    kept: dict[tuple[str, str], float] = field(default_factory=dict)
    seconds_per_parameter: float = 0.0


_cache: dict[tuple, Measured] = {}


def probe(works: Iterable[Work], setup: Setup, rows: int, length: int) -> Measured:
    """Measure every kind of work that occurs in `works` on batches [rows, length]."""
    found = Measured()
    for work in works:
        for what, how in work.pieces(length):
            if how != "repeat" and (what, how) not in found.rates:
                source = present(work.teacher) if how == "infer" else work.student
                measured = _piece(work, source, what, how, setup, rows, length)
                found.rates[what, how] = measured.rates[what, how]
                found.kept |= measured.kept
    found.seconds_per_parameter = _optimizer(setup)
    return found


def _piece(
    work: Work, config: HybridConfig, what: str, how: str, setup: Setup, rows: int, length: int
) -> Measured:
    guide = work.teacher.hidden_size if what == "head" and work.teacher else None
    key = (config.to_json_string(), guide, what, how, work.rest, setup, rows, length)
    key += (work.freeze_kept,)
    if key not in _cache:
        if what == "head":
            _cache[key] = _head(work, setup, rows * length)
        else:
            _cache[key] = _block(config, what, how, setup, rows, length, work.freeze_kept)
    return _cache[key]


def _block(
    config: HybridConfig,
    kind: str,
    how: str,
    setup: Setup,
    rows: int,
    length: int,
    freeze_kept: bool,
) -> Measured:
    """One block (or, to align, one mixer) on its own, with hardly any vocabulary."""
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    single = config.only(config.kinds.index(kind), vocab_size=8, **tokens)
    (alone,) = single.kinds
    full = Work(single, single if how == "infer" else None, (0,), how != "align", how == "align")
    full = replace(full, freeze_kept=freeze_kept)
    per_token = full.pieces(length)[alone, how]
    rows, length = _shape(setup, per_token, rows, length)
    per_token = full.pieces(length)[alone, how]
    with torch.device(setup.device):
        model = HybridModel(single).to(setup.dtype if how == "infer" else torch.float32)
    model.train(how != "infer")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(how != "infer" and not (freeze_kept and looks_up(name)))
    layer = model.layers[0].mixer if how == "align" else model.layers[0]
    run = compiled(layer.forward) if setup.compiles else layer

    def inputs(count: int) -> tuple[Tensor, StepContext]:
        return _inputs(model, setup, count, length, trains=how == "train")

    def forward(hidden: Tensor, context: StepContext) -> Tensor:
        with autocast(setup.device, setup.amp), torch.set_grad_enabled(how != "infer"):
            return run(hidden, context, None)

    def call(given: tuple[Tensor, StepContext]) -> None:
        out = forward(*given)
        if how != "infer":
            torch.autograd.backward(out, torch.ones_like(out))

    given = inputs(rows)
    found = Measured()
    seconds = _timed(lambda: call(given), setup)
    found.rates[kind, how] = rows * length * per_token / seconds
    if how == "infer":
        return found
    if setup.compiles:
        # code is made for one shape: weights and their casts are taken off instead
        kept = _kept(partial(forward, *given), layer) - _casts(layer, setup.amp)
        found.kept[kind, how] = max(0, kept) / (rows * length)
    else:
        # what does not grow with the batch is no activation
        one, two = (_kept(partial(forward, *inputs(count))) for count in (1, 2))
        found.kept[kind, how] = (two - one) / length
    return found


def _casts(layer: nn.Module, amp: torch.dtype | None) -> int:
    """Bytes of a layer's matrices in the mixed-precision type."""
    itemsize = 0 if amp is None else amp.itemsize
    return itemsize * sum(p.numel() for p in layer.parameters() if p.ndim > 1)


def _shape(setup: Setup, per_token: float, rows: int, length: int) -> tuple[int, int]:
    """Rows and length of the part of a batch that the device can afford."""
    if setup.device.type != "cpu":
        return rows, length
    tokens = max(32, int(CPU_BUDGET / per_token))
    return max(1, min(rows, tokens // length)), min(length, tokens)


def _inputs(
    model: HybridModel, setup: Setup, rows: int, length: int, trains: bool
) -> tuple[Tensor, StepContext]:
    """Hidden states in the type they run through the model in, and rows of several documents."""
    weight = model.embed_tokens.weight
    like = {"device": weight.device, "dtype": setup.amp or weight.dtype}
    hidden = torch.randn(rows, length, weight.shape[1], requires_grad=trains, **like)
    positions = torch.arange(length, device=weight.device)
    size = max(1, -(-length // DOCUMENTS_PER_ROW))
    documents = (positions // size).expand(rows, -1).to(torch.int32)
    with torch.no_grad():
        return hidden, model.context(hidden, (positions % size).expand(rows, -1), None, documents)


def _head(work: Work, setup: Setup, tokens: int) -> Measured:
    """The head's part of a step with the logits KL."""
    config = work.student
    # a sparse guess of what a teacher's head costs that is not there
    guided = work.teacher.hidden_size if work.teacher else config.hidden_size
    per_token = head_cost(config) * (3 if work.rest else 2) + 2.0 * guided * config.vocab_size
    tokens, _ = _shape(setup, per_token, tokens, 1)
    hidden = torch.randn(tokens, config.hidden_size, device=setup.device, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.hidden_size, device=setup.device)
    weight = weight.mul_(config.hidden_size**-0.5).requires_grad_(work.rest)
    guide = torch.randn(tokens, guided, device=setup.device, dtype=setup.dtype)
    head = torch.randn(config.vocab_size, guided, device=setup.device, dtype=setup.dtype)
    teacher = Teacher(guide, head * guided**-0.5)
    targets = torch.zeros(tokens, dtype=torch.long, device=setup.device)
    mask = torch.ones(tokens, dtype=torch.bool, device=setup.device)

    def call() -> None:
        with autocast(setup.device, setup.amp):
            loss = distillation_loss(hidden, weight, targets, mask, teacher).total
        loss.backward()

    found = Measured()
    found.rates["head", "train"] = tokens * per_token / _timed(call, setup)
    return found


def _optimizer(setup: Setup) -> float:
    """Seconds per parameter of clipping and AdamW."""
    setup = replace(setup, compiles=False, replays=False)
    key = ("optimizer", setup)
    if key not in _cache:
        size = OPTIMIZED.get(setup.device.type, OPTIMIZED["cuda"])
        parameter = nn.Parameter(torch.zeros(1, size, device=setup.device))
        parameter.grad = torch.ones_like(parameter)
        optimizer = build_optimizer([({"weight": parameter}, 1e-3)])

        def call() -> None:
            nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()

        _cache[key] = Measured(seconds_per_parameter=_timed(call, setup) / size)
    return _cache[key].seconds_per_parameter


def _timed(call: Callable[[], None], setup: Setup) -> float:
    """Median seconds of a call, after one that compiles."""
    recorder = recorder_for(setup.device) if setup.replays else None
    if recorder is not None:
        for _ in range(WARMUP):
            recorder.warm(call)
        call = recorder.record(call).replay
    cuda = setup.device.type == "cuda"
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(setup.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


@dataclass(eq=False)
class _Saved:
    """A tensor for as long as the graph of a forward pass keeps it."""

    tensor: Tensor


def _kept(forward: Callable[[], Tensor], owner: nn.Module | None = None) -> int:
    """Bytes of activations kept for backward by a forward pass, without parameters of `owner`."""
    saved: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        held = _Saved(tensor)
        saved.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        result = forward()
    # counted while the result holds its graph: parts of it that were dropped are gone, and an
    # address is that of one storage only
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (held.tensor.untyped_storage() for held in saved)
    }
    del result
    for parameter in owner.parameters() if owner is not None else ():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())
