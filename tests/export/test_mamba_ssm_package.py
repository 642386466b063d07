"""Exports opened by the package mamba_ssm, on a GPU that has it.

Mamba-1 needs its compiled extension; Mamba-2 runs on its Triton kernels.
"""

import importlib.util

import pytest
import torch

from mambactl.checkpoint.load import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba-ssm"),
]
EXTENSIONS = {"native1": "selective_scan_cuda", "native2": "triton"}


@pytest.mark.parametrize("name", EXTENSIONS)
@torch.no_grad()
def test_the_package_computes_the_same(name: str, exported, source) -> None:
    if importlib.util.find_spec(EXTENSIONS[name]) is None:
        pytest.skip(f"needs {EXTENSIONS[name]}")
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    folder = exported(name, to="mamba-ssm")
    theirs = MambaLMHeadModel.from_pretrained(str(folder), device="cuda", dtype=torch.float32)
    ours = load_model(source(name)).cuda().float()
    ids = torch.randint(3, 260, (2, 64), generator=torch.Generator().manual_seed(5)).cuda()
    found, wanted = theirs(ids).logits, ours(ids).logits
    # its products of chunks round fp32 to tf32, which has 10 bits
    assert (found - wanted).abs().max() < 4e-3 * wanted.abs().max()
