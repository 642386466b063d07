"""Models and steps that `sharded` times: made from a seed, each process holding its share."""

import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from mambactl.checkpoint.load import empty_model
from mambactl.data.pack import Batch
from mambactl.errors import CheckError
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.registry import ATTENTION
from mambactl.models.positions import RotaryEmbedding
from mambactl.models.transformers_names import recompute_activations
from mambactl.options import DistillConfig
from mambactl.ranks import (
    add_up,
    join,
    largest,
    leave,
    placement,
    processes,
    rank,
)
from mambactl.speed.memory import peak_bytes, release, reset_peak
from mambactl.speed.shapes import SHAPES, STD, additions, fill
from mambactl.speed.training_speed import random_batch
from mambactl.train.compiled import compile_blocks, compiles
from mambactl.train.consolidate import part, whole
from mambactl.train.loop import _gradients
from mambactl.train.optimization import (
    AlignmentObjective,
    LogitsObjective,
    build_optimizer,
    mixer_parameters,
    rest_parameters,
)
from mambactl.train.sharding import settle, split
from mambactl.train.sharing import Casts, share_frozen
from tests.performance.communication import communication

CHECKED_STEPS = 3
# of losses and weights in fp32, whose sums have another order
LARGEST_ERROR = 1e-4


@dataclass(frozen=True)
class Place:
    """Device, type and treatment of a part's models; with `shares` processes split the weights."""

    device: torch.device
    dtype: torch.dtype
    shares: bool
    compiles: bool
    recomputes: bool = False


