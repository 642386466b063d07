"""Cache of a teacher's predictions as a few drawn ids per token (arXiv 2503.16870), and its loss.

With q the teacher's distribution and ids drawn from a proposal r ~ q^power, the weights q / r / K
make sum_k w_k [id_k = v] an unbiased estimate of q(v), hence the cross entropy against it one of
the full cross entropy, and its gradient one of the forward KL's. The K most likely ids in their
place would be biased: what they leave out is never learned. With power 1 all weights are 1 / K.

A cache is a folder of safetensors files. Each holds, for its rows, `digest` [R, 32] of what is in
the row, `offset` [R + 1], and for every predicted position in order `ids` [P, K], `entropy` [P]
and, unless power is 1, `masses` [P, K]. A row is found by its digest, wherever a shuffle put it.
"""

import hashlib
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambactl.data.pack import Batch, Row
from mambactl.errors import ModelError
from mambactl.files import replacing
from mambactl.foreign import blamed, require_regular
from mambactl.kernels.random import uniform
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.train.losses import SampledTeacher, distillation_loss, product
from mambactl.train.optimization import autocast, last_hidden, next_tokens
from mambactl.train.sharding import inside

PATTERN = "samples-*.safetensors"
_AGAIN = "make the cache again"
# numbers of a stream of their own, next to those of `kernels.random.Stream`
STREAM = 3
# probabilities alive at once, fp64: 128 MiB on a CPU, 512 MiB on a GPU
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}


class Drawing(NamedTuple):
    """Settings of drawing ids: K per token, from the softmax of logits / temperature to a power."""

    samples: int
    temperature: float = 1.0
    power: float = 1.0
    seed: int = 0


class Drawn(NamedTuple):
    """Samples at P positions: ids [P, K], weights [P, K] and entropy [P], the last two in fp32.

    The entropy is that of the whole vocabulary.
    """

    ids: Tensor
    masses: Tensor
    entropy: Tensor


def row_digest(input_ids: np.ndarray, position_ids: np.ndarray, loss_mask: np.ndarray) -> bytes:
    """sha256 of a row without its padding: tokens, document starts, and the loss mask."""
    digest = hashlib.sha256()
    for array, kind in ((input_ids, np.int32), (position_ids, np.int32), (loss_mask, np.uint8)):
        digest.update(np.ascontiguousarray(array, kind).tobytes())
    return digest.digest()


def digests(rows: Row | Batch) -> list[bytes]:
    """Content digests of one row, or of every row of a batch on the CPU."""
    columns = (rows.input_ids, rows.position_ids, rows.loss_mask, rows.valid)
    columns = [np.atleast_2d(np.asarray(column)) for column in columns]
    found = []
    for *parts, valid in zip(*columns, strict=True):
        length = int(valid.sum())
        found.append(row_digest(*(part[:length] for part in parts)))
    return found


def draw_samples(logits: Tensor, keys: Tensor, positions: Tensor, drawing: Drawing) -> Drawn:
    """Draw for logits [P, V]; int64 keys [P] and positions [P] name each and so fix its draws."""
    log_q = (logits.double() / drawing.temperature).log_softmax(-1)  # [P, V]
    q = log_q.exp()
    entropy = -(q * log_q.masked_fill(q == 0, 0.0)).sum(-1)
    proposal = q if drawing.power == 1 else (log_q * drawing.power).softmax(-1)
    cumulative = proposal.cumsum(-1)  # [P, V]
    draws = positions[:, None] * drawing.samples + torch.arange(
        drawing.samples, device=positions.device
    )  # [P, K]
    numbers = uniform(drawing.seed, keys[:, None].expand_as(draws), draws, STREAM)
    # below the last sum even where it is not quite 1
    ids = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)  # [P, K]
    masses = q.gather(-1, ids) / proposal.gather(-1, ids) / drawing.samples
    return Drawn(ids, masses.float(), entropy.float())


