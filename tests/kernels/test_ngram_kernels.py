"""Prompt lookup on the device drafts exactly what the reference drafter drafts."""

import pytest
import torch

from mambactl.decode.drafters import NgramDrafter
from mambactl.decode.sampler import Sampler, SamplingParams
from mambactl.kernels.decode.reference import ngram as reference

pytestmark = pytest.mark.one_in(3)

pytest.importorskip("triton")
kernels = pytest.importorskip("mambactl.kernels.decode.triton.ngram")

ROOM = 41


def texts(seed: int, count: int = 40, letters: int = 3) -> list[list[int]]:
    """Random texts of 1 to ROOM tokens over a small alphabet, so that matches abound."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, ROOM + 1, (count,), generator=generator).tolist()
    lengths[:4] = [1, 2, 3, ROOM]
    return [torch.randint(letters, (n,), generator=generator).tolist() for n in lengths]


def run(module, rows: list[list[int]], device: str, width: int, longest: int):
    """Drafts [B, width] and counts [B], with the rest of every text and buffer poisoned."""
    history = torch.full((len(rows), ROOM), 1, dtype=torch.int32, device=device)
    for row, text in enumerate(rows):
        history[row, : len(text)] = torch.tensor(text)
    lengths = torch.tensor([len(text) for text in rows], dtype=torch.int32, device=device)
    room = torch.full((len(rows), width + 2), -7, dtype=torch.int32, device=device)
    counts = torch.full_like(lengths, -7)
    module.draft_ngram(history, lengths, room[:, 1:], width, counts, longest=longest)
    assert (room[:, 0] == -7).all() and (room[:, width + 1 :] == -7).all()
    return room[:, 1 : width + 1].tolist(), counts.tolist()


def expected(rows: list[list[int]], width: int, longest: int):
    drafter = NgramDrafter(longest)
    drafter.start(rows, Sampler(SamplingParams(), range(len(rows)), "cpu"))
    limits = [width] * len(rows)
    proposal = drafter.propose(limits, torch.zeros(len(rows), dtype=torch.long))
    found = [
        tokens[:count] + [0] * (width - count)
        for tokens, count in zip(proposal.tokens.tolist(), proposal.lengths.tolist(), strict=True)
    ]
    return found, proposal.lengths.tolist()


@pytest.mark.parametrize("letters", [2, 3, 12])
@pytest.mark.parametrize("width, longest", [(1, 1), (3, 3), (6, 4)])
def test_reference_drafts_as_the_drafter(letters, width, longest) -> None:
    for seed in range(10):
        rows = texts(seed, letters=letters)
        assert run(reference, rows, "cpu", width, longest) == expected(rows, width, longest)


@pytest.mark.parametrize("block", [8, 1024])
@pytest.mark.parametrize("width, longest", [(1, 1), (3, 3), (6, 4)])
def test_kernel_drafts_as_the_drafter(device, monkeypatch, block, width, longest) -> None:
    monkeypatch.setattr(kernels, "BLOCK", block)
    for seed, letters in enumerate([2, 3, 12]):
        rows = texts(100 + seed, letters=letters)
        assert run(kernels, rows, device, width, longest) == expected(rows, width, longest)


def test_text_written_by_the_drafter_itself_counts(device) -> None:
    """A match may run into the suffix it continues, and ends with the text."""
    rows = [[5, 5], [4, 5, 4, 5], [1, 2, 3, 1, 2], [7], [1, 2, 3]]
    drafts, counts = run(kernels, rows, device, 4, 3)
    assert drafts == [[5, 0, 0, 0], [4, 5, 0, 0], [3, 1, 2, 0], [0] * 4, [0] * 4]
    assert counts == [1, 2, 3, 0, 0]


def test_an_empty_text_drafts_nothing(device) -> None:
    assert run(kernels, [[], [3, 3]], device, 2, 3) == ([[0, 0], [3, 0]], [0, 1])
