"""`synthetic`: random weights of a published shape, with a real tokenizer, as a checkpoint.

What a chain of stages takes in time and memory depends on shapes alone, and shapes need no
download. Tensors are made a few at a time and written as they come. Each has a seed of its own, so
neither the number of threads nor the sizes of files change a value.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mambactl import console
from mambactl.checkpoint import embedded
from mambactl.checkpoint.container import Shape, nbytes
from mambactl.checkpoint.load import EMBEDDING, HEAD, empty_model
from mambactl.checkpoint.ownership import require_replaceable
from mambactl.checkpoint.provenance import SHAPE, lineage
from mambactl.checkpoint.save import CheckpointWriter, stored_dtype
from mambactl.checkpoint.side_files import read_config, read_side_files
from mambactl.json_values import JsonObject
from mambactl.models.config import HybridConfig
from mambactl.options.measurement import SyntheticConfig
from mambactl.ranks import placement
from mambactl.speed.shape_table import TABLE, require_shapes
from mambactl.speed.shapes import additions, config_of, fill
from mambactl.stage_result import StageResult

# tensors that are made at once: with one being written, less than a shard of a large model
MOST_THREADS = 4
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def run(
    config: SyntheticConfig, name: str, out: Path, *, resume: bool = False, force: bool = False
) -> StageResult:
    """Write the model at `out`; there is nothing to resume, and what is done the CLI handles."""
    work = _work(config, name)
    require_replaceable(out, force)
    writer = CheckpointWriter(out, work.target, work.files, None, force, config.max_shard_gb * 1e9)
    with writer:
        writer.plan(work.shapes)
        with console.progress("synthetic", len(work.shapes)) as task:
            for tensor_name, tensor in work.tensors():
                writer.write(tensor_name, tensor)
                task.advance()
        options = config.model_dump(mode="json") | {SHAPE: name}
        writer.lineage = lineage("synthetic", None, None, None, options, config.seed, work.metrics)
    return StageResult(str(out), work.metrics)


def plan(config: SyntheticConfig, name: str) -> JsonObject:
    """Sizes of what would be written."""
    work = _work(config, name)
    return {**work.metrics, "layers": work.target.mixers, "tensors": len(work.shapes)}


def _work(config: SyntheticConfig, name: str) -> "_Work":
    require_shapes([name])
    # it computes on the CPU, yet a missing device is an error everywhere
    placement(config)
    folder = embedded.fetch()
    known = read_config(folder)
    target = config_of(TABLE[name])
    target.tie_word_embeddings = TABLE[name].tied
    tokens = known["vocab_size"]
    if target.vocab_size < tokens:
        console.log(
            f"{name} has {target.vocab_size:,} tokens and its tokenizer {tokens:,}: "
            "embedding and head get as many"
        )
        target.vocab_size = tokens
    for field in SPECIAL_TOKENS:
        setattr(target, field, known.get(field))
    dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    target.dtype = dtype
    return _Work(name, target, dtype, config.seed, tokens, read_side_files(folder))


@dataclass(frozen=True)
class _Work:
    """One shape as a checkpoint; its tokenizer knows the first `tokens` of the vocabulary."""

    name: str
    target: HybridConfig
    dtype: torch.dtype
    seed: int
    tokens: int
    files: Mapping[str, str | bytes]

    @property
    def shapes(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and type of every tensor."""
        left_out = HEAD if self.target.tie_word_embeddings else None
        return {
            name: (tuple(tensor.shape), stored_dtype(name, self.dtype))
            for name, tensor in empty_model(self.target).state_dict().items()
            if name != left_out
        }

    @property
    def metrics(self) -> JsonObject:
        """Facts about the checkpoint that are known before anything is written."""
        shapes = self.shapes.values()
        return {
            SHAPE: self.name,
            "parameters": sum(torch.Size(shape).numel() for shape, _ in shapes),
            "bytes": sum(nbytes(*each) for each in shapes),
            "vocabulary": self.target.vocab_size,
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in order, the next ones made in threads while one is written."""
        threads = min(MOST_THREADS, torch.get_num_threads())
        coming: deque[tuple[str, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(threads) as makers:
            for name, described in self.shapes.items():
                coming.append((name, makers.submit(self._tensor, name, *described)))
                if len(coming) > threads:
                    yield _first(coming)
            while coming:
                yield _first(coming)

    @torch.no_grad()
    def _tensor(self, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        tensor = torch.empty(shape, dtype=dtype)
        fill(name, tensor, additions(self.target), generator)
        if name in (EMBEDDING, HEAD):
            # no token that the tokenizer cannot read is the likeliest
            tensor[self.tokens :] = 0
        return tensor


def _first(coming: deque[tuple[str, Future[Tensor]]]) -> tuple[str, Tensor]:
    """The oldest tensor of those that are being made, which nobody else keeps."""
    name, made = coming.popleft()
    return name, made.result()
