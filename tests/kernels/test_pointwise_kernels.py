"""Norms, SwiGLU and rotations in one kernel against PyTorch's operations, and both against fp64.

PyTorch rounds after every operation, and so do the kernels. What may differ is the order of the sum
of squares and, in Triton's interpreter, the last bit of an exponential: then a result is the
neighbour of PyTorch's, rarely, and no further from fp64 in the mean.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from mambactl.kernels import reference  # noqa: E402
from mambactl.kernels.sequence import norm, pointwise  # noqa: E402

pytestmark = pytest.mark.one_in(3)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# of the largest result: some roundings of fp32, one of a half
NEAR = {FP32: 1e-6, BF16: 2**-7, FP16: 2**-10}
# results that may be PyTorch's neighbours in a half
SHARE = 0.005

kinds = pytest.mark.parametrize("kind", [BF16, FP32, FP16], ids=["bf16", "fp32", "fp16"])


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Every torch.empty is full of NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def draw(device, request):
    """draw(*shape, kind=..., scale=1) on the kernels' device, of other numbers in every test."""
    generator = torch.Generator().manual_seed(sum(map(ord, request.node.name)))

    def drawn(*shape, kind=FP32, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(kind).to(device)

    return drawn


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) else t


def check(found, name, *arguments):
    """`found` is as `reference.name` makes it, and as near to what it makes in fp64."""
    eager = getattr(reference, name)(*arguments)
    precise = [torch.float64 if isinstance(a, torch.dtype) else wide(a) for a in arguments]
    exact = getattr(reference, name)(*precise)
    kind = eager.dtype
    assert found.dtype == kind and found.shape == eager.shape == exact.shape
    scale = float(exact.abs().max())
    assert float((found.double() - eager.double()).abs().max()) <= NEAR[kind] * scale
    if kind != FP32:
        assert float((found != eager).double().mean()) <= SHARE
    ours, theirs = (float((t.double() - exact).abs().mean()) for t in (found, eager))
    assert ours <= 1.001 * theirs + 1e-8 * scale


@kinds
@pytest.mark.parametrize("rows, width", [(1, 1), (1, 4096), (37, 66), (3, 1500), (129, 8)])
def test_rms_norm(draw, kind, rows, width) -> None:
    x, weight = draw(rows, width, kind=kind, scale=3), 1 + draw(width, kind=kind)
    check(norm.rms_norm(x, weight, 1e-5), "rms_norm", x, weight, 1e-5)


@kinds
def test_rms_norm_of_strided_rows(draw, kind) -> None:
    """Parts of a product, rows cut short, transposed columns, and heads of a projection."""
    weight = draw(24, kind=kind)
    part = draw(2, 5, 40, kind=kind)[..., 8:32]
    cut = draw(2, 9, 24, kind=kind)[:, 2:7]
    columns = draw(2, 24, 5, kind=kind).mT
    heads = draw(2, 7, 3 * 24, kind=kind).unflatten(-1, (3, 24)).transpose(1, 2)
    for x in (part, cut, columns, heads):
        found = norm.rms_norm(x, weight, 1e-6)
        check(found, "rms_norm", x, weight, 1e-6)
    assert found.transpose(1, 2).is_contiguous()


def test_the_norm_of_zeros_and_of_huge_rows(draw) -> None:
    x = torch.stack([torch.zeros(40), torch.full((40,), 1e4), torch.full((40,), 1e-6)])
    x, weight = x.to(draw(1).device), draw(40)
    found = norm.rms_norm(x, weight, 1e-5)
    assert not found[0].any()
    check(found, "rms_norm", x, weight, 1e-5)


@kinds
def test_a_row_is_normed_alike_beside_others(draw, kind) -> None:
    x, weight = draw(9, 100, kind=kind), draw(100, kind=kind)
    whole = norm.rms_norm(x, weight, 1e-5)
    assert torch.equal(torch.cat([norm.rms_norm(row, weight, 1e-5) for row in x.split(1)]), whole)


@kinds
@pytest.mark.parametrize("rows, width", [(1, 1), (1, 1024), (37, 66), (2, 2500)])
def test_swiglu(draw, kind, rows, width) -> None:
    gate, up = (draw(rows, width, kind=kind, scale=4) for _ in range(2))
    check(pointwise.swiglu(gate, up), "swiglu", gate, up)


