"""Filters and draws on the device against the decode module and against float64.

Thresholds must be equal; with top-p they may differ only where the mass at the border is within
1e-6 of top_p. log_mass: 4e-6 absolute. Tokens: equal but for one in 5,000 (or one, of fewer).
"""

import math

import pytest
import torch
from torch import Tensor

from mambactl.decode.sampler import draw, filtered_probs, uniform
from mambactl.kernels.decode.reference import verdict as reference
from mambactl.kernels.random import Stream, keys_under

pytestmark = pytest.mark.one_in(3)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("mambactl.kernels.decode.triton.verdict")
drawing = pytest.importorskip("mambactl.kernels.decode.triton.drawing")

SIZES = [97, 5003]
# the interpreter takes 10 ms per drawn token
MANY = 5000 if torch.cuda.is_available() else 200
# temperature, top_k, top_p
SETTINGS = [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 1, 1.0), (0.7, 5, 1.0), (3.0, 40, 1.0), (1.0, 9999, 1.0),
    (1.0, 0, 0.9), (0.37, 0, 0.5), (1.0, 0, 1e-6), (2.0, 0, 0.999), (0.7, 20, 0.79), (1.1, 1, 0.3),
]  # fmt: skip


def rows_of_every_kind(size: int, seed: int) -> Tensor:
    """Logits [10, size] that crowd, tie, spread widely or do not exist."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(10, size, generator=generator)
    absent = torch.rand(size, generator=generator) < 0.4
    few = torch.full((size,), float("-inf"))
    few[seed % size], few[size // 2] = -1.5, 3.0
    return torch.stack([
        noise[0] * 3, noise[1] * 4 - 20, noise[2].mul(2).round(), (noise[3] * 3).bfloat16().float(),
        (noise[4] * 3).masked_fill(absent, float("-inf")), torch.full((size,), 0.25),
        noise[6] * 1e-3 + 12, (noise[7] * 12).exp() * noise[7].sign(), few,
        torch.where(absent, noise[9].sign() * 0.0, noise[9] * 1e-20),
    ])  # fmt: skip


def settings_of(values: tuple[float, float, float], device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def filtered(module, logits: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
    """Threshold and log_mass of rows [..., V], shaped [...]; the outputs start as NaN."""
    flat = logits.reshape(-1, logits.shape[-1])
    outputs = [torch.full(flat.shape[:1], float("nan"), device=flat.device) for _ in range(2)]
    module.filter_rows(flat, settings, *outputs)
    return outputs[0].view(logits.shape[:-1]), outputs[1].view(logits.shape[:-1])


def kept_by_hand(row: list[float], top_k: int, top_p: float) -> list[bool]:
    """Top-k and top-p of scaled logits in float64, one distinct value after the other."""
    ranked = sorted((value for value in row if value > -math.inf), reverse=True)
    if top_k > 0:
        ranked = [v for v in ranked if v >= ranked[min(top_k, len(ranked)) - 1]]
    weights = [math.exp(value - ranked[0]) for value in ranked]
    total, border = math.fsum(weights), ranked[-1]
    for value in sorted(set(ranked), reverse=True) if top_p < 1 else []:
        before = math.fsum(w for w, v in zip(weights, ranked, strict=True) if v >= value)
        if before >= top_p * total:
            border = value
            break
    return [value >= border for value in row]


@pytest.mark.parametrize("values", SETTINGS)
def test_reference_keeps_what_float64_keeps(values) -> None:
    settings = settings_of(values)
    for seed in range(3):
        logits = rows_of_every_kind(97, seed)
        threshold, log_mass = filtered(reference, logits, settings)
        probs = reference.probabilities(logits, settings, threshold, log_mass)
        torch.testing.assert_close(probs, filtered_probs(logits, *values))
        scaled = logits / settings[0]
        for row in range(len(logits)):
            kept = torch.tensor(kept_by_hand(scaled[row].tolist(), values[1], settings[2].item()))
            assert torch.equal(scaled[row] >= threshold[row], kept), row
            exact = scaled[row].double().masked_fill(~kept, float("-inf")).softmax(-1)
            torch.testing.assert_close(probs[row], exact.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("values", SETTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_filter_kernel_equals_the_reference(device, size, values) -> None:
    settings = settings_of(values, device)
    logits = rows_of_every_kind(size, size).to(device)
    expected, mass = filtered(reference, logits, settings)
    actual, log_mass = filtered(kernels, logits, settings)
    for row in (actual != expected).nonzero().flatten().tolist():
        assert settings[2] < 1, f"row {row}: {actual[row]} instead of {expected[row]}"
        border = torch.maximum(actual[row], expected[row])
        scaled = (logits[row] / settings[0]).double()
        floor = reference.smallest_kept(scaled, int(settings[1]), 1.0)
        probs = scaled.masked_fill(scaled < floor, float("-inf")).softmax(-1)
        assert abs(probs[scaled >= border].sum() - settings[2]) < 1e-6, row
        mass[row] = log_mass[row]
    torch.testing.assert_close(log_mass, mass, rtol=1e-6, atol=4e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_poisoned_rows_end_and_leave_others_alone(device) -> None:
    logits = rows_of_every_kind(97, 5).to(device)
    settings = settings_of((0.8, 7, 0.9), device)
    alone = filtered(kernels, logits, settings)
    padded = torch.cat([torch.full_like(logits[:1], float("nan")), logits])
    padded[:1, ::2] = float("-inf")
    together = filtered(kernels, padded, settings)
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(first, second[1:])


@triton.jit
def _uniform_kernel(seed, keys, positions, stream, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    key, position = tl.load(keys + index), tl.load(positions + index)
    tl.store(out + index, drawing.uniform(tl.load(seed), key, position, stream))


def test_uniform_numbers_are_the_same_bits(device) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**62), 2**62, (256,), generator=generator).to(device)
    positions = torch.randint(2**31 - 1, (256,), generator=generator).int().to(device)
    for seed in (0, 7, -5, 2**63 - 1):
        out = torch.empty(256, dtype=torch.double, device=device)
        held = torch.tensor([seed], device=device)
        for stream in Stream:
            _uniform_kernel[(1,)](held, keys, positions, int(stream), out, SIZE=256)
            assert torch.equal(out, uniform(seed, keys, positions.long(), stream))


def drawn(module, table: Tensor, settings: Tensor, keys: Tensor, offset: int) -> Tensor:
    """Tokens [R] of table [N, V] row key % N, at position key % 7 + offset, in a strided output."""
    out = torch.full((len(keys), 3), -7, dtype=torch.int32, device=table.device)
    rows = keys % len(table)
    threshold, log_mass = (values[rows] for values in filtered(module, table, settings))
    positions = (keys % 7).int()
    seed = torch.tensor([11], device=table.device)
    module.draw_rows(
        table[rows], settings, threshold, log_mass, keys, positions, seed, Stream.PROPOSE,
        out[:, 1], offset=offset,
    )  # fmt: skip
    assert (out[:, ::2] == -7).all()
    return out[:, 1].long()


def assert_nearly_equal(actual: Tensor, expected: Tensor) -> None:
    assert (actual != expected).sum() <= max(1, actual.numel() // 5000)


@pytest.mark.parametrize("size, rows", [(97, MANY), (5003, MANY // 4)])
@pytest.mark.parametrize("values", [(1.0, 0, 1.0), (0.8, 30, 0.9)])
def test_draws_equal_those_of_the_decode_module(device, size, rows, values) -> None:
    generator = torch.Generator().manual_seed(size)
    table = (2 * torch.randn(8, size, generator=generator)).to(device)
    table[:, size - 3 :] = float("-inf")
    settings, keys = settings_of(values, device), torch.arange(rows, device=device)
    numbers = uniform(11, keys, keys % 7 + 2, Stream.PROPOSE)
    expected = draw(filtered_probs(table, *values)[keys % 8], numbers)
    assert len(set(expected.tolist())) > 15
    assert_nearly_equal(drawn(kernels, table, settings, keys, 2), expected)
    assert_nearly_equal(drawn(reference, table, settings, keys, 2), expected)


@pytest.mark.parametrize("values", SETTINGS[:10:3])
def test_draws_follow_the_distribution(values) -> None:
    keys = torch.arange(20000)
    for seed in range(3):
        row = rows_of_every_kind(97, seed)[seed]
        settings = settings_of(values)
        tokens = drawn(reference, row[None], settings, keys, 0)
        assert p_value(torch.bincount(tokens, minlength=97), filtered_probs(row, *values)) > 1e-4


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Pearson's chi-square test; cells expected below 5 are pooled, impossible ones are empty."""
    counts, expected = counts.double(), probs.double() / probs.sum() * counts.sum()
    assert counts[probs == 0].sum() == 0
    rare = expected < 5
    observed, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    used = expected > 0
    if used.sum() == 1:
        return 1.0
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    return torch.special.gammaincc((used.sum() - 1) / 2, statistic / 2).item()


