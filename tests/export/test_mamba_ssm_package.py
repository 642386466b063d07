"""Exports opened by the package mamba_ssm, where it is installed.

    MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm einops

brings it without a CUDA compiler; its Triton kernels then run in the interpreter on a CPU.
"""

import importlib.util
import sys
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch

from mambactl.checkpoint.load import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba-ssm"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> type:
    """Its model class, with its own plain functions for CUDA extensions that were not built."""
    if DEVICE == "cpu":
        from triton.runtime.autotuner import Autotuner

        monkeypatch.setattr(torch.cuda, "device", lambda *_: nullcontext())
        # nothing to time in the interpreter
        monkeypatch.setattr(Autotuner, "_bench", lambda *_, **__: [1.0] * 3)
    if importlib.util.find_spec("selective_scan_cuda") is None:
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
        from mamba_ssm.modules import mamba2, mamba_simple
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

        monkeypatch.setattr(mamba_simple, "selective_scan_fn", selective_scan_ref)
        _always(monkeypatch, mamba_simple.Mamba, use_fast_path=False)
        _always(monkeypatch, mamba2.Mamba2, use_mem_eff_path=False)
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    return MambaLMHeadModel


def _always(monkeypatch: pytest.MonkeyPatch, kind: type, **fixed: bool) -> None:
    """Create modules of a kind with these arguments, whatever else is given."""
    create = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda *args, **given: create(*args, **given | fixed))


@pytest.mark.parametrize("name", ["native1", "native2"])
@torch.no_grad()
def test_the_package_computes_the_same(name: str, package: type, exported, source) -> None:
    folder = exported(name, to="mamba-ssm")
    theirs = package.from_pretrained(str(folder), device=DEVICE, dtype=torch.float32)
    ours = load_model(source(name)).to(DEVICE)
    ids = torch.randint(3, 260, (2, 64), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    found, wanted = theirs(ids).logits, ours(ids).logits
    # products of chunks on a GPU round fp32 to tf32, which has 10 bits
    bound = 1e-5 if DEVICE == "cpu" else 4e-3
    assert (found - wanted).abs().max() < bound * wanted.abs().max()
