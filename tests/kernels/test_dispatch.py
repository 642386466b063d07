"""Choice of the implementation of each call; all of them mean the same."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

from mambactl.errors import UsageError
from mambactl.kernels import dispatch, mamba_ssm_calls, reference


def forget() -> None:
    cached = dispatch._no_cuda, dispatch._no_triton, mamba_ssm_calls._load, mamba_ssm_calls.loaded
    for each in cached:
        getattr(each, "cache_clear", lambda: None)()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def everywhere(monkeypatch) -> None:
    """Triton kernels serve a CPU too; those that run take tensors of `device`."""
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_no_cuda", lambda device: None)
    monkeypatch.setattr(dispatch, "_no_triton", lambda: None)
    monkeypatch.setattr(mamba_ssm_calls, "loaded", dict)


def forbid(monkeypatch, *names: str) -> None:
    def refuse(*args, **keywords):
        raise AssertionError("the reference was called")

    for name in names:
        monkeypatch.setattr(reference, name, refuse)


def test_on_a_cpu_everything_is_the_reference(draw_ssd, draw_scan) -> None:
    inputs, scan = draw_ssd(2, 70), draw_scan(2, 9)
    assert torch.equal(dispatch.ssd(*inputs)[0], reference.ssd(*inputs)[0])
    assert torch.equal(dispatch.selective_scan(*scan)[0], reference.selective_scan(*scan)[0])
    x, weight = scan.x, torch.randn(12, 4)
    expected = F.silu(reference.causal_conv1d(x, weight, None))
    assert torch.equal(dispatch.causal_conv1d_silu(x, weight, None), expected)
    assert dispatch.triton_missing("cpu") == "needs a CUDA device"
    assert set(dispatch.backends("cpu")) == {"triton", "mamba-ssm", "causal-conv1d"}


def test_grouped_heads_are_repeated_for_the_reference(draw_ssd) -> None:
    inputs = draw_ssd(1, 20, heads=4)
    grouped = inputs.x[:, :, ::2]
    wide = grouped.repeat_interleave(2, 2)
    actual = dispatch.ssd(grouped, *inputs[1:])
    expected = reference.ssd(wide, *inputs[1:])
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_triton_serves_plain_calls(
    monkeypatch, everywhere, device, draw_ssd, draw_scan, assert_near
) -> None:
    inputs, scan, weight = draw_ssd(1, 20, heads=2), draw_scan(1, 5, 1, 8), torch.randn(8, 4)
    expected = (
        reference.ssd(*inputs),
        reference.selective_scan(*scan),
        (F.silu(reference.causal_conv1d(scan.x, weight, None)),),
    )
    forbid(monkeypatch, "ssd", "selective_scan", "causal_conv1d")
    inputs, scan, weight = inputs.to(device), scan.to(device), weight.to(device)
    actual = (
        dispatch.ssd(*inputs),
        dispatch.selective_scan(*scan),
        (dispatch.causal_conv1d_silu(scan.x, weight, None),),
    )
    for got, wanted in zip(actual, expected, strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert_near(a.cpu(), b, 2e-5)


@pytest.mark.parametrize("why", ["fp64", "fp16", "mixed", "switch"])
def test_the_reference_serves_what_triton_cannot(monkeypatch, everywhere, draw_ssd, why) -> None:
    inputs = draw_ssd(1, 20, heads=2)
    if why == "fp64":
        inputs = inputs.double()
    elif why == "fp16":
        inputs = inputs._replace(x=inputs.x.half(), B=inputs.B.half(), C=inputs.C.half())
    elif why == "mixed":
        inputs = inputs._replace(x=inputs.x.bfloat16())
    else:
        monkeypatch.setenv(dispatch.SWITCH, "reference")
        assert dispatch.backends()["triton"] == "turned off by MAMBACTL_KERNELS=reference"
    expected = reference.ssd(*inputs)
    actual = dispatch.ssd(*inputs)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_triton_serves_gradients_and_documents(
    monkeypatch, everywhere, device, draw_ssd, assert_near, gradient, packed
) -> None:
    inputs, weight = draw_ssd(1, 20, heads=2), torch.randn(8, 4)
    numbers = torch.tensor([7] * 5 + [3] * 8 + [7] * 7)[None] if packed else None

    def run(kernels, convolve, entry: str) -> list[torch.Tensor]:
        """Compute a result on that device, and the gradients if asked for."""
        # leaves of their own: on a CPU `to` would return those of the other run
        leaves = [t.to(entry).detach().requires_grad_(gradient) for t in (*inputs, weight)]
        documents = None if numbers is None else numbers.to(entry)
        outputs = [*kernels.ssd(*leaves[:6], documents)]
        outputs.append(convolve(leaves[0][:, :, 0], leaves[6], None, None, documents))
        assert all(t.requires_grad == gradient for t in outputs)
        sums = sum(t.sum() for t in outputs)
        return outputs + ([*torch.autograd.grad(sums, leaves)] if gradient else [])

    expected = run(reference, lambda *args: F.silu(reference.causal_conv1d(*args)), "cpu")
    forbid(monkeypatch, "ssd", "causal_conv1d")
    actual = run(dispatch, dispatch.causal_conv1d_silu, device)
    for got, wanted in zip(actual, expected, strict=True):
        assert_near(got.detach().cpu(), wanted.detach(), 2e-5)


def test_the_gradient_of_a_window_is_the_references(monkeypatch, everywhere) -> None:
    x, weight, previous = torch.randn(1, 9, 8), torch.randn(8, 4), torch.randn(1, 3, 8)
    dispatch.causal_conv1d_silu(x, weight, None, previous.requires_grad_()).sum().backward()
    assert previous.grad.abs().sum() > 0


def test_without_gradient_mode_parameters_do_not_matter(
    monkeypatch, everywhere, device, draw_scan
) -> None:
    inputs = draw_scan(1, 3, 1, 8).to(device)
    inputs = inputs._replace(A=inputs.A.requires_grad_())
    forbid(monkeypatch, "selective_scan")
    with torch.no_grad():
        dispatch.selective_scan(*inputs)
    with pytest.raises(AssertionError, match="reference"):
        dispatch.selective_scan(*inputs)


def test_a_model_reads_prompts_through_the_kernels(
    monkeypatch, everywhere, device, make_hybrid
) -> None:
    from mambactl.decode.prefill import prefill

    model = make_hybrid(["mamba2", "mamba1"]).to(device)
    prompts = [[*range(5, 27)], [7, 8, 9]]
    with torch.no_grad():
        actual = prefill(model, prompts, recording=False)[0]
        monkeypatch.setenv(dispatch.SWITCH, "reference")
        expected = prefill(model, prompts, recording=False)[0]
    for got, wanted in zip(actual.layers, expected.layers, strict=True):
        assert not torch.equal(got.state, wanted.state)
        torch.testing.assert_close(got.state, wanted.state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.inputs, wanted.inputs, rtol=1e-4, atol=1e-5)


# operations that one kernel does in inference, each with its inputs as widths of random numbers
FUSIONS = {
    "rms_norm": lambda draw: (draw(2, 5, 24), draw(24), 1e-5),
    "swiglu": lambda draw: (draw(2, 5, 24), draw(2, 5, 24)),
    "rotated": lambda draw: (draw(2, 3, 5, 8), draw(2, 1, 5, 8), draw(2, 1, 5, 8)),
    "gated_norm": lambda draw: (
        draw(2, 5, 4, 6), draw(2, 5, 24), draw(2, 5, 2, 6), draw(4), draw(24), 4, 1e-5,
        torch.float32,
    ),
}  # fmt: skip


def arguments_of(name: str, device: str = "cpu") -> tuple:
    draw = torch.Generator().manual_seed(len(name))
    return FUSIONS[name](lambda *shape: torch.randn(shape, generator=draw).to(device))


@pytest.fixture
def no_fusion(monkeypatch) -> None:
    from mambactl.kernels.sequence import norm, pointwise

    def refuse(*args):
        raise AssertionError("a kernel was called")

    for name in FUSIONS:
        monkeypatch.setattr(norm if hasattr(norm, name) else pointwise, name, refuse)


@pytest.mark.parametrize("name", FUSIONS)
def test_one_kernel_serves_inference(monkeypatch, everywhere, device, assert_near, name) -> None:
    arguments = arguments_of(name, device)
    expected = getattr(reference, name)(*arguments)
    forbid(monkeypatch, name)
    with torch.no_grad():
        found = getattr(dispatch, name)(*arguments)
    assert_near(found, expected, 1e-6)


@pytest.mark.parametrize("why", ["cpu", "fp64", "gradient", "compiler", "subclass", "switch"])
@pytest.mark.parametrize("name", FUSIONS)
def test_pytorch_s_operations_serve_all_else(
    monkeypatch, request, everywhere, no_fusion, name, why
) -> None:
    """The last tensor alone is enough."""
    arguments = list(arguments_of(name))
    last = max(i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor))
    if why == "fp64":
        arguments[last] = arguments[last].double()
    elif why == "gradient":
        arguments[last].requires_grad_()
    elif why == "subclass":
        arguments[last] = arguments[last].as_subclass(type("Sharded", (torch.Tensor,), {}))
    elif why == "compiler":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif why == "switch":
        monkeypatch.setenv(dispatch.SWITCH, "reference")
    else:
        monkeypatch.setattr(dispatch, "_no_cuda", lambda device: "needs a CUDA device")
    expected = getattr(reference, name)(*arguments)
    found = getattr(dispatch, name)(*arguments)
    assert torch.equal(found, expected) and found.requires_grad == (why == "gradient")


def test_a_model_s_blocks_are_those_of_pytorch(
    monkeypatch, everywhere, device, make_hybrid
) -> None:
    """A prompt and a token behind it, in bf16, come as near to fp32 as with PyTorch."""
    model = make_hybrid(["mamba2", "attention"]).bfloat16().to(device)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, 9), generator=draw).to(device)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            start = model(ids[:, :8], use_cache=True)
            after = model(ids[:, 8:], past_key_values=start.past_key_values)
        return torch.cat([start.logits, after.logits], 1).float()

    found = logits()
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    eager = logits()
    model.float()
    exact = logits()
    assert not torch.equal(found, eager)
    ours, theirs = ((t - exact).norm() / exact.norm() for t in (found, eager))
    assert ours <= 1.2 * theirs


def test_another_activation_is_called(everywhere, no_fusion) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    from mambactl.models.mlp import GatedMLP

    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_attention_heads=2, hidden_act="gelu"
    )
    ours, theirs = GatedMLP(config), LlamaMLP(config)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_reasons_name_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dispatch.triton_missing() == "needs compute capability 8.0, cuda has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    dispatch._no_cuda.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.triton_missing().startswith("not installed")
    assert dispatch.package_missing("mamba_ssm").startswith("not installed")


def test_importing_the_dispatcher_does_not_import_triton() -> None:
    import subprocess

    code = (
        "import sys, mambactl.kernels.dispatch; "
        "parts = ('sequence', 'decode.triton', 'launch'); "
        "assert not {f'mambactl.kernels.{part}' for part in parts} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_word_is_refused(monkeypatch, draw_ssd) -> None:
    monkeypatch.setenv(dispatch.SWITCH, "mambassm")
    with pytest.raises(UsageError, match="MAMBACTL_KERNELS=mambassm is none of auto, reference"):
        dispatch.ssd(*draw_ssd(1, 5))
