"""Our scan and convolution beside those of mamba-ssm and causal-conv1d, forward and backward.

    python -m tests.performance.packages --dtype bfloat16 --json > packages.json

Needs a GPU and both packages. Every operation runs through `kernels.dispatch` on the same inputs:
with our kernels alone, with MAMBACTL_KERNELS=mamba-ssm, and as `kernels.dispatch` chooses where
both are there; results that differ are an error. The operator is what compiled blocks call: there
the packages compute within it. The scan of Mamba-1 has gradients in mamba-ssm alone, so all three
are the same. Milliseconds are medians; a ratio above 1 says how much longer the packages take.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from mambactl import console
from mambactl.errors import CheckError, ResourceError
from mambactl.kernels import dispatch, mamba_ssm_calls, operators
from mambactl.stage_result import StageResult
from tests.performance import command

PARSER = command.parser("packages", __doc__)
# of the norm of a result: both round inputs of products to bf16
TOLERANCE = 3e-2
WARM_MS, TIMED_MS = 50, 200


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer: rows of tokens, heads, heads of x and B, channels of a head, a state."""

    name: str
    rows: int
    tokens: int
    heads: int
    groups: int
    width: int
    state: int


SHAPES = (
    Shape("SmolLM2-135M", 8, 1024, 9, 3, 64, 64),
    Shape("Llama-3-8B", 4, 2048, 32, 8, 128, 128),
)
Operation = Callable[..., Tensor]


def operations(
    shape: Shape, device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Operation, list[Tensor]]]:
    """Each operation's name, what runs it, and its inputs."""
    draw = torch.Generator(device).manual_seed(seed)

    def random(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=draw, device=device, dtype=kind)

    B, T, H, G, P, N = (
        shape.rows, shape.tokens, shape.heads, shape.groups, shape.width, shape.state,
    )  # fmt: skip
    dt = random(B, T, H, kind=torch.float32).sigmoid() / 8
    A = -random(H, kind=torch.float32).exp()
    mixed = [random(B, T, G, P), dt, A, random(B, T, G, N), random(B, T, H, N)]
    yield "Mamba-2 scan", lambda *given: dispatch.ssd(*given)[0], mixed
    channels = 2 * G * P + H * N
    convolved = [random(B, T, channels), random(channels, 4), random(channels)]
    yield "convolution", dispatch.causal_conv1d_silu, convolved
    yield "convolution operator", lambda *taps: operators.conv_silu(*taps, None, None), convolved
    # four documents a row
    numbers = (torch.arange(T, device=device) * 4 // T).expand(B, T).int().contiguous()
    yield (
        "packed convolution",
        lambda *taps: dispatch.causal_conv1d_silu(*taps, None, numbers),
        convolved,
    )
    inner = H * P
    steps = random(B, T, inner, kind=torch.float32).sigmoid() / 8
    rates = -random(inner, 16, kind=torch.float32).exp()
    selective = [random(B, T, inner), steps, rates, random(B, T, 1, 16), random(B, T, 1, 16)]
    yield "Mamba-1 scan", lambda *given: dispatch.selective_scan(*given)[0], selective


# MAMBACTL_KERNELS, and if convolutions lead in causal-conv1d (None as it was measured)
WAYS: Mapping[str, tuple[str, bool | None]] = {
    "ours": ("", False),
    "packages": (dispatch.FORCED, True),
    "chosen": ("", None),
}


@contextmanager
def kernels(choice: str, led: bool | None) -> Iterator[None]:
    """Run in one of `WAYS`, and as it was afterwards."""
    before = os.environ.pop(dispatch.SWITCH, None)
    os.environ[dispatch.SWITCH] = choice
    answer = mamba_ssm_calls.conv_leads if led is None else lambda *call: led
    try:
        with patch.object(mamba_ssm_calls, "conv_leads", answer):
            yield
    finally:
        del os.environ[dispatch.SWITCH]
        if before is not None:
            os.environ[dispatch.SWITCH] = before


def forward(run: Operation, inputs: Sequence[Tensor]) -> Tensor:
    """The result alone."""
    with torch.no_grad():
        return run(*inputs)


def backward(run: Operation, inputs: Sequence[Tensor]) -> Tensor:
    """The gradients of all inputs, flat, for a gradient of ones."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = run(*leaves)
    found = torch.autograd.grad(y, leaves, torch.ones_like(y))
    return torch.cat([t.float().flatten() for t in found])


def contest(
    run: Operation, inputs: Sequence[Tensor], how: Callable[..., Tensor]
) -> dict[str, float]:
    """Milliseconds by way, and how much longer the packages take; CheckError if they differ."""
    from triton.testing import do_bench

    found, times = {}, {}
    for name, way in WAYS.items():
        with kernels(*way):
            found[name] = how(run, inputs).float()
            times[name] = do_bench(
                lambda: how(run, inputs), warmup=WARM_MS, rep=TIMED_MS, return_mode="median"
            )
    size = found["ours"].norm()
    differences = [float((found["ours"] - found[name]).norm() / size) for name in WAYS]
    difference = max(differences)
    if not difference < TOLERANCE:
        raise CheckError(f"they differ by {difference:.1e} of the norm", "do not time them")
    ratio = times["packages"] / times["ours"]
    return {f"{name}_ms": ms for name, ms in times.items()} | {
        "ratio": ratio,
        "difference": difference,
    }


def measure(given: Namespace) -> StageResult:
    """Time every operation at every shape, after a check that both agree."""
    from mambactl.ranks import placement
    from mambactl.speed.conditions import conditions
    from tests.performance.verification import require_kernels

    config = command.configured(given)
    device, dtype = placement(config)
    require_kernels(device)
    for package in ("mamba_ssm", "causal_conv1d"):
        if reason := mamba_ssm_calls.missing(package):
            raise ResourceError(f"{package}: {reason}", "pip install mambactl[cuda]")
    metrics = conditions(config, device, dtype)
    rows = []
    with console.progress("operations", 10 * len(SHAPES)) as progress:
        for shape in SHAPES:
            for name, run, inputs in operations(shape, device, dtype, config.seed):
                for way, how in (("forward", forward), ("with gradients", backward)):
                    row = {"shape": shape.name, "operation": name, "pass": way}
                    rows.append(row | contest(run, inputs, how))
                    progress.advance(status=f"{shape.name}, {name}, {way}")
                    # compiling takes most of the time: a run that is cut short has said something
                    console.log(json.dumps(rows[-1]))
    metrics |= {"points": [], "packages": rows}
    console.table(f"kernels on {metrics['device']}", *columns_and_lines(rows))
    least = min(rows, key=lambda row: row["ratio"])
    text = f"least: {least['ratio']:.2f}x, {least['operation']} {least['pass']}, {least['shape']}"
    return StageResult(None, metrics, text)


def columns_and_lines(
    rows: Sequence[Mapping[str, str | float]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table of every operation, one line each."""
    ways = [name for name in WAYS if all(f"{name}_ms" in row for row in rows)]
    columns = ("shape", "operation", "pass", *(f"{name}, ms" for name in ways), "packages / ours")
    lines = [
        (
            str(row["shape"]), str(row["operation"]), str(row["pass"]),
            *(f"{row[f'{name}_ms']:.3f}" for name in ways), f"{row['ratio']:.2f}x",
        )
        for row in rows
    ]  # fmt: skip
    return columns, lines


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