@torch.no_grad()
def draw_batch(
    teacher: HybridForCausalLM,
    batch: Batch,
    keys: Sequence[bytes],
    drawing: Drawing,
    amp: torch.dtype | None,
) -> list[Drawn]:
    """Draw for every predicted position of a batch on the teacher's device; on the CPU, per row."""
    device = batch.input_ids.device
    with autocast(device, amp):
        hidden = last_hidden(teacher, batch)  # [B, T, D]
    _, mask = next_tokens(batch)
    numbers = torch.tensor([_number(key) for key in keys], device=device)
    row, column = mask.nonzero(as_tuple=True)
    # as in training: the head's type for its product, fp32 for what comes out
    hidden = hidden[row, column].to(teacher.lm_head.weight.dtype)  # [P, D]
    head = teacher.lm_head.weight.t()
    size = max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // head.shape[1])
    pieces = []
    for start in range(0, len(hidden), size):
        piece = slice(start, start + size)
        logits = hidden.new_empty(len(hidden[piece]), head.shape[1], dtype=torch.float32)
        product(hidden[piece], head, logits)
        pieces.append(draw_samples(logits, numbers[row[piece]], column[piece], drawing))
    drawn = Drawn(*(torch.cat(parts).cpu() for parts in zip(*pieces, strict=True)))
    counts = mask.sum(1).tolist()
    return [Drawn(*parts) for parts in zip(*(part.split(counts) for part in drawn), strict=True)]


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)


def write_shard(
    path: Path, keys: Sequence[bytes], drawn: Sequence[Drawn], vocabulary: int, weighted: bool
) -> None:
    """Write rows and their samples, all or nothing; `weighted` keeps masses."""
    kind = torch.uint16 if vocabulary <= 1 << 16 else torch.int32
    lengths = [len(one.ids) for one in drawn]
    tensors = {
        "digest": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32).copy()),
        "offset": torch.tensor([0, *lengths]).cumsum(0),
        "ids": torch.cat([one.ids for one in drawn]).to(kind),
        "entropy": torch.cat([one.entropy for one in drawn]),
    }
    if weighted:
        tensors["masses"] = torch.cat([one.masses for one in drawn])
    with replacing(path) as new:
        save_file(tensors, new)
        # the library lets nobody else read it
        new.chmod(0o644)


