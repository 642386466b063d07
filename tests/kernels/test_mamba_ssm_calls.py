"""mamba-ssm and causal-conv1d in place of our kernels: calls that reach them, and what is said."""

import importlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from kernels.stand_ins import PACKAGES, forget, install

from mambactl.kernels import dispatch, mamba_ssm_calls, reference


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> Iterator[None]:
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def only_mamba_ssm(monkeypatch, tmp_path) -> None:
    """A package with the functions and demands of mamba-ssm."""
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path)
    monkeypatch.setattr(dispatch, "_no_cuda", lambda device: None)
    monkeypatch.setattr(dispatch, "_no_triton", lambda: "off")


def as_bf16(inputs):
    x, dt, A, B, C, state = inputs
    return x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), state


@pytest.mark.parametrize("packed", [True, False])
def test_mamba_ssm_trains_mamba2(monkeypatch, only_mamba_ssm, draw_ssd, packed) -> None:
    x, dt, A, B, C, state = as_bf16(draw_ssd(1, 70, groups=2, heads=4))
    x, C = x[:, :, :2].requires_grad_(), C.repeat_interleave(2, 2)
    # number 7 comes back: those are two documents
    seq_idx = torch.tensor([7] * 9 + [3] * 20 + [7] * 41)[None] if packed else None
    wide = x.repeat_interleave(2, 2)
    expected = reference.ssd(wide, dt, A, B, C, state, seq_idx)
    y, final = dispatch.ssd(x, dt, A, B, C, state, seq_idx)
    assert y.dtype == final.dtype == torch.float32 and y.requires_grad
    torch.testing.assert_close(y, expected[0], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(final, expected[1], rtol=1e-5, atol=1e-5)


def test_mamba_ssm_trains_mamba1(only_mamba_ssm, draw_scan) -> None:
    x, dt, A, B, C, _ = as_bf16(draw_scan(2, 9, groups=2))
    x, C = x.requires_grad_(), C.repeat_interleave(3, 2)
    expected = reference.selective_scan(x, dt, A, B, C)
    y, final = dispatch.selective_scan(x, dt, A, B, C)
    assert y.requires_grad and not final.requires_grad
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(final, expected[1])


def test_mamba_ssm_gets_nothing_it_would_round_or_refuse(
    monkeypatch, only_mamba_ssm, draw_ssd, draw_scan
) -> None:
    def refuse(*args, **keywords):
        raise AssertionError("mamba-ssm was called")

    both = {dispatch.SSD: refuse, dispatch.SCAN: refuse}
    monkeypatch.setattr(mamba_ssm_calls, "loaded", lambda: both)
    dispatch.ssd(*draw_ssd(1, 5))
    dispatch.selective_scan(*draw_scan(1, 3))  # from a state
    dispatch.selective_scan(*draw_scan(1, 3)[:5], None, torch.zeros(1, 3))
    with pytest.raises(AssertionError, match="mamba-ssm"):
        dispatch.selective_scan(*draw_scan(1, 3)[:5])


@pytest.mark.parametrize(
    "source", ["import selective_scan_cuda_that_is_missing", "raise OSError('undefined symbol')"]
)
def test_a_broken_mamba_ssm_is_a_reason_not_an_error(
    monkeypatch, tmp_path, draw_ssd, source
) -> None:
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.setattr(dispatch, "_no_cuda", lambda device: None)
    monkeypatch.setattr(dispatch, "_no_triton", lambda: "off")
    assert dispatch.backends()["mamba-ssm"].startswith("does not load: ")
    dispatch.ssd(*as_bf16(draw_ssd(1, 5)))


@pytest.fixture
def forced(monkeypatch, only_mamba_ssm) -> list[str]:
    """Warnings of a process in which Triton would be live, and mamba-ssm is asked for."""
    monkeypatch.setattr(dispatch, "_no_triton", lambda: None)
    monkeypatch.setenv(dispatch.SWITCH, "mamba-ssm")
    said: list[str] = []
    monkeypatch.setattr(dispatch.console, "warn", said.append)
    return said


def test_mamba_ssm_is_forced(monkeypatch, forced, draw_ssd, draw_scan) -> None:
    inputs, scan = as_bf16(draw_ssd(2, 70, heads=2)), draw_scan(2, 9)[:5]
    x, weight, bias = torch.randn(2, 9, 16), torch.randn(16, 4), torch.randn(16)
    # a number that comes back within a window, and one that the package takes for padding
    before, numbers = torch.randn(2, 3, 16), torch.tensor([[1] * 4 + [-2] + [1] * 4] * 2)
    expected = (
        reference.ssd(*inputs)[0].to(torch.bfloat16),
        reference.selective_scan(*scan)[0],
        F.silu(reference.causal_conv1d(x, weight, bias, before)),
        F.silu(reference.causal_conv1d(x, weight, bias, None, numbers)),
    )
    asked: list[str] = []
    functions = {
        name: lambda *a, _f=found, _n=name, **k: (asked.append(_n), _f(*a, **k))[1]
        for name, found in mamba_ssm_calls.loaded().items()
    }
    monkeypatch.setattr(mamba_ssm_calls, "loaded", lambda: functions)
    found = (
        dispatch.ssd(*inputs)[0].to(torch.bfloat16),
        dispatch.selective_scan(*scan)[0],
        dispatch.causal_conv1d_silu(x, weight, bias, before),
        dispatch.causal_conv1d_silu(x, weight, bias, None, numbers),
    )
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert asked == [dispatch.SSD, dispatch.SCAN, dispatch.CONV, dispatch.CONV]
    assert dispatch.backends("cpu") == {
        "triton": "turned off by MAMBACTL_KERNELS=mamba-ssm",
        "mamba-ssm": None,
        "causal-conv1d": None,
    }
    assert not forced


def test_calls_that_it_cannot_serve_are_named_once(forced, draw_ssd, draw_scan) -> None:
    wide, narrow = torch.randn(1, 9, 16), torch.randn(1, 9, 12)
    for _ in range(2):
        dispatch.ssd(*draw_ssd(1, 5))
        dispatch.selective_scan(*draw_scan(1, 3))
        dispatch.causal_conv1d_silu(narrow, torch.randn(12, 4), None)
        dispatch.causal_conv1d_silu(wide, torch.randn(16, 5), None)
    reasons = (
        "it computes in bf16 or fp16, not float32", "it takes no initial state",
        "it takes a multiple of 8 channels, not 12", "it takes widths of 2 to 4, not 5",
    )  # fmt: skip
    assert len(forced) == len(reasons)
    for said, reason in zip(forced, reasons, strict=True):
        assert reason in said and said.endswith("the reference serves such calls")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [None, "state", "documents"])
