"""Packages with the functions and demands of mamba-ssm and causal-conv1d, for a CPU."""

import importlib
import sys
from pathlib import Path

from mambactl.kernels import dispatch, mamba_ssm_calls

PACKAGES = ("mamba_ssm", "causal_conv1d")
FAKE_SCAN = """
import torch
from mambactl.kernels import reference

def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == torch.float32
    assert B.shape == C.shape and u.shape == delta.shape and u.shape[1] % B.shape[1] == 0
    assert all(t.is_contiguous() for t in (u, delta, B, C))
    y, state = reference.selective_scan(
        u.mT, delta.mT, A, B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2)
    )
    return y.mT, state
"""
FAKE_SSD = """
import torch
from mambactl.kernels import reference

def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None,
                              initial_states=None, seq_idx=None, cu_seqlens=None,
                              dt_softplus=False, dt_limit=(0.0, float("inf")),
                              return_final_states=False, return_varlen_states=False):
    assert x.shape[2] == dt.shape[2] == A.shape[0] and x.shape[2] % B.shape[2] == 0
    assert B.shape == C.shape and dt.dtype == A.dtype == torch.float32 and return_final_states
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and (seq_idx[:, 0] == 0).all()
    y, state = reference.ssd(x, dt, A, B, C, initial_states, seq_idx, chunk_size)
    return y.to(x.dtype), state
"""
FAKE_CONV = """
import torch
from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, convolved

__version__ = "1.7.0"

class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, seq_idx, initial_states):
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_states)
        return convolved(x, weight, bias, seq_idx, initial_states)

    @staticmethod
    def backward(ctx, dout):
        x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
        dx, dweight, dbias, _ = causal_conv1d_bwd_function(
            x, weight, bias, dout, seq_idx, initial_states, None, None, False, True
        )
        return dx, dweight, dbias, None, None

def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None,
                     return_final_states=False, final_states_out=None, activation=None):
    assert activation == "silu"
    return Convolution.apply(x, weight, bias, seq_idx, initial_states)
"""
FAKE_CPP_FUNCTIONS = """
import os
import torch
import torch.nn.functional as F
from mambactl.kernels import reference

assert os.environ["CAUSAL_CONV1D_DETERMINISTIC"] in ("0", "1")

def convolved(x, weight, bias, seq_idx, initial_states):
    assert x.stride(1) == 1 and x.shape[1] % 8 == 0 and 2 <= weight.shape[1] <= 4
    assert x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert bias is None or bias.dtype == weight.dtype
    assert seq_idx is None or seq_idx.dtype == torch.int32 and initial_states is None
    assert seq_idx is None or (seq_idx >= 0).all() and (seq_idx.diff(dim=1) >= 0).all()
    assert initial_states is None or initial_states.stride(1) == 1
    before = None if initial_states is None else initial_states.mT
    y = F.silu(reference.causal_conv1d(x.mT, weight, bias, before, seq_idx)).mT
    return y.to(x.dtype)

def causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx,
                               return_dinitial_states, silu_activation):
    assert silu_activation and dx is dfinal_states is None and not return_dinitial_states
    kind = x.dtype
    assert dout.stride(1) == 1 and dout.stride(0) % 8 == dout.stride(2) % 8 == 0
    # an operator runs below PyTorch's differentiation
    x, dout, width, length = x.mT.float(), dout.mT.float(), weight.shape[1], x.shape[2]
    start = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    padded = torch.cat([start if initial_states is None else initial_states.mT.float(), x], 1)
    w, shift = weight.float(), None if bias is None else bias.float()
    before = padded[:, : width - 1]
    raw = reference.causal_conv1d(x, w, shift, before, seq_idx)
    gate = raw.sigmoid()
    grad = dout * gate * (1 + raw * (1 - gate))
    dx, dweight = torch.zeros_like(padded), torch.zeros_like(w)
    for tap in range(width):
        reached = grad
        if seq_idx is not None:
            earlier = F.pad(seq_idx, (width - 1 - tap, 0))[:, :length]
            reached = grad.masked_fill((earlier != seq_idx)[..., None], 0)
        dweight[:, tap] = (padded[:, tap : tap + length] * reached).sum((0, 1))
        dx[:, tap : tap + length] += reached * w[:, tap]
    dbias = None if bias is None else grad.sum((0, 1)).to(bias.dtype)
    return dx[:, width - 1 :].to(kind).mT, dweight.to(weight.dtype), dbias, None
"""


def forget() -> None:
    """Forget what was imported and said."""
    calls = mamba_ssm_calls
    for cached in (dispatch._say_once, calls._load, calls.loaded, calls.too_old):
        getattr(cached, "cache_clear", lambda: None)()
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]


def install(folder: Path) -> None:
    """Write both packages into a folder, which must be in `sys.path`."""
    ops, conv = folder / "mamba_ssm" / "ops", folder / "causal_conv1d"
    for package in (ops.parent, ops, ops / "triton", conv):
        package.mkdir()
        (package / "__init__.py").touch()
    (ops / "selective_scan_interface.py").write_text(FAKE_SCAN)
    (ops / "triton" / "ssd_combined.py").write_text(FAKE_SSD)
    (conv / "__init__.py").write_text(FAKE_CONV)
    (conv / "cpp_functions.py").write_text(FAKE_CPP_FUNCTIONS)
    importlib.invalidate_caches()
