"""Models of every kind of layer, and random tokens."""

from collections.abc import Callable

import pytest
import torch
from conftest import tiny_config
from torch import Tensor

from mambactl.models.mixers.mamba1 import Mamba1Settings
from mambactl.models.mixers.mamba2 import mamba2_from_attention
from mambactl.models.mixers.mamba2_decode import Mamba2Settings

NATIVE_MAMBA2 = Mamba2Settings(
    n_heads=4, head_dim=8, d_state=12, x_heads=4, b_groups=1, c_groups=1, norm_groups=1
)
NATIVE_MAMBA1 = Mamba1Settings(d_inner=40, dt_rank=3, d_state=6, native=True)
ROTARY_MAMBA2 = mamba2_from_attention(tiny_config(["attention"]), proj_bias=True, rotary=True)
LAYOUTS = {
    "attention": {"mixers": ["attention"] * 2},
    "mamba2": {"mixers": ["mamba2"] * 2},
    "mamba1": {"mixers": ["mamba1"] * 2},
    "mixed": {"mixers": ["mamba2", "attention", "mamba1"]},
    "rotary": {"mixers": ["mamba2", "attention", "mamba2"], "mamba2": ROTARY_MAMBA2},
    "windowed": {"mixers": ["mamba2_window", "attention", "mamba2_window"]},
    "kept heads": {"mixers": ["mamba2_mixed", "attention", "mamba2_mixed"]},
    "native2": {"mixers": ["mamba2"] * 2, "mamba2": NATIVE_MAMBA2, "has_mlp": False},
    "native1": {"mixers": ["mamba1"] * 2, "mamba1": NATIVE_MAMBA1, "has_mlp": False},
}


@pytest.fixture(params=LAYOUTS)
def any_model(request, make_hybrid):
    """A tiny model of each layout in turn."""
    return make_hybrid(**LAYOUTS[request.param], seed=3)


@pytest.fixture
def windowed_model(make_hybrid):
    """Mamba-2 layers with a window of 7 tokens and 3 sinks around one of attention."""
    return make_hybrid(**LAYOUTS["windowed"], seed=3)


@pytest.fixture
def mixed_model(make_hybrid):
    """One layer of each mixer."""
    return make_hybrid(**LAYOUTS["mixed"], seed=3)


@pytest.fixture(scope="session")
def draw_ids() -> Callable[..., Tensor]:
    """draw_ids(batch, length, seed=0) -> tokens [B, T] without special ones."""

    def draw(batch: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 97, (batch, length), generator=generator)

    return draw


@pytest.fixture(scope="session")
def uncached() -> Callable[..., Tensor]:
    """uncached(model, ids) -> logits [B, T, V] of one forward without a cache."""

    def forward(model, ids: Tensor, **kwargs) -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False, **kwargs).logits

    return forward


@pytest.fixture(scope="session")
def read() -> Callable[..., Tensor]:
    """read(model, cache, ids, n_new=None) -> logits [B, T, V], advancing the cache."""

    def forward(model, cache, ids: Tensor, n_new: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return model(ids, past_key_values=cache, n_new=n_new).logits

    return forward


@pytest.fixture(scope="session")
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """assert_close(actual, expected): 2e-5 of the largest expected value."""

    def check(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max().clamp(min=1e-6))
        )

    return check
