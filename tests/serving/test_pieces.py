"""Tokens of prompts between two steps, by how long reading takes."""

import pytest

from mambactl.serving import running


@pytest.mark.parametrize(
    ("launch", "token", "found"),
    [
        # launching takes longer than running: a longer piece costs nothing
        (0.08, 1e-7, 20_000),
        # 50 ms are 2,500 tokens
        (0.0, 2e-5, 2048),
        # even the least piece takes longer
        (0.0, 1e-2, running.LEAST_PIECE),
        # twice as many would take more than half as long again
        (0.06, 1e-5, 8192),
    ],
)
def test_a_piece_is_as_long_as_costs_little(monkeypatch, launch, token, found) -> None:
    read = []

    def seconds(target, draft, *lengths: int) -> float:
        read.append(max(lengths))
        return launch + token * sum(lengths)

    monkeypatch.setattr(running, "_read", seconds)
    piece = running.fitting_piece(None, None, longest=1024, at_once=20_000)
    assert piece == found and max(read) <= 1024
