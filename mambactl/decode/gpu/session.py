"""Device memory and captured graphs for one batch size; a graph is one step with K drafts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mambactl.decode.gpu.head_pass import HeadPass, PackedHead
from mambactl.decode.gpu.prompt_reader import Reader
from mambactl.decode.gpu.state import ModelState, PackedModel, make_state
from mambactl.decode.gpu.step import Batch, Guide, Pass, Step
from mambactl.decode.sampler import SamplingParams
from mambactl.decode.shared_prefix import Prefixes
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.kernels.decode.reference.verdict import Field
from mambactl.models.session_size import SessionSize
from mambactl.present import present

# drafts, whether tokens are drawn, and whether the drafts are of the text beside another draft
_Key = tuple[int, bool, bool]
# steps of a timing
TIMED_STEPS = 3


@dataclass
class Capture:
    """Cost of preparing graphs: their number, and seconds of compilation and capture."""

    graphs: int = 0
    compile_seconds: float = 0.0
    capture_seconds: float = 0.0


class Session:
    """Runs steps of a batch of a given size: weights, memory and captured graphs."""

    def __init__(
        self,
        target: PackedModel,
        draft: PackedModel | PackedHead | str | None,
        ops: DecodeOps,
        size: SessionSize,
        prefixes: tuple[Prefixes | None, Prefixes | None] = (None, None),
        copying: bool = False,
    ):
        """`copying`: there are also steps whose drafts are of the text, beside a draft."""
        self.size, self.capacity, self.k = size.batch, size.capacity, size.k
        self.device = device = target.table.device
        self.batch = Batch(self.size, self.capacity, self.k, device)
        self.on_host = ops.on_host
        limit = 0 if ops.on_host else size.ring_limit(target.stores_every_step)
        self.limits = {"span": self.k + 1, "limit": limit, "draft_limit": 0}
        self.target_weights = target
        self.draft_weights = draft if isinstance(draft, PackedModel) else None
        self.target = _state(target, ops, size, self.k + 1)
        self.draft: ModelState | None = None
        drafter: Pass | Guide | str | None = None
        along: tuple[PackedHead, ModelState] | None = None
        if isinstance(draft, str):
            drafter = draft
        elif isinstance(draft, PackedHead):
            self.draft = _state(draft.body, ops, size, self.k + 1)
            drafter = HeadPass.of(draft, self.draft, ops, size)
            along = draft, self.draft
        elif draft is not None:
            if not ops.on_host:
                self.limits["draft_limit"] = size.ring_limit(draft.stores_every_step)
            self.draft = _state(draft, ops, size, max(2, self.k + 1) if copying else 2)
            drafter = Pass(draft, self.draft, ops)
        self.step = Step(
            self.batch,
            Pass(target, self.target, ops),
            drafter,
            ops,
            limit=self.limits["limit"],
            draft_limit=self.limits["draft_limit"],
        )
        self.copying = copying
        self.graphs: dict[_Key, torch.cuda.CUDAGraph] = {}
        self.capture = Capture()
        self.seconds: dict[tuple[int, bool], float] = {}
        self.warm = False
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.reader = Reader(target, self.target, self.size, prefixes[0], self.pool, along)
        self.draft_reader: Reader | None = None
        if self.draft_weights is not None and self.draft is not None:
            self.draft_reader = Reader(
                self.draft_weights, self.draft, self.size, prefixes[1], self.pool
            )

    def start(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[int], params: SamplingParams
    ) -> torch.cuda.Event | None:
        """Read prompts of a token or more and write the first new token of each.

        The event is that of a step.
        """
        self.batch.start(prompts, keys, params)
        if self.draft_reader is not None:
            last = len(present(self.draft_weights).table) - 1
            # the newest token of the target's it reads in its first pass
            self.draft_reader.read([[min(t, last) for t in prompt[:-1]] for prompt in prompts])
        self.step.begin(self.reader.read(prompts), sampled=not params.greedy)
        return self._sent()

    def prepare(self, ks: Sequence[int], sampled: bool) -> None:
        """Compile and capture the steps with these numbers of drafts, before a batch is loaded."""
        if self.device.type != "cuda":
            self._warm(max(ks))
            return
        keys = [(k, sampled, False) for k in ks]
        if self.copying:
            keys.append((self.k, sampled, True))
        missing = [key for key in keys if key not in self.graphs]
        if not missing:
            return
        # nobody is active, so a run changes nothing but scratch
        self.batch.progress.zero_()
        started = time.perf_counter()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for key in missing:
                self.step.run(*key)
            self.step.begin(self.target.scratch.hidden[: self.size], sampled)
        torch.cuda.synchronize()
        compiled = time.perf_counter()
        for key in missing:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.step.run(*key)
            self.graphs[key] = graph
        torch.cuda.synchronize()
        self.capture.graphs += len(missing)
        self.capture.compile_seconds += compiled - started
        self.capture.capture_seconds += time.perf_counter() - compiled

    def _warm(self, k: int) -> None:
        """Run a step once on the host, so that operations prepare what they keep of the weights."""
        if self.on_host and not self.warm:
            # nobody is active, so a run changes nothing but scratch
            self.batch.progress.zero_()
            self.step.run(k, False)
            self.warm = True

    def time_plain(self, sampled: bool) -> float:
        """Seconds of a step without drafts on the batch just started, which it leaves as it is."""
        b = self.batch
        saved = [(t, t.clone()) for t in self.step.memory]
        # no state is stored where the next one is the present one
        b.progress[Field.NEXT] = b.field(Field.BASE)
        seconds = self._seconds(lambda k: self.launch(k, sampled), 0)
        for tensor, copy in saved:
            tensor.copy_(copy)
        return seconds

    def launch(self, k: int, sampled: bool, copied: bool = False) -> torch.cuda.Event | None:
        """Start one step; the event tells when its results have arrived."""
        if self.device.type != "cuda":
            self.step.run(k, sampled, copied)
            return None
        self.graphs[k, sampled, copied].replay()
        return self._sent()

    def _sent(self) -> torch.cuda.Event | None:
        """An event that tells when the results of the step just started have arrived."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def time_steps(self, ks: Sequence[int], sampled: bool) -> dict[int, float]:
        """Seconds of a step for each k, measured on the batch just started, which it leaves as is.

        Just after the start no pass stores a state, so repeating a step only writes ring slots and
        cache slots that hold nothing a real step sees before it has written them itself.
        """
        if all((k, sampled) in self.seconds for k in ks):
            return {k: self.seconds[k, sampled] for k in ks}
        saved = [(t, t.clone()) for t in self.step.memory]

        def again(k: int) -> None:
            for tensor, copy in saved:
                tensor.copy_(copy)
            self.launch(k, sampled)

        for k in ks:
            if (k, sampled) not in self.seconds:
                again(k)
                times = [self._seconds(again, k) for _ in range(TIMED_STEPS)]
                self.seconds[k, sampled] = sorted(times)[len(times) // 2]
        for tensor, copy in saved:
            tensor.copy_(copy)
        return {k: self.seconds[k, sampled] for k in ks}

    def _seconds(self, step: Callable[[int], object], k: int) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            step(k)
            return time.perf_counter() - begin
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        step(k)
        marks[1].record()
        marks[1].synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3


def _state(weights: PackedModel, ops: DecodeOps, size: SessionSize, longest: int) -> ModelState:
    return make_state(weights, ops, size.state_size(weights.stores_every_step), longest)