def test_the_packages_compute_the_same(monkeypatch, draw_ssd, kind, start) -> None:
    """Outputs and gradients on a GPU against the reference in fp64.

    A rounding of an input is 2^-9 of it in bf16; sums of both signs leave a few of these.
    """
    for package in PACKAGES:
        if reason := mamba_ssm_calls.missing(package):
            pytest.skip(reason)
    monkeypatch.setenv(dispatch.SWITCH, "mamba-ssm")
    x, dt, A, B, C, state = draw_ssd(2, 150, heads=4).to("cuda")
    weight = torch.randn(x.shape[2] * x.shape[3], 4, device="cuda")
    state = state if start == "state" else None
    numbers = None
    if start == "documents":
        numbers = torch.tensor([[0] * 70 + [1] * 80] * 2, device="cuda")
    rounded = [x.to(kind), dt, A, B.to(kind), C.to(kind)]

    def run(kernels, convolve, leaves, state) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in leaves]
        y, final = kernels.ssd(*leaves[:5], state, numbers)
        flat = leaves[0].flatten(2)
        convolved = convolve(flat, leaves[5], None, None, numbers)
        total = y.double().square().sum() + convolved.double().square().sum()
        return [y, final, convolved, *torch.autograd.grad(total, leaves)]

    found = run(dispatch, dispatch.causal_conv1d_silu, [*rounded, weight], state)
    exact = [t.double() for t in (*rounded, weight)]
    start_state = None if state is None else state.double()
    expected = run(
        reference, lambda *args: F.silu(reference.causal_conv1d(*args)), exact, start_state
    )
    for got, wanted in zip(found, expected, strict=True):
        assert float((got.double() - wanted).norm() / wanted.norm()) < 2e-2
