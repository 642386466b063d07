"""Functions of mamba-ssm and causal-conv1d behind the signatures of `reference`.

A function `unfit_*` says beforehand why a call cannot be served, where there is a reason.
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from mambactl.kernels import reference
from mambactl.requirements import install_line


class Provided(NamedTuple):
    """Package and module of a function."""

    package: str
    module: str


# functions that calls can go to
SSD, SCAN, CONV = "mamba_chunk_scan_combined", "selective_scan_fn", "causal_conv1d_fn"
CONV_BACKWARD = "causal_conv1d_bwd_function"
FUNCTIONS: Mapping[str, Provided] = {
    SSD: Provided("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined"),
    SCAN: Provided("mamba_ssm", "mamba_ssm.ops.selective_scan_interface"),
    CONV: Provided("causal_conv1d", "causal_conv1d"),
    CONV_BACKWARD: Provided("causal_conv1d", "causal_conv1d.cpp_functions"),
}
HALVES = (torch.bfloat16, torch.float16)
# channels of an input whose channels are next to each other, and widths of a convolution
CONV_CHANNELS, CONV_WIDTHS = 8, (2, 3, 4)
CONV_TYPES = (*HALVES, torch.float32)
# it computes places in memory in unsigned 32 bits; and reads 16 bytes at once
CONV_ELEMENTS, CONV_ALIGNED = 1 << 31, 16
# Bytes of the two inputs that were measured, on an H200, in bf16: 8,192 tokens of 960 and of 6,144
# channels, without documents and inputs before the row (recipes/results/packages-h200.json).
# causal-conv1d led with gradients in both, without them in the wide one alone. In between, and
# below, nothing was measured, so nothing below goes there.
CONV_NARROW, CONV_WIDE = 8192 * 960 * 2, 8192 * 6144 * 2
# its gradients of weights are atomic sums unless this is 1; a resumed run must repeat them
REPEATABLE = "CAUSAL_CONV1D_DETERMINISTIC"
# the version that is known to read it
CONV_VERSION = "1.7.0"


@cache
def loaded() -> dict[str, Callable]:
    """Functions that could be imported, by name."""
    return {name: found for name in FUNCTIONS if callable(found := _load(name))}


def missing(package: str) -> str | None:
    """Reason why a function of the package cannot be imported; None if all can."""
    names = (name for name, provided in FUNCTIONS.items() if provided.package == package)
    return next((why for name in names if isinstance(why := _load(name), str)), None)


@cache
def too_old() -> str | None:
    """Reason why causal-conv1d, which is there, gets no calls unasked; None if it may."""
    version = getattr(importlib.import_module("causal_conv1d"), "__version__", "0")
    if Version(version) >= Version(CONV_VERSION):
        return None
    return f"{version} is older than {CONV_VERSION}: its gradients may differ from run to run"


@cache
def _load(name: str) -> Callable | str:
    """Import the function of that name; returns the reason where that fails."""
    package, module = FUNCTIONS[name]
    if importlib.util.find_spec(package) is None:
        return f"not installed: {install_line(package)}"
    if name in (CONV, CONV_BACKWARD):
        os.environ.setdefault(REPEATABLE, "1")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, OSError, AttributeError) as error:
        # a missing compiled extension, or one built for another torch
        return f"does not load: {error}"


def unfit_ssd(x: Tensor, *others: Tensor) -> str | None:
    """Reason why mamba-ssm's chunk scan does not serve a call; None if it does."""
    if x.dtype not in HALVES:
        # its products round fp32 to tf32
        return f"it computes in bf16 or fp16, not {_name(x)}"
    return _unlike(x, *others)


def unfit_scan(
    x: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None
) -> str | None:
    """Reason why mamba-ssm's selective scan does not serve a call; None if it does."""
    if seq_idx is not None:
        return "it knows no documents"
    if initial_state is not None:
        return "it takes no initial state"
    return "it has no fp64" if x.dtype == torch.float64 else _unlike(x, B, C)


