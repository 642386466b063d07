"""Convolutions that go to causal-conv1d unasked: which do, what they return, and what is said."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from kernels.stand_ins import forget, install

from mambactl.kernels import dispatch, mamba_ssm_calls, operators, reference

pytest.importorskip("triton")

CHANNELS, LENGTH = 16, 9
# bytes of fp32 rows: `NARROW` and `WIDE` stand for the inputs that were measured
NARROW, WIDE = (rows * LENGTH * CHANNELS * 4 for rows in (1, 3))
ROWS = {"small": LENGTH - 1, "narrow": LENGTH, "wide": 3 * LENGTH}


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> Iterator[None]:
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    monkeypatch.setenv(mamba_ssm_calls.REPEATABLE, "")
    monkeypatch.delenv(mamba_ssm_calls.REPEATABLE)
    forget()
    yield
    forget()


@pytest.fixture
def both(monkeypatch, tmp_path) -> None:
    """Triton in its interpreter beside the packages' stand-ins, with smaller bounds."""
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path)
    monkeypatch.setattr(dispatch, "_no_cuda", lambda device: None)
    monkeypatch.setattr(dispatch, "_no_triton", lambda: None)
    monkeypatch.setattr(mamba_ssm_calls, "CONV_NARROW", NARROW)
    monkeypatch.setattr(mamba_ssm_calls, "CONV_WIDE", WIDE)


@pytest.fixture
def asked(monkeypatch, both) -> list[str]:
    """Names of the functions that were called."""
    calls: list[str] = []
    found = {
        name: lambda *a, _f=f, _n=name, **k: (calls.append(_n), _f(*a, **k))[1]
        for name, f in mamba_ssm_calls.loaded().items()
    }
    monkeypatch.setattr(mamba_ssm_calls, "loaded", lambda: found)
    return calls


def drawn(tokens: int, channels: int = CHANNELS, width: int = 4) -> list[torch.Tensor]:
    """x [1, T, Ch], weight [Ch, W], bias [Ch]."""
    draw = torch.Generator().manual_seed(tokens)
    shapes = (1, tokens, channels), (channels, width), (channels,)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def derived(run: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients of all inputs, for a gradient that lies in wider rows."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = run(*leaves)
    draw = torch.Generator().manual_seed(1)
    wide = torch.randn(*y.shape[:2], y.shape[2] + 1, generator=draw).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, wide[..., 1:])]


def wanted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.silu(reference.causal_conv1d(x, weight, bias))