class TeacherCache:
    """Drawn ids in the files of a folder, found by digest."""

    def __init__(self, folder: Path, vocabulary: int):
        """Read where every row lies; raises ModelError for files that are damaged or missing.

        `vocabulary` is the number of tokens that ids are drawn from.
        """
        self.folder, self.vocabulary = folder, vocabulary
        self._paths = sorted(folder.glob(PATTERN))
        self._files = []
        self._extents: dict[bytes, tuple[int, int, int]] = {}
        for number, path in enumerate(self._paths):
            with blamed(path, kind=ModelError, hint=_AGAIN):
                require_regular(path, path.stat())
                file = safe_open(path, framework="pt")
                keys, offset = _rows(file)
            self._files.append(file)
            for key, begin, end in zip(keys, offset, offset[1:], strict=False):
                self._extents[key.tobytes()] = number, begin, end

    def __contains__(self, key: bytes) -> bool:
        return key in self._extents

    def __len__(self) -> int:
        """Number of rows in the cache."""
        return len(self._extents)

    def row(self, key: bytes) -> Drawn:
        """Samples of one row; raises ModelError for one that is not there."""
        if key not in self._extents:
            raise ModelError(
                f"{self.folder} holds nothing for a row of this run",
                "make it with the same --data, --max-length, --packing and --seed",
            )
        number, begin, end = self._extents[key]
        file = self._files[number]
        with blamed(self._paths[number], kind=ModelError, hint=_AGAIN):
            # as the file has it: few operations know uint16
            ids = file.get_slice("ids")[begin:end].to(torch.int32)
            entropy = file.get_slice("entropy")[begin:end]
            masses = torch.full(ids.shape, 1 / ids.shape[1])
            if "masses" in file.keys():  # noqa: SIM118
                masses = file.get_slice("masses")[begin:end]
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
                raise ValueError(f"ids beyond the {self.vocabulary} of the vocabulary")
        return Drawn(ids, masses, entropy)

    def batch(self, batch: Batch) -> SampledTeacher:
        """Samples for a batch on the CPU; zero weight where nothing is learned."""
        _, mask = next_tokens(batch)
        rows = [self.row(key) for key in digests(batch)]
        drawn = Drawn(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
        return SampledTeacher(
            *(
                part.new_zeros(*mask.shape, *part.shape[1:]).masked_scatter_(
                    mask.view(*mask.shape, *[1] * (part.ndim - 1)), part
                )
                for part in drawn
            )
        )


def _rows(file: safe_open) -> tuple[np.ndarray, list[int]]:
    """Digests [R, 32] and offsets [R + 1] of a file; raises ValueError where sizes do not fit."""
    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    keys, offset = file.get_tensor("digest"), file.get_tensor("offset")
    rows, positions, samples = len(keys), *shapes["ids"]
    expected = {
        "digest": [rows, 32],
        "offset": [rows + 1],
        "ids": [positions, samples],
        "entropy": [positions],
        "masses": [positions, samples],
    }
    wrong = [name for name, shape in shapes.items() if shape != expected.get(name)]
    ends = offset.tolist()
    if wrong or not samples or ends[0] != 0 or ends[-1] != positions or ends != sorted(ends):
        raise ValueError(f"sizes do not fit: {', '.join(wrong) or 'offset'}")
    if (keys.dtype, offset.dtype) != (torch.uint8, torch.int64):
        raise ValueError(f"digest and offset are {keys.dtype} and {offset.dtype}")
    return keys.numpy(), ends


class CachedBatch(NamedTuple):
    """A batch [B, T], the ids that its targets were looked up for, and a `SampledTeacher`."""

    input_ids: Tensor
    seq_idx: Tensor | None
    position_ids: Tensor
    loss_mask: Tensor
    valid: Tensor
    counted: Tensor
    ids: Tensor
    masses: Tensor
    entropy: Tensor


class CachedObjective:
    """kl_weight * forward KL + ce_weight * CE per predicted token, against a cache; no teacher.

    The KL is estimated without bias. `count` looks a batch up while it is on the CPU, `inputs`
    takes what was looked up first: batches must be counted once each and come in the same order.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        cache: TeacherCache,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
        amp: torch.dtype | None = None,
    ):
        self.student, self.cache, self.amp = student, cache, amp
        self.weights = {
            "kl_weight": kl_weight,
            "ce_weight": ce_weight,
            "temperature": temperature,
        }
        self._ready: deque[tuple[Tensor, SampledTeacher]] = deque()

    def count(self, batch: Batch) -> int:
        """Tokens that some position of the row predicts; reads their samples from the cache."""
        found = batch.input_ids, self.cache.batch(batch)
        if self.student.device.type == "cuda":
            found = found[0].pin_memory(), SampledTeacher(*(p.pin_memory() for p in found[1]))
        self._ready.append(found)
        return int(batch.loss_mask[:, 1:].sum())

    def inputs(self, batch: Batch, device: torch.device) -> CachedBatch:
        """Copy the batch and its cached samples to the device."""
        counted, held = self._ready.popleft()
        found = (part.to(device, non_blocking=True) for part in (counted, *held))
        return CachedBatch(*batch.to(device), *found)

    def backward(self, batch: CachedBatch, tokens: float | Tensor) -> Tensor:
        """One student pass; see `train.optimization.Objective`."""
        with autocast(batch.input_ids.device, self.amp):
            loss = inside(self.student, lambda student: self._loss(student, batch))
        # a batch out of order would be trained on another's targets: the device can see that
        same = (batch.counted == batch.input_ids).all()
        share = torch.where(same, loss / tokens, math.nan)
        share.backward()
        return share.detach()

    def _loss(self, student: HybridForCausalLM, batch: CachedBatch) -> Tensor:
        return distillation_loss(
            last_hidden(student, batch),
            student.lm_head.weight,
            *next_tokens(batch),
            SampledTeacher(batch.ids, batch.masses, batch.entropy),
            kl_weight=self.weights["kl_weight"],
            ce_weight=self.weights["ce_weight"],
            temperature=self.weights["temperature"],
        ).total