class Steps:
    """Optimiser steps of one part, as `distill` takes them, of models made from a seed."""

    def __init__(self, shape: str, name: str, place: Place, alone: bool = False):
        self.place, self.alone = place, alone
        stage, _, trains = name.partition("-")
        config = SHAPES[shape]()
        teacher = config.with_mixers([ATTENTION.name] * config.num_hidden_layers)
        trained = _trained(empty_model(config), trains)
        self.student = _made(config, place, set(trained))
        self.teacher = _made(teacher, place, set())
        if place.recomputes:
            recompute_activations(self.student)
        if not place.shares:
            share_frozen(self.student, self.teacher, set(trained), place.dtype)
        if place.compiles:
            compile_blocks(self.student)
            compile_blocks(self.teacher)
        self.student.requires_grad_(False).train()
        # made anew: what is split has other parameters than the shapes
        mixers = mixer_parameters(self.student)
        members = _trained(self.student, trains)
        self.parameters = [parameter.requires_grad_() for parameter in members.values()]
        usual = DistillConfig()
        rate = usual.align_lr if stage == "align" else usual.lr
        rest = {key: p for key, p in members.items() if key not in mixers}
        self.optimizer = build_optimizer([(mixers, rate), (rest, usual.rest_lr)])
        self.clip = usual.grad_clip
        pair, amp = (self.student, self.teacher), place.dtype
        amp = None if amp == torch.float32 else amp
        self.objective = (
            AlignmentObjective(*pair, amp, place.compiles)
            if stage == "align"
            else LogitsObjective(*pair, amp=amp)
        )

    def take(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One step over this process's batches; the loss of the rows of all processes."""
        device = self.place.device
        if self.alone:
            # `_gradients` would count the tokens of other processes
            tokens = sum(self.objective.count(batch) for batch in batches)
            shares = [self.objective.backward(batch.to(device), tokens) for batch in batches]
            loss = torch.stack(shares).sum()
        else:
            loss, _ = _gradients(self.objective, batches, device, self.place.shares)
            reduced = [] if self.place.shares else self.parameters
            add_up([loss, *(p.grad for p in reduced if p.grad is not None)])
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        self.optimizer.found_inf = (~(loss.isfinite() & norm.isfinite())).float()  # pyright: ignore
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Check losses, then time every part that is asked for."""
    device, dtype = placement(DistillConfig(device=options.device, dtype=options.dtype))
    join(device)
    found: dict[str, object] = {
        "processes": processes(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "shape": options.model,
        "rows": options.rows,
        "length": options.length,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    if options.check:
        found["check"] = {name: _check(options, name, device) for name in options.parts}
        _say(found["check"])
    compiling, parts = compiles(options.compile, device), {}
    for name in [] if options.only_check else options.parts:
        recomputes = options.grad_checkpointing or name.endswith("whole")
        place = Place(device, dtype, _shares(options, name), compiling, recomputes)
        try:
            parts[name] = _timed(options, name, place)
        except torch.OutOfMemoryError as error:
            if processes() > 1:
                # the others wait for this one
                raise
            parts[name] = {"out_of_memory": str(error).partition(".")[0]}
            release(device)
        _say({name: parts[name]})
    leave()
    return found | {"parts": parts}


def _shares(options: argparse.Namespace, name: str) -> bool:
    """True if the processes split the weights of a part; one process has nothing to share."""
    return processes() > 1 and name not in options.together


def _check(options: argparse.Namespace, name: str, device: torch.device) -> dict[str, float]:
    """Relative errors of losses, and of all weights together, after a few steps."""
    vocabulary, length = SHAPES[options.check]().vocab_size, min(options.length, 256)
    every = [random_batch(vocabulary, 2, length, seed) for seed in range(processes())]
    place = Place(device, torch.float32, _shares(options, name), compiles=False)
    shared = Steps(options.check, name, place)
    ours = [float(shared.take([every[rank()]])) for _ in range(CHECKED_STEPS)]
    one = Steps(options.check, name, Place(device, torch.float32, False, False), alone=True)
    theirs = [float(one.take(every)) for _ in range(CHECKED_STEPS)]
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for own, other in zip(shared.parameters, one.parameters, strict=True):
        error = whole(own.detach()) - other.detach()
        sums += torch.stack([part.double().square().sum() for part in (error, other.detach())])
    found = {
        "loss_error": max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)),
        "weight_error": float((sums[0] / sums[1]).sqrt()),
    }
    del shared, one
    release(device)
    # written so that a NaN fails
    if not all(error <= LARGEST_ERROR for error in found.values()):
        raise CheckError(f"{name} on {processes()} processes is {found} off one: {ours}, {theirs}")
    return found


def _timed(options: argparse.Namespace, name: str, place: Place) -> dict[str, object]:
    """Seconds, rate and memory of the steps of a part."""
    device, started = place.device, time.perf_counter()
    reset_peak(device)
    steps = Steps(options.model, name, place)
    vocabulary = steps.student.config.vocab_size
    batch = random_batch(vocabulary, options.rows, options.length, rank())
    made = time.perf_counter()
    losses = [steps.take([batch]) for _ in range(options.warmup)]
    _wait(device)
    began = time.perf_counter()
    losses += [steps.take([batch]) for _ in range(options.iters)]
    _wait(device)
    seconds = (time.perf_counter() - began) / options.iters
    values = [float(loss) for loss in losses]
    if not all(map(math.isfinite, values)):
        raise CheckError(f"the losses of {name} are {values}")
    slowest = largest(round(seconds * 1e6)) / 1e6
    found: dict[str, object] = {
        "tokens_per_second": round(batch.input_ids.numel() * processes() / slowest, 1),
        "seconds": slowest,
        "peak_bytes": largest(peak_bytes(device)),
        "making_seconds": round(made - started, 2),
        "warmup_seconds": round(began - made, 2),
        "shared": place.shares,
        "compiled": place.compiles,
        "recomputed": place.recomputes,
        "losses": [round(value, 5) for value in values],
    }
    if options.profile:
        found["communication"] = communication(
            partial(steps.take, [batch]), options.profile, device
        )
    del steps
    release(device)
    return found


def _trained(student: HybridForCausalLM, trains: str) -> dict[str, nn.Parameter]:
    found = mixer_parameters(student)
    return found | (rest_parameters(student) if trains == "whole" else {})


def _made(config: HybridConfig, place: Place, trained: set[str]) -> HybridForCausalLM:
    """A model whose parameters have values by their names: equal ones in student and teacher."""
    model, casts = empty_model(config), Casts(trained, place.dtype)
    model.requires_grad_(False).eval()

    def kind(name: str, own: torch.Tensor) -> torch.Tensor:
        return own.float() if casts.masters(name) else own.to(place.dtype)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        parameter.data = kind(name, parameter.data)
    if place.shares:
        split(model, place.device)
    model.to_empty(device=place.device)
    # never stored, and computed at construction
    model.model.rotary_emb = RotaryEmbedding(config).to(place.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.Generator(place.device).manual_seed(zlib.crc32(name.encode()))
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=place.device)
            fill(name, full, additions(config), drawn)
            if "embed_tokens" in name:
                # what blocks add must not drown it; see `speed.training_bench`
                full.div_(STD)
            parameter.copy_(part(full, parameter))
    if place.shares:
        settle(model)
    return model


def _say(found: object) -> None:
    """Tell the person who waits, and who may stop the run, how far it is."""
    if rank() == 0:
        sys.stderr.write(f"{json.dumps(found)}\n")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
