"""Time of each kernel of a decode step, plain and with drafts, in a batch.

    python -m tests.performance.step_kernels --synthetic llama3-8b-hybrid-50 \\
        --draft draft-llama3-2l -k 4 --batch-size 32 --json > step-kernels.json

Needs a GPU. Steps are the engine's own graphs behind `--input-len` tokens. States and keys are
random instead of read from prompts: a script decides the tokens whatever they are. Kernels overlap,
as one starts before the one before has ended, so each is charged what it moves the end of the work
forward: its end minus the latest end before. Charges and idle time add up to the step.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mambactl.json_values import JsonObject
from mambactl.stage_result import StageResult
from tests.performance import command

if TYPE_CHECKING:
    from mambactl.decode.gpu.session import Session
    from mambactl.kernels.decode.operations import DecodeOps
    from mambactl.models.hybrid import HybridForCausalLM
    from mambactl.speed.shape_table import Shape

FIELDS = ("synthetic", "draft", "acceptance", "k", "input_len", "batch_size")
PARSER = command.parser("step_kernels", __doc__, FIELDS)
PARSER.set_defaults(
    synthetic="llama3-8b-hybrid-50", draft="draft-llama3-2l", k="4", batch_size="32",
    acceptance="0.8", input_len="1024",
)  # fmt: skip
# steps before, timed without a tracer, and traced; tokens that they may write
WARM, TIMED, TRACED, ROOM = 4, 16, 8, 480
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LONGEST_NAME = 70


@dataclass(frozen=True)
class Work:
    """A kernel or copy on the device; microseconds."""

    name: str
    start: float
    length: float


@dataclass
class Charge:
    """Part of a step that one kernel takes, and its own running time; microseconds."""

    count: float = 0.0
    charged: float = 0.0
    own: float = 0.0


@dataclass
class Account:
    """A step's time by pass and kernel; microseconds."""

    step: float
    idle: float
    gaps: float
    kernels: dict[str, Charge] = field(default_factory=dict)


class Scripted:
    """A target and a draft of random weights whose next tokens are known."""

    def __init__(self, given: Namespace, device: torch.device, dtype: torch.dtype):
        from mambactl.kernels.decode.reference.ops import ReferenceOps
        from mambactl.speed.shape_table import TABLE
        from mambactl.speed.shapes import config_of, disagreeing, successors

        target, draft = TABLE[given.synthetic], TABLE[given.draft]
        self.successor = successors(config_of(target).vocab_size)  # [V]
        other = disagreeing(self.successor, 1 - float(given.acceptance))
        self.target = scripted_model(target, self.successor, 0, device, dtype)
        self.draft = scripted_model(draft, other, 1, device, dtype)
        self.ops: DecodeOps = ReferenceOps()
        if device.type == "cuda":
            from mambactl.kernels.decode.triton.ops import TritonOps

            self.ops = TritonOps.for_model(self.target)

    @torch.no_grad()
    def session(self, rows: int, k: int, context: int) -> "Session":
        """Rows behind `context` tokens, with the graph of their step."""
        from mambactl.decode.gpu.session import Session
        from mambactl.decode.gpu.state import pack
        from mambactl.decode.sampler import SamplingParams
        from mambactl.models.session_size import SessionSize
        from mambactl.speed.shapes import PERIOD
        from mambactl.speed.subject import scripted_prompts

        size = SessionSize.holding(rows, context + ROOM, k)
        draft = pack(self.draft, size.capacity) if k else None
        session = Session(pack(self.target, size.capacity), draft, self.ops, size)
        session.prepare([k], sampled=False)
        draw = torch.Generator(self.target.device).manual_seed(0)
        for state in (session.target, session.draft):
            for held in [] if state is None else state.tensors():
                held.normal_(0, 0.5, generator=draw)
        prompts = scripted_prompts(self.successor, rows, context, 0, PERIOD)
        session.batch.start(prompts, range(rows), SamplingParams(max_new_tokens=ROOM))
        last = torch.tensor([prompt[-1] for prompt in prompts], device=self.target.device)
        session.step.begin(self.target.model.embed_tokens.weight[last], sampled=False)
        return session


