"""Gradients without the host: the pass over one form of batch, replayed as one CUDA graph.

A step of a small model is thousands of launches of a few microseconds each, which take the host
longer to issue than a GPU to do. Batches of one form (shapes, and whether documents are numbered)
take the very same launches, so that they are recorded once and replayed. What a recording reads and
writes keeps its place:
- inputs and the number of tokens are copied into tensors of its own;
- gradients are written anew, or, where a step has several batches, added to those that parameters
  hold, which must then be zeroed in place between steps;
- the loss is copied out before the next replay.

Memory. The activations of the recorded pass lie in a pool of their own, reserved from the recording
to `release`: gradients stay beside them during a forward pass, and what runs in between (held-out
text, batches of another form) needs its memory on top. An objective has one recording at a time;
where windows change their size, every size has an objective.

Nothing in a recorded pass may wait for the device or draw a random number, and no host memory is
read again: everything a pass reads comes through `Objective.inputs`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from mambactl import console
from mambactl.data.pack import Batch
from mambactl.train.optimization import AnyObjective, Inputs

# eager passes over a form before it is recorded: they compile, tune and load what it launches
WARMUP = 3


class Recording(Protocol):
    """Interface of `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Launch the recorded work again, on the same memory."""
        ...

    def reset(self) -> None:
        """Free the resources that the recording holds."""
        ...


Made = TypeVar("Made")


class Recorder(Protocol):
    """Runs work so that it can be recorded, and records it."""

    def warm(self, run: Callable[[], Made]) -> Made:
        """Run eagerly, under the conditions of a recording."""
        ...

    def record(self, run: Callable[[], object]) -> Recording:
        """Record what `run` launches without doing it; raises RuntimeError where it cannot."""
        ...


class GraphRecorder:
    """CUDA graphs of work on a stream of its own; see "Whole-network capture" in torch's notes."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def warm(self, run: Callable[[], Made]) -> Made:
        """See `Recorder`; work before and after it on the current stream keeps its order."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            found = run()
        current.wait_stream(self.stream)
        return found

    def record(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Record `run` as a CUDA graph; see `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # the thread that makes batches pins memory meanwhile, which is no part of the recording
        mode = "thread_local"
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode=mode):
            run()
        return graph


def recorder_for(device: torch.device) -> GraphRecorder | None:
    """Recorder for a device, None where there is none."""
    return GraphRecorder(device) if device.type == "cuda" else None


class CapturedObjective:
    """`inner`, replayed for the first form of batch that came more than `WARMUP` times.

    Other forms run eagerly, and all do after a recording failed (too little memory, say), which is
    said once. `parameters` are those that train. `adds`: gradients are added to what is there;
    without it parameters must have none before a pass, which saves an addition for each.
    """

    def __init__(
        self,
        inner: AnyObjective,
        parameters: Sequence[nn.Parameter],
        recorder: Recorder,
        adds: bool = True,
    ):
        self.inner, self.parameters, self.adds = inner, list(parameters), adds
        self._recorder: Recorder | None = recorder
        self._seen: Counter[tuple] = Counter()
        self._tokens: Tensor | None = None
        self._kept: _Kept | None = None

    @property
    def replays(self) -> bool:
        """True if a recording exists."""
        return self._kept is not None

    def count(self, batch: Batch) -> int:
        """Delegate to the inner objective; see `Objective`."""
        return self.inner.count(batch)

    def inputs(self, batch: Batch, device: torch.device) -> Inputs:
        """Delegate to the inner objective; see `Objective`."""
        return self.inner.inputs(batch, device)

    def backward(self, inputs: Inputs, tokens: float | Tensor) -> Tensor:
        """See `Objective`; raises ValueError where gradients were replaced since the recording."""
        if not self.adds and any(parameter.grad is not None for parameter in self.parameters):
            raise ValueError("gradients that a recording would replace: set them to None first")
        form = _form(inputs)
        # a number on the device, from the first pass on: all passes divide in the same way
        if self._tokens is None:
            self._tokens = torch.empty((), dtype=torch.float32, device=inputs.input_ids.device)
        count = self._tokens.fill_(tokens)
        if self._kept is None and self._recorder is not None:
            if self._seen[form] < WARMUP:
                self._seen[form] += 1
                return self._recorder.warm(lambda: self.inner.backward(inputs, count))
            self._record(self._recorder, inputs, count, form)
        if self._kept is not None and self._kept.form == form:
            return self._kept.replay(inputs)
        return self.inner.backward(inputs, count)

    def release(self) -> None:
        """Give the memory of the recording back; what comes later runs eagerly."""
        if self._kept is not None:
            self._kept.recording.reset()
            self._drop_gradients()
            self._kept = None
            self._give_back()
        self._kept = self._recorder = None

    def _record(self, recorder: Recorder, inputs: Inputs, count: Tensor, form: tuple) -> None:
        static = type(inputs)(*(None if part is None else part.clone() for part in inputs))
        loss = torch.empty_like(count)
        try:
            recording = recorder.record(lambda: loss.copy_(self.inner.backward(static, count)))
        except RuntimeError as error:
            self._recorder, reason = None, _reason(error)
            self._drop_gradients()
        else:
            grads = [(p, p.grad) for p in self.parameters if p.grad is not None]
            self._drop_gradients()
            self._kept = _Kept(form, static, loss, grads, recording, self.adds)
            return
        console.warn(f"steps are launched one by one, a CUDA graph could not be made: {reason}")
        self._give_back()

    def _drop_gradients(self) -> None:
        """Drop gradients in the memory of a recording, which must hold none before a replay."""
        for parameter in [] if self.adds else self.parameters:
            parameter.grad = None

    def _give_back(self) -> None:
        if self._tokens is not None and self._tokens.is_cuda:
            torch.cuda.empty_cache()


class _Kept:
    """A recording with the memory it reads and writes."""

    def __init__(
        self,
        form: tuple,
        inputs: Inputs,
        loss: Tensor,
        grads: list[tuple[nn.Parameter, Tensor]],
        recording: Recording,
        adds: bool,
    ):
        self.form, self.inputs, self.loss = form, inputs, loss
        self.grads, self.recording, self.adds = grads, recording, adds

    def replay(self, inputs: Inputs) -> Tensor:
        if self.adds and any(parameter.grad is not grad for parameter, grad in self.grads):
            raise ValueError("gradients that a recording adds to were replaced: zero them in place")
        for buffer, part in zip(self.inputs, inputs, strict=True):
            if buffer is not None and part is not None:
                buffer.copy_(part, non_blocking=True)
        self.recording.replay()
        for parameter, grad in self.grads:
            parameter.grad = grad
        return self.loss.clone()


def _form(inputs: Inputs) -> tuple:
    """Shapes and types that must be equal for the same launches to be right."""
    return tuple(None if part is None else (part.shape, part.dtype) for part in inputs)


def _reason(error: BaseException) -> str:
    """The first line of the error that came first: ending a broken recording fails as well."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]
