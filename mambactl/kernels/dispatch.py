"""Whole-sequence kernels: `reference` with the fastest implementation that can do the call.

On CUDA, bf16 or fp32:
- our Triton kernels: `kernels.decode.triton` for prompts, and with gradients, documents or inside
  `torch.compile` the operators of `kernels.operators`, whose outputs have the dtype of x;
- convolutions in which causal-conv1d leads, where it is installed: with gradients, and of wide
  inputs without (`mamba_ssm_calls.conv_leads`); the operators choose by themselves;
- what they cannot do, where mamba-ssm is installed: `mamba_chunk_scan_combined` for fp16, and
  `selective_scan_fn` for gradients of Mamba-1 (neither documents nor an initial state, and none
  flow back from the state it returns);
- everything else, and everything on a CPU: the reference, to which the others are equal up to
  rounding. bf16 products round their operands, the reference multiplies in fp32.
Norms, SwiGLU, rotations and windows of attention run as one kernel each in inference, fp16 too, and
else as operations of PyTorch.
`MAMBACTL_KERNELS=reference` in the environment turns all but the reference off, and
`MAMBACTL_KERNELS=mamba-ssm` all but mamba-ssm and causal-conv1d: calls that these cannot serve go
to the reference, with one message each.
"""

import importlib.util
import os
import shutil
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from mambactl import console
from mambactl.kernels import byte_matrix, mamba_ssm_calls, operators, reference
from mambactl.kernels.mamba_ssm_calls import CONV, SCAN, SSD
from mambactl.kernels.reference import Spans
from mambactl.kernels.switch import FORCED, REFERENCE, SWITCH, forced, switch

LEAST_CAPABILITY = (8, 0)
# of tensors that a fused kernel reads: no subclass with operations of its own, sharded ones say
PLAIN = (Tensor, torch.nn.Parameter)
FUSED = (torch.bfloat16, torch.float16, torch.float32)
# the state of every chunk passes through memory four times, so Triton's are long
TRITON_CHUNK = 128


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run `reference.ssd`; x [B, T, Hx, P] with Hx dividing the H heads of dt repeats its heads.

    The kernels may cut other chunks than `chunk_size`, which changes rounding only. With gradients
    or documents they return y in the dtype of x.
    """
    inputs = (x, dt, A, B, C, initial_state)
    if _fits_triton(x, B, C):
        if seq_idx is not None or _takes_operators(*inputs):
            state = None if initial_state is None else initial_state.float()
            documents = _documents(seq_idx)
            return operators.ssd(x, dt.float(), A.float(), B, C, state, documents)[:2]
        from mambactl.kernels.sequence import ssd as kernel

        with torch.cuda.device_of(x):
            return kernel.ssd(
                x, dt.float(), A.float(), B, C, initial_state, max(chunk_size, TRITON_CHUNK)
            )
    x = x.repeat_interleave(dt.shape[2] // x.shape[2], dim=2) if x.shape[2] != dt.shape[2] else x
    if _serves(SSD, x.device, mamba_ssm_calls.unfit_ssd(x, B, C)):
        return mamba_ssm_calls.ssd(x, dt, A, B, C, initial_state, seq_idx, chunk_size)
    return reference.ssd(x, dt, A, B, C, initial_state, seq_idx, chunk_size)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `reference.selective_scan` by the fastest kernel that fits."""
    if seq_idx is None:
        gradient = _needs_gradient(x, dt, A, B, C, initial_state)
        if not gradient and _fits_triton(x, B, C):
            from mambactl.kernels.sequence import selective as kernel

            with torch.cuda.device_of(x):
                return kernel.selective_scan(x, dt, A.float(), B, C, initial_state)
    if _serves(SCAN, x.device, mamba_ssm_calls.unfit_scan(x, B, C, initial_state, seq_idx)):
        return mamba_ssm_calls.selective_scan(x, dt, A, B, C)
    return reference.selective_scan(x, dt, A, B, C, initial_state, seq_idx)


