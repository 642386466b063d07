"""Write checkpoints so that OUT either does not exist or is complete."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from transformers import PretrainedConfig

from mambactl.checkpoint.container import (
    DEFAULT_SHARD_BYTES,
    OTHER_DISK,
    Container,
    Shape,
    TensorFile,
)
from mambactl.checkpoint.ownership import require_replaceable
from mambactl.checkpoint.partial_folder import DISPOSABLE
from mambactl.checkpoint.publishing import WorkFolder
from mambactl.errors import OutputError
from mambactl.files import LEDGER, PLOT, explained
from mambactl.json_values import AnyObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.sizes import FLOAT32_PARAMETERS


class TensorWriter:
    """Stream tensors into OUT.partial, and let OUT appear when all of them are there.

    `open_file` makes the file or folder that is written, at a path in the working folder; `side`
    names what may lie beside OUT. Raises OutputError if OUT may not be replaced or is being
    written, ResourceError on a full disk. `lineage` may be set on the writer until the end.
    `verify` is called with the path of the complete result before OUT appears; OUT does not if it
    raises.
    """

    def __init__(
        self,
        out: Path,
        force: bool,
        open_file: Callable[[WorkFolder], TensorFile],
        side: tuple[str, ...],
    ):
        self._work = WorkFolder(out, DISPOSABLE)
        self.out, self.force = self._work.out, force
        self._work.side = side
        self._file = open_file(self._work)
        self._holding = ExitStack()
        self.verify: Callable[[Path], None] | None = None

    @property
    def lineage(self) -> AnyObject | None:
        """Content that mambactl.json will have."""
        return self._file.lineage

    @lineage.setter
    def lineage(self, value: AnyObject) -> None:
        self._file.lineage = value

    def __enter__(self) -> Self:
        with self._explained():
            require_replaceable(self.out, self.force, self._work.side)
            with ExitStack() as stack:
                stack.enter_context(self._work.held())
                # its last owner may have finished in the meantime
                stack.callback(self._discard_unfinished)
                self._refuse_run_state()
                require_replaceable(self.out, self.force, self._work.side)
                self._work.say_what_is_discarded()
                self._work.wipe()
                self._work.begin(self.force)
                self._holding = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._holding:
            if kind is None:
                with self._explained():
                    self._file.close()
                if self.verify is not None:
                    self.verify(self._work.result)
                with self._explained():
                    self._work.finish()
                self._work.publish()

    def plan(self, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> None:
        """Declare every tensor; must come before the first write."""
        with self._explained():
            self._file.plan(tensors)

    def write(self, name: str, *parts: torch.Tensor) -> None:
        """Store one planned tensor or its parts; raises ValueError when it is not as planned."""
        with self._explained():
            self._file.write(name, *parts)

    def _refuse_run_state(self) -> None:
        # a checkpoint that was not finished costs minutes; training keeps hours of work there
        if self.force or self._work.disposable:
            return
        raise OutputError(
            f"{self._work.path} holds the state of an unfinished run",
            "finish it with --resume, discard it with --force, or choose another -o",
        )

    def _discard_unfinished(self) -> None:
        """Remove what was not completed, of this writer or of one that was killed."""
        self._file.release()
        if os.path.lexists(self._work.path) and not self._work.complete and self._work.disposable:
            self._work.discard()

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.out, OTHER_DISK)


class CheckpointWriter(TensorWriter):
    """Write a checkpoint of safetensors.

    `out` ending in .st or .safetensors becomes one file that carries everything.
    """

    def __init__(
        self,
        out: Path,
        config: PretrainedConfig | AnyObject,
        side_files: Mapping[str, str | bytes],
        lineage: AnyObject | None,
        force: bool = False,
        max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    ):
        def open_file(work: WorkFolder) -> Container:
            return Container(work.result, work.single, config, side_files, lineage, max_shard_bytes)

        # a checkpoint that was not trained has none, and those of one that it replaces go with it
        super().__init__(out, force, open_file, side=(LEDGER, PLOT))


def save_model(
    model: HybridForCausalLM,
    out: Path,
    side_files: Mapping[str, str | bytes],
    lineage: AnyObject | None,
    force: bool = False,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write a loaded model; the state space parameters are stored in fp32 whatever it runs in."""
    writer = CheckpointWriter(out, model.config, side_files, lineage, force, max_shard_bytes)
    with writer:
        _write_tensors(writer, model)
    return writer.out


def write_model(
    model: HybridForCausalLM,
    path: Path,
    single: bool,
    side_files: Mapping[str, str | bytes],
    lineage: AnyObject | None,
) -> None:
    """Write a loaded model at `path`, in place of what is there: a folder that nobody else reads.

    Raises ResourceError on a full disk.
    """
    file = Container(path, single, model.config, side_files, lineage)
    with explained(path, OTHER_DISK):
        try:
            _write_tensors(file, model)
            file.close()
        finally:
            file.release()


def _write_tensors(target: TensorWriter | TensorFile, model: HybridForCausalLM) -> None:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    shapes = {name: (tuple(t.shape), stored_dtype(name, t.dtype)) for name, t in state.items()}
    target.plan(shapes)
    for name, tensor in state.items():
        target.write(name, tensor.to(shapes[name][1]))


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """fp32 for A_log, D and dt_bias, which decide over thousands of steps; `dtype` otherwise."""
    return torch.float32 if name.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS else dtype
