"""The causal convolution, its window across calls, and packed documents."""

import pytest
import torch
import torch.nn.functional as F

from mambactl.kernels import reference as kernels

pytestmark = pytest.mark.one_in(3)

CHANNELS, WIDTH = 11, 4


@pytest.fixture
def drawn():
    """x [2, 41, Ch], weight [Ch, W], bias [Ch], window [2, W-1, Ch]."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 41, CHANNELS), (CHANNELS, WIDTH), (CHANNELS,), (2, WIDTH - 1, CHANNELS)]
    return [torch.randn(shape, generator=g) for shape in shapes]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("length", [1, 2, 41])
def test_equals_the_library_convolution(drawn, length, biased) -> None:
    x, weight, bias, previous = drawn
    x, bias = x[:, :length], bias if biased else None
    for before in (None, previous):
        left = torch.zeros_like(previous) if before is None else before
        padded = torch.cat([left, x], 1).transpose(1, 2)
        expected = F.conv1d(padded, weight[:, None], bias, groups=CHANNELS).transpose(1, 2)
        torch.testing.assert_close(
            kernels.causal_conv1d(x, weight, bias, before), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_split_in_time_is_bitwise_equal(drawn, dtype) -> None:
    x, weight, bias, previous = (t.to(dtype) for t in drawn)
    whole = kernels.causal_conv1d(x, weight, bias, previous)
    for lengths in ([1] * 41, [2, 3, 1, 35], [40, 1], [5, 0, 36]):
        outputs, held = [], previous
        for part in x.split(lengths, 1):
            outputs.append(kernels.causal_conv1d(part, weight, bias, held))
            held = kernels.latest_inputs(part, held, None)
        assert torch.equal(torch.cat(outputs, 1), whole)
        assert torch.equal(held, x[:, -(WIDTH - 1) :])


@pytest.mark.parametrize("rows", ["border", "ragged", "returning"])
def test_packed_documents_equal_the_documents_apart(drawn, packed_rows, rows) -> None:
    x, weight, bias, previous = drawn
    seq_idx = packed_rows[rows](41)
    packed = kernels.causal_conv1d(x, weight, bias, previous, seq_idx)
    for row in range(2):
        numbers = seq_idx[row].tolist()
        starts = [t for t in range(41) if t == 0 or numbers[t] != numbers[t - 1]]
        for start, stop in zip(starts, [*starts[1:], 41], strict=True):
            # what came before the row belongs to its first document
            before = previous[row : row + 1] if start == 0 else None
            alone = kernels.causal_conv1d(x[row : row + 1, start:stop], weight, bias, before)
            assert torch.equal(packed[row, start:stop], alone[0])


def test_window_after_a_ragged_call(drawn) -> None:
    x, _, _, previous = drawn
    for counts in ([0, 1], [2, 3], [41, 17]):
        ragged = kernels.latest_inputs(x, previous, torch.tensor(counts))
        for row, count in enumerate(counts):
            inputs = torch.cat([previous[row], x[row, :count]])
            assert torch.equal(ragged[row], inputs[-(WIDTH - 1) :])
    for length in (0, 1, 2, 3, 4):
        for counts in ([0, 0], [0, length], [length, max(length - 1, 0)]):
            part = x[:, :length].clone()
            wanted = torch.stack([
                torch.cat([previous[row], part[row, :count]])[-(WIDTH - 1) :]
                for row, count in enumerate(counts)
            ])  # fmt: skip
            for row, count in enumerate(counts):
                part[row, count:] = float("nan")
            found = kernels.latest_inputs(part, previous, torch.tensor(counts))
            assert torch.equal(found, wanted)
    full = kernels.latest_inputs(x, previous, torch.tensor([41, 41]))
    assert torch.equal(full, kernels.latest_inputs(x, previous, None))


def test_a_window_holds_no_memory_of_the_row_it_comes_from(drawn) -> None:
    x, _, _, previous = drawn
    for count in (None, torch.tensor([41, 17])):
        kept = kernels.latest_inputs(x, previous, count)
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