def test_every_sequence_has_its_own_settings(device) -> None:
    """Runs of rows, two a sequence, filtered and drawn from as if each were alone."""
    logits = rows_of_every_kind(97, seed=4).to(device)
    every = torch.stack([settings_of(values, device) for values in SETTINGS[3:8]])
    keys = torch.arange(len(logits), device=device)
    positions = torch.arange(len(logits), dtype=torch.int32, device=device)
    seed = torch.tensor([5], device=device)
    for module in (reference, kernels):
        threshold, log_mass = filtered(module, logits, every)
        tokens = torch.zeros(len(logits), dtype=torch.int32, device=device)
        given = keys, positions, seed, int(Stream.EMIT)
        module.draw_rows(logits, every, threshold, log_mass, *given, tokens)
        for number, settings in enumerate(every):
            rows = slice(2 * number, 2 * number + 2)
            alone = filtered(module, logits[rows].contiguous(), settings)
            torch.testing.assert_close((threshold[rows], log_mass[rows]), alone, atol=0, rtol=0)
            one = torch.zeros(2, dtype=torch.int32, device=device)
            own = keys[rows], positions[rows], *given[2:]
            module.draw_rows(logits[rows].contiguous(), settings, *alone, *own, one)
            assert tokens[rows].tolist() == one.tolist()


def test_a_key_stands_for_another_seed() -> None:
    positions = torch.arange(50)
    seeds, keys = (0, 2**63 + 5, -7), (0, 3, 2**40)
    for seed, key, other in zip(seeds, keys, keys_under(9, seeds, keys), strict=True):
        expected = uniform(seed, torch.full_like(positions, key), positions, Stream.EMIT)
        moved = torch.full_like(positions, other)
        assert uniform(9, moved, positions, Stream.EMIT).tolist() == expected.tolist()