def causal_conv1d_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    previous: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """SiLU of `reference.causal_conv1d`; the kernel takes weights of another dtype than x."""
    taps = x, weight, bias, previous, seq_idx
    if _fits_triton(x) and not _needs_gradient(previous):
        calls, gradient = mamba_ssm_calls, _needs_gradient(x, weight, bias)
        least = calls.CONV_NARROW if gradient else calls.CONV_WIDE
        # a compiler cannot look into the package, so the operator asks when it runs
        if not torch.compiler.is_compiling() and calls.conv_leads(*taps, least):
            return calls.conv_silu(*taps)
        if seq_idx is not None or _takes_operators(x, weight, bias):
            return operators.conv_silu(x, weight, bias, previous, _documents(seq_idx))
        from mambactl.kernels.sequence import conv as kernel

        with torch.cuda.device_of(x):
            return kernel.causal_conv1d_silu(x, weight, bias, previous)
    # else ours serves what it could, and more
    if forced() and _serves(CONV, x.device, mamba_ssm_calls.unfit_conv(*taps)):
        return mamba_ssm_calls.conv_silu(*taps)
    return F.silu(reference.causal_conv1d(*taps))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    spans: Spans | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v -> [B, T, H, P] for q [B, H, T, P], k and v [B, Hk, S, P].

    Keys are those of `mask` [B or 1, 1, T, S], else those of `spans`, else the past: the queries
    are the last T of S tokens then. `dropout` is the share of weights that are set to 0, in
    training.
    """
    if mask is None and spans is not None:
        if _fits_triton(q, k, v) and not dropout:
            return operators.attend(q, k, v, *spans)[0]
        mask = spans.mask()
    # a single query sees every key; with a mask its keys would be repeated for all heads
    alone = mask is None and q.shape[2] == 1
    if mask is None and not alone and q.shape[2] != k.shape[2]:
        mask = causal_lower_right(q.shape[2], k.shape[2])
    causal = mask is None and not alone
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=True
    )
    return y.transpose(1, 2)


def byte_linear(x: Tensor, w: byte_matrix.ByteMatrix, bias: Tensor | None) -> Tensor:
    """Run `byte_matrix.linear` for x [..., K], fused where that is possible."""
    if not fuses(x):
        return byte_matrix.linear(x, w, bias)
    from mambactl.kernels.sequence import byte_matrix as kernel

    with torch.cuda.device_of(x):
        y = kernel.product(x.flatten(0, -2), w).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run `reference.rms_norm`, fused where that is possible."""
    if fuses(x, weight) and weight.dtype == x.dtype and weight.shape == x.shape[-1:]:
        from mambactl.kernels.sequence import norm as kernel

        with torch.cuda.device_of(x):
            return kernel.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Run `reference.swiglu`, fused where that is possible."""
    if fuses(gate, up) and up.dtype == gate.dtype and up.shape == gate.shape:
        from mambactl.kernels.sequence import pointwise as kernel

        with torch.cuda.device_of(gate):
            return kernel.swiglu(gate, up)
    return reference.swiglu(gate, up)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run `reference.rotated`, fused where that is possible."""
    same = cos.dtype == sin.dtype == states.dtype
    if fuses(states, cos, sin) and same and states.ndim == 4 and states.shape[3] % 2 == 0:
        from mambactl.kernels.sequence import pointwise as kernel

        with torch.cuda.device_of(states):
            return kernel.rotated(states, cos, sin)
    return reference.rotated(states, cos, sin)