def unfit_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    previous: Tensor | None,
    seq_idx: Tensor | None,
) -> str | None:
    """Reason why causal-conv1d does not serve a call; None if it does."""
    if not {x.dtype, weight.dtype} <= set(CONV_TYPES):
        return "it has no fp64"
    if bias is not None and bias.dtype != weight.dtype:
        return "its weight and bias share one dtype"
    if x.shape[2] % CONV_CHANNELS:
        return f"it takes a multiple of {CONV_CHANNELS} channels, not {x.shape[2]}"
    if weight.shape[1] not in CONV_WIDTHS:
        return f"it takes widths of 2 to 4, not {weight.shape[1]}"
    if previous is not None and seq_idx is not None:
        return "it takes either documents or an initial state"
    if x.numel() >= CONV_ELEMENTS:
        return f"it counts no more than {CONV_ELEMENTS:,} elements"
    return _unlike(x)


def conv_leads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    previous: Tensor | None,
    seq_idx: Tensor | None,
    least: int,
) -> bool:
    """True if causal-conv1d is there and leads in such calls, from `least` bytes of x on.

    Such are the calls that were measured: without documents and inputs before the row, x [B, T, Ch]
    contiguous. Not for tracing: it asks where x lies in memory.
    """
    return (
        # what is answered at once comes first
        previous is None
        and seq_idx is None
        and x.nbytes >= least
        and x.is_contiguous()
        # of rows of one token the strides may be anything
        and x.stride(1) == x.shape[2]
        and x.data_ptr() % CONV_ALIGNED == 0
        and unfit_conv(x, weight, bias, previous, seq_idx) is None
        and missing("causal_conv1d") is None
        and too_old() is None
    )


def _unlike(x: Tensor, *others: Tensor) -> str | None:
    if any(t.dtype != x.dtype for t in others):
        return "its inputs share one dtype"
    return None if x.numel() else "it takes no empty input"


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Run mamba-ssm's chunk scan as `reference.ssd`, in bf16 or fp16."""
    B, C = _same_groups(B, C)
    if seq_idx is not None:
        # an initial state belongs to document 0 there
        seq_idx = reference.document_numbers(seq_idx).int().contiguous()
    # powers of two from 64 on are what its kernels are tuned for
    chunk = max(64, 1 << (chunk_size - 1).bit_length())
    state = None if initial_state is None else initial_state.float()
    with torch.cuda.device_of(x):
        y, state = loaded()[SSD](
            x, dt.float(), A.float(), B, C, chunk,
            initial_states=state, seq_idx=seq_idx, return_final_states=True,
        )  # fmt: skip
    return y.float(), state


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Run mamba-ssm's scan in fp32: x and dt must share a dtype, and bf16 is too coarse for dt."""
    B, C = _same_groups(B.float(), C.float())
    x, dt, B, C = x.float().mT, dt.float().mT, B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1)
    with torch.cuda.device_of(x):
        y, state = loaded()[SCAN](
            *(t.contiguous() for t in (x, dt, A.float(), B, C)), return_last_state=True
        )
    return y.mT, state.detach()


def conv_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    previous: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """Run causal-conv1d as the SiLU of `reference.causal_conv1d`: x [B, T, Ch], weight [Ch, W]."""
    # channels next to each other, as documents and an initial state need them
    entering = x.contiguous().mT  # [B, Ch, T]
    start = None if previous is None else previous.to(x.dtype).contiguous().mT  # [B, Ch, W-1]
    numbers = None
    if seq_idx is not None:
        # there a number that comes back is the same document, and one below 0 is padding
        numbers = reference.document_numbers(seq_idx).int().contiguous()
    with torch.cuda.device_of(x):
        y = loaded()[CONV](
            entering, weight, bias, seq_idx=numbers, initial_states=start, activation="silu"
        ).mT
    if y.requires_grad:
        # it refuses gradients whose tokens lie an odd number of elements apart
        y.register_hook(torch.Tensor.contiguous)
    return y


def conv_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [B, T, Ch], in its dtype, and of weight [Ch, W] and bias [Ch], fp32.

    Those of weight and bias were rounded to their dtype. x is contiguous.
    """
    with torch.cuda.device_of(x):
        dx, d_weight, d_bias, _ = loaded()[CONV_BACKWARD](
            x.mT, weight, bias, dy.contiguous().mT, None, None, None, None, False, True
        )
    # without a bias nobody wants its gradient
    d_bias = x.new_zeros(x.shape[2]) if d_bias is None else d_bias
    return dx.mT, d_weight.float().contiguous(), d_bias.float()


def _same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C [B, T, G, N] repeated to the same number of groups."""
    groups = math.lcm(B.shape[2], C.shape[2])
    return (
        B.repeat_interleave(groups // B.shape[2], dim=2),
        C.repeat_interleave(groups // C.shape[2], dim=2),
    )