def scripted_model(
    shape: "Shape", successor: torch.Tensor, seed: int, device: torch.device, dtype: torch.dtype
) -> "HybridForCausalLM":
    """A random model of a shape that follows `successor` [V]."""
    from mambactl.speed.shapes import config_of, materialise, script

    model = materialise(config_of(shape), device, dtype, seed)
    script(model, successor, seed)
    return model


def run_steps(session: "Session", k: int, steps: int) -> None:
    """Launch steps, without waiting for them."""
    for _ in range(steps):
        session.launch(k, sampled=False)


def mean_emitted(session: "Session") -> float:
    """Mean tokens of a row in the newest steps."""
    from mambactl.kernels.decode.reference.verdict import Letter

    return session.batch.mailbox[..., Letter.EMITTED].float().mean().item()


def traced(session: "Session", k: int) -> list[Work]:
    """Work on the device in `TRACED` steps, by its start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run_steps(session, k, TRACED)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    work = [
        Work(f"{short(e['name'])} {e.get('args', {}).get('grid', '')}", float(e["ts"]), e["dur"])
        for e in events
        if e.get("cat") in DEVICE_WORK and e.get("ph") == "X"
    ]
    return sorted(work, key=lambda each: each.start)


def short(name: str) -> str:
    """A kernel's name without most of its template arguments."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 20]}..{name[-18:]}"


def account(work: Iterable[Work], k: int, steps: int) -> Account:
    """Charge every kernel of some steps with k drafts, each drawn by a pass; means of a step."""
    found, begun, latest, passes = Account(0, 0, 0), None, 0.0, -1
    for each in work:
        end = each.start + each.length
        # each pass begins with its embedding: those of the drafts, then the target's
        passes += "embed" in each.name
        which = "draft" if passes >= 0 and passes % (k + 1) < k else "target"
        if begun is None:
            begun = latest = each.start
        if (gap := each.start - latest) > 0:
            found.idle += gap / steps
            found.gaps += 1 / steps
        charge = found.kernels.setdefault(f"{which}: {each.name}", Charge())
        charge.count += 1 / steps
        charge.own += each.length / steps
        charge.charged += max(end - max(each.start, latest), 0.0) / steps
        latest = max(latest, end)
    found.step = (latest - (begun or 0.0)) / steps
    return found


def show(title: str, found: Account) -> None:
    """Print the kernels that are charged most."""
    from mambactl import console
    from mambactl.metrics import percent, tenths

    ordered = sorted(found.kernels.items(), key=lambda item: -item[1].charged)[:25]
    rows = [
        (name, tenths(each.count), tenths(each.charged), percent(each.charged / found.step))
        for name, each in ordered
    ]
    console.table(title, ("kernel and grid", "launches", "us", "share"), rows)


def measure(given: Namespace) -> StageResult:
    """Measure plain steps and those with drafts in one process."""
    from mambactl.ranks import placement
    from mambactl.speed.conditions import conditions
    from tests.performance.graphs import Timer
    from tests.performance.verification import require_kernels

    config = command.configured(given)
    device, dtype = placement(config)
    require_kernels(device)
    rows, k, context = int(given.batch_size), int(given.k), int(given.input_len)
    models, steps = Scripted(given, device, dtype), JsonObject()
    for drafts in (0, k):
        session, timer = models.session(rows, drafts, context), Timer()
        run_steps(session, drafts, WARM)
        timer.run(partial(run_steps, session, drafts, TIMED))
        seconds, tokens = timer.seconds()[0] / TIMED, mean_emitted(session)
        found = account(traced(session, drafts), drafts, TRACED)
        name = f"{rows} rows, {drafts} drafts"
        show(f"{name}: {1e6 * seconds:.0f} us, {tokens:.2f} tokens a row", found)
        steps[name] = {"seconds": seconds, "tokens_per_row": tokens, **as_object(found)}
        del session
        torch.cuda.empty_cache()
    metrics: JsonObject = conditions(config, device, dtype) | {"steps": steps}
    return StageResult(None, metrics, "\n".join(steps))


def as_object(found: Account) -> JsonObject:
    """An account for JSON; microseconds of a step."""
    kernels: Mapping[str, JsonObject] = {name: asdict(each) for name, each in found.kernels.items()}
    return {"step_us": found.step, "idle_us": found.idle, "gaps": found.gaps, "kernels": kernels}


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