def rotate_states(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Run `reference.rotate_states`, fused where that is possible."""
    return rotated(states, *reference.state_angles(states, rotary)).contiguous()


def gated_norm(
    y: Tensor,
    z: Tensor,
    x: Tensor,
    D: Tensor,
    weight: Tensor,
    groups: int,
    eps: float,
    kind: torch.dtype,
) -> Tensor:
    """Run `reference.gated_norm`, fused where that is possible."""
    if fuses(y, z, x, D, weight) and kind in FUSED:
        from mambactl.kernels.sequence import norm as kernel

        with torch.cuda.device_of(y):
            return kernel.gated_norm(y, z, x, D, weight, groups, eps, kind)
    return reference.gated_norm(y, z, x, D, weight, groups, eps, kind)


def fuses(*inputs: Tensor) -> bool:
    """True if a fused kernel without gradients can replace the operations on these tensors."""
    x = inputs[0]
    return (
        # first what is answered at once: a CPU asks hundreds of times a token
        not torch.compiler.is_compiling()
        and not _no_cuda(x.device)
        and not _needs_gradient(*inputs)
        and all(type(t) in PLAIN and t.dtype in FUSED and t.device == x.device for t in inputs)
        and x.numel() > 0
        and triton_missing(x.device) is None
    )


def backends(device: torch.device | str = "cuda") -> dict[str, str | None]:
    """Implementations besides the reference, each with why it is off (None when it is live)."""
    packages = {"mamba-ssm": "mamba_ssm", "causal-conv1d": "causal_conv1d"}
    found = {name: package_missing(package, device) for name, package in packages.items()}
    triton = triton_missing(device)
    if found["causal-conv1d"] is None and not forced():
        beside = f"used beside Triton's kernels, or with {SWITCH}={FORCED}"
        found["causal-conv1d"] = beside if triton else mamba_ssm_calls.too_old()
    return {"triton": triton} | found


def triton_missing(device: torch.device | str = "cuda") -> str | None:
    """Reason why no Triton kernel runs on the device; None if they do."""
    return _disabled() or _no_cuda(torch.device(device)) or _no_triton()


def package_missing(package: str, device: torch.device | str = "cuda") -> str | None:
    """Reason why mamba_ssm or causal_conv1d serves no call on the device; None if it does."""
    off = _disabled() if switch() == REFERENCE else None
    return off or _no_cuda(torch.device(device)) or mamba_ssm_calls.missing(package)


def package_has(name: str, device: torch.device) -> bool:
    """True if the function `name` of mamba-ssm or causal-conv1d serves calls on the device."""
    usable = switch() != REFERENCE and not _no_cuda(device)
    return usable and name in mamba_ssm_calls.loaded()


def answer_while_tracing() -> None:
    """Let `torch.compile` ask what is installed once, when it traces, and not look inside."""
    for question in (triton_missing, package_has, forced):
        torch.compiler.assume_constant_result(question)


def _disabled() -> str | None:
    return f"turned off by {SWITCH}={value}" if (value := switch()) else None


@cache
def _no_cuda(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.version.hip is not None:
        return "not tried on ROCm"
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        need = ".".join(map(str, LEAST_CAPABILITY))
        return f"needs compute capability {need}, {device} has {found[0]}.{found[1]}"
    return None


@cache
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "not installed: pip install triton"
    try:
        importlib.import_module("mambactl.kernels.sequence.ssd")
    except (ImportError, OSError, AttributeError) as error:
        return f"does not load: {error}"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return None if compiler else "needs a C compiler (gcc or clang) to build its launcher"


def _serves(name: str, device: torch.device, unfit: str | None) -> bool:
    """True if the package's function takes a call; `unfit` is the reason why it cannot, or None."""
    usable = package_has(name, device)
    if usable and unfit is None:
        return True
    if forced() and not _no_cuda(device):
        package = mamba_ssm_calls.FUNCTIONS[name].package
        _say_once(f"{name}: {unfit if usable else mamba_ssm_calls.missing(package)}")
    return False


@cache
def _say_once(reason: str) -> None:
    console.warn(f"{reason}; the reference serves such calls")


def _documents(seq_idx: Tensor | None) -> Tensor | None:
    """Numbers [B, T] as kernels read them."""
    return None if seq_idx is None else seq_idx.int().contiguous()


def _takes_operators(*inputs: Tensor | None) -> bool:
    """True if a call must be differentiable, or whole for a compiler."""
    return _needs_gradient(*inputs) or torch.compiler.is_compiling()


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _fits_triton(x: Tensor, *others: Tensor) -> bool:
    return (
        x.dtype in (torch.bfloat16, torch.float32)
        and all(t.dtype == x.dtype for t in others)
        and x.numel() > 0
        and triton_missing(x.device) is None
    )