@pytest.mark.parametrize(
    ("size", "gradient", "led"),
    [("small", True, False), ("narrow", True, True), ("narrow", False, False),
     ("wide", True, True), ("wide", False, True)],
)  # fmt: skip
def test_it_gets_what_it_led_in(asked, size, gradient, led) -> None:
    inputs = drawn(ROWS[size])
    if gradient:
        found = derived(dispatch.causal_conv1d_silu, inputs)
        expected = derived(wanted, inputs)
    else:
        found, expected = [dispatch.causal_conv1d_silu(*inputs)], [wanted(*inputs)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert asked == [dispatch.CONV] * led


@pytest.mark.parametrize("why", ["documents", "previous", "channels", "width", "strided", "place",
                                 "bias", "switch", "version"])  # fmt: skip
def test_it_gets_nothing_else(monkeypatch, asked, why) -> None:
    """Nothing that was not measured, and nothing that it would refuse or compute otherwise."""
    x, weight, bias = drawn(
        ROWS["wide"] + 4, channels=20 if why == "channels" else 16, width=5 if why == "width" else 4
    )
    previous = numbers = None
    if why == "documents":
        numbers = torch.zeros(1, x.shape[1], dtype=torch.int32)
    elif why == "previous":
        previous = torch.zeros(1, 3, 16)
    elif why == "strided":
        x = torch.cat([x, x], 2)[..., :16]
    elif why == "place":
        x = torch.cat([x.flatten(), torch.zeros(1)])[1:].view_as(x)
    elif why == "bias":
        bias = bias.bfloat16()
    elif why == "switch":
        monkeypatch.setenv(dispatch.SWITCH, "reference")
    else:
        monkeypatch.setattr(mamba_ssm_calls, "CONV_VERSION", "1.8.0")
    found = dispatch.causal_conv1d_silu(x, weight, bias, previous, numbers)
    torch.testing.assert_close(found, wanted(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert not asked


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_compiled_block_has_it_within_the_operator(asked, kind, biased) -> None:
    """One graph, and the gradients' types are those of the inputs."""
    inputs = [t.to(kind) for t in drawn(2 * ROWS["wide"])][: 2 + biased]

    def run(x, weight, bias=None) -> torch.Tensor:
        return dispatch.causal_conv1d_silu(x * 1, weight, bias)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
    found = derived(compiled, inputs)
    torch._dynamo.reset()
    expected = derived(lambda x, w, b=None: wanted(x, w, b), [t.double() for t in inputs])
    bound = 1e-5 if kind == torch.float32 else 2e-2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == kind
        assert float((ours - theirs).norm() / theirs.norm()) < bound
    assert asked == [dispatch.CONV, mamba_ssm_calls.CONV_BACKWARD]


@pytest.mark.parametrize("size", ["narrow", "wide"])
def test_a_narrow_operator_is_ours(asked, size) -> None:
    inputs = drawn(ROWS[size])
    found = derived(lambda *taps: operators.conv_silu(*taps, None, None), inputs)
    for ours, theirs in zip(found, derived(wanted, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert asked == ([dispatch.CONV, mamba_ssm_calls.CONV_BACKWARD] if size == "wide" else [])


def test_the_operator_with_it_is_what_compilers_expect(both) -> None:
    leaves = [t.requires_grad_() for t in drawn(ROWS["wide"])]
    torch.library.opcheck(
        operators.conv_silu,
        (*leaves, None, None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("chosen", [None, "0"])
def test_its_sums_are_repeatable_unless_a_person_says_otherwise(monkeypatch, both, chosen) -> None:
    if chosen:
        monkeypatch.setenv(mamba_ssm_calls.REPEATABLE, chosen)
    assert mamba_ssm_calls.missing("causal_conv1d") is None
    assert os.environ[mamba_ssm_calls.REPEATABLE] == (chosen or "1")


def test_doctor_says_when_it_is_live(monkeypatch, both) -> None:
    assert dispatch.backends("cpu")["causal-conv1d"] is None
    monkeypatch.setattr(mamba_ssm_calls, "CONV_VERSION", "1.8.0")
    mamba_ssm_calls.too_old.cache_clear()
    assert dispatch.backends("cpu")["causal-conv1d"].startswith("1.7.0 is older than 1.8.0")
    monkeypatch.setattr(dispatch, "_no_triton", lambda: "off")
    assert dispatch.backends("cpu")["causal-conv1d"].startswith("used beside Triton's kernels")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "tokens", "channels", "width"),
    [(1, 2, 8, 2), (3, 65, 24, 3), (2, 257, 136, 4), (5, 128, 64, 4)],
)
@pytest.mark.parametrize("way", ["eager", "operator", "compiled"])
def test_the_package_computes_the_same(
    monkeypatch, kind, rows, tokens, channels, width, way
) -> None:
    """Outputs and gradients against the reference in fp64, and the same bits in a second run."""
    if reason := mamba_ssm_calls.missing("causal_conv1d") or mamba_ssm_calls.too_old():
        pytest.skip(reason)
    for bound in ("CONV_NARROW", "CONV_WIDE"):
        monkeypatch.setattr(mamba_ssm_calls, bound, 0)
    asked: list[str] = []
    functions = {
        name: lambda *a, _f=f, _n=name, **k: (asked.append(_n), _f(*a, **k))[1]
        for name, f in mamba_ssm_calls.loaded().items()
    }
    monkeypatch.setattr(mamba_ssm_calls, "loaded", lambda: functions)
    draw = torch.Generator().manual_seed(tokens)
    shapes = (rows, tokens, channels), (channels, width), (channels,)
    inputs = [torch.randn(shape, generator=draw).to("cuda", kind) for shape in shapes]
    run: Callable[..., torch.Tensor] = dispatch.causal_conv1d_silu
    if way == "operator":
        run = lambda *taps: operators.conv_silu(*taps, None, None)  # noqa: E731
    elif way == "compiled":
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, dynamic=False)
    found, again = derived(run, inputs), derived(run, inputs)
    expected = derived(wanted, [t.double() for t in inputs])
    bound = 1e-5 if kind == torch.float32 else 2**-7
    for ours, second, theirs in zip(found, again, expected, strict=True):
        assert ours.dtype == kind and torch.equal(ours, second)
        assert float((ours - theirs).norm() / theirs.norm()) < bound
    backward = [] if way == "eager" else [mamba_ssm_calls.CONV_BACKWARD]
    assert asked == [dispatch.CONV, *backward] * 2
