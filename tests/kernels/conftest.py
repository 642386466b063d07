"""Random kernel inputs with decays from almost none to almost total."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mambactl.kernels import reference as kernels


class Inputs(NamedTuple):
    """Arguments of `ssd` or `selective_scan`, and a state to start from."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Tensor

    @property
    def records(self) -> kernels.Records:
        return self.x, self.dt, self.B

    def double(self) -> "Inputs":
        return Inputs(*(t.double() for t in self))

    def to(self, device: str) -> "Inputs":
        """On that device."""
        return Inputs(*(t.to(device) for t in self))

    def tokens(self, start: int, stop: int) -> "Inputs":
        """The same sequence between two positions."""
        x, dt, B, C = (t[:, start:stop] for t in (self.x, self.dt, self.B, self.C))
        return Inputs(x, dt, self.A, B, C, self.state)


@pytest.fixture(scope="session")
def device() -> str:
    """The device that Triton kernels run on: the GPU, or the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _steps(generator: torch.Generator, *shape: int) -> Tensor:
    """dt log-uniform in [0.001, 1]."""
    return 10 ** (-3 * torch.rand(shape, generator=generator))


@pytest.fixture(scope="session")
def draw_ssd() -> Callable[..., Inputs]:
    """draw_ssd(batch, length, groups=2, heads=4, width=8, size=6, seed=0) for Mamba-2."""

    def draw(batch, length, groups=2, heads=4, width=8, size=6, seed=0) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        return Inputs(
            torch.randn(batch, length, heads, width, generator=g),
            _steps(g, batch, length, heads),
            -(1 + 15 * torch.rand(heads, generator=g)),
            torch.randn(batch, length, groups, size, generator=g),
            torch.randn(batch, length, groups, size, generator=g),
            torch.randn(batch, heads, width, size, generator=g),
        )

    return draw


@pytest.fixture(scope="session")
def draw_scan() -> Callable[..., Inputs]:
    """draw_scan(batch, length, groups=2, channels=12, size=6, seed=0) for Mamba-1."""

    def draw(batch, length, groups=2, channels=12, size=6, seed=0) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        return Inputs(
            torch.randn(batch, length, channels, generator=g),
            _steps(g, batch, length, channels),
            -(1 + 15 * torch.rand(channels, size, generator=g)),
            torch.randn(batch, length, groups, size, generator=g),
            torch.randn(batch, length, groups, size, generator=g),
            torch.randn(batch, channels, size, generator=g),
        )

    return draw


@pytest.fixture(scope="session")
def assert_near() -> Callable[..., None]:
    """assert_near(actual, expected, rel=1e-5): largest error over the largest expected value."""

    def check(actual: Tensor, expected: Tensor, rel: float = 1e-5) -> None:
        assert actual.shape == expected.shape
        scale = expected.double().abs().max().clamp(min=1e-12)
        error = (actual.double() - expected.double()).abs().max() / scale
        assert error <= rel, f"relative error {error:.2e}"

    return check


@pytest.fixture(scope="session")
def packed_rows() -> dict[str, Callable[[int], Tensor]]:
    """Ways to number the documents of two packed rows of T tokens."""

    def border(length: int, chunk: int = 16) -> Tensor:
        return (torch.arange(length) // chunk).expand(2, length)

    def ragged(length: int) -> Tensor:
        cuts = torch.tensor([[3, 17, 18], [1, 40, 63]])
        return (torch.arange(length) >= cuts[..., None]).sum(1)

    def returning(length: int) -> Tensor:
        """Number 7 comes back after a document of one token, and after one of 19."""
        row = torch.full((length,), 7)
        row[5:6], row[20:39] = 9, 8
        return torch.stack([row, row.flip(0)])

    return {"border": border, "ragged": ragged, "returning": returning}