@kinds
def test_swiglu_of_both_halves_of_a_product(draw, kind) -> None:
    gate, up = draw(2, 5, 2 * 30, kind=kind).chunk(2, -1)
    check(pointwise.swiglu(gate, up), "swiglu", gate, up)
    check(pointwise.swiglu(gate.mT, up.mT), "swiglu", gate.mT, up.mT)


@pytest.mark.filterwarnings("ignore:overflow")
def test_the_gate_of_large_and_infinite_numbers(device) -> None:
    gate = torch.tensor([[0.0, -0.0, 90, -90, 1e30, -1e30, float("inf"), float("nan")]])
    gate, up = gate.to(device), torch.ones(1, 8, device=device)
    found, wanted = pointwise.swiglu(gate, up), reference.swiglu(gate, up)
    torch.testing.assert_close(found, wanted, equal_nan=True)


def angles(draw, kind, *shape):
    """Cosines and sines [..., N], both halves alike as Llama's."""
    drawn = draw(*shape[:-1], shape[-1] // 2, scale=3).repeat(*[1] * (len(shape) - 1), 2)
    return drawn.cos().to(kind), drawn.sin().to(kind)


@kinds
@pytest.mark.parametrize(
    "batch, heads, length, width", [(1, 1, 1, 2), (2, 3, 7, 12), (1, 5, 40, 64)]
)
def test_rotation_of_heads(draw, kind, batch, heads, length, width) -> None:
    """Views of a projection, in whose order the result lies, and tensors in their own."""
    cos, sin = (t.unsqueeze(1) for t in angles(draw, kind, batch, length, width))
    row = draw(batch, length, heads * width + 8, kind=kind)[..., 8:]
    view = row.unflatten(-1, (heads, width)).transpose(1, 2)
    for states in (view, view.contiguous()):
        found, eager = pointwise.rotated(states, cos, sin), reference.rotated(states, cos, sin)
        assert torch.equal(found, eager)
        assert found.dtype == kind
        assert found.stride() == eager.stride() or 1 in (heads, length)
    flipped = view.contiguous().mT.contiguous().mT
    assert torch.equal(pointwise.rotated(flipped, cos, sin), reference.rotated(flipped, cos, sin))


@kinds
def test_rotation_of_states_by_angles_that_broadcast(draw, kind) -> None:
    """Halves of their own, one row of angles for all sequences, heads behind positions."""
    states = draw(3, 5, 2, 6, kind=kind)
    cos, sin = draw(1, 5, 1, 6, kind=kind), draw(1, 5, 1, 6, kind=kind)
    assert torch.equal(pointwise.rotated(states, cos, sin), reference.rotated(states, cos, sin))


GROUPED = [
    # batch, length, heads, heads of x, head dim, groups
    (1, 1, 1, 1, 1, 1),
    (2, 5, 4, 2, 6, 4),
    (1, 3, 6, 3, 10, 2),
    (1, 2, 3, 3, 500, 1),
    (1, 9, 12, 2, 64, 12),
]


@pytest.mark.parametrize("out", [None, FP32], ids=["rounded", "whole"])
@kinds
@pytest.mark.parametrize("batch, length, heads, shared, width, groups", GROUPED)
def test_gated_norm(draw, kind, out, batch, length, heads, shared, width, groups) -> None:
    """y of the scan in fp32, z and x as views of products."""
    inner = heads * width
    y = draw(batch, length, heads, width)
    z = draw(batch, length, inner + 3, kind=kind)[..., :inner]
    x = draw(batch, length, shared * width + 5, kind=kind)[..., 5:].unflatten(-1, (shared, width))
    arguments = (y, z, x, draw(heads), draw(inner, kind=kind), groups, 1e-5, out or kind)
    check(norm.gated_norm(*arguments), "gated_norm", *arguments)


def test_gated_norm_of_outputs_that_are_rounded_already(draw) -> None:
    y, z, x = (draw(2, 3, *shape, kind=BF16) for shape in ((4, 6), (24,), (2, 6)))
    arguments = (y, z, x, draw(4), draw(24), 2, 1e-5, BF16)
    check(norm.gated_norm(*arguments), "gated_norm", *arguments)
