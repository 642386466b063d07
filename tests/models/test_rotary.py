"""States that turn with the position: what they compute, and who may have them.

That cached decoding, rollback, packing and padding change nothing is tested with all layouts.
"""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from mambactl.kernels.reference import rotate_states
from mambactl.models.mixers.mamba2 import mamba2_from_attention

HEADS, SIZE, LENGTH = 3, 16, 21


def rotary_of(positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) [B, T, N] as Llama's, of positions [B, T]."""
    angles = positions[..., None] * 100.0 ** (-torch.arange(SIZE // 2).double() / (SIZE // 2))
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, LENGTH, HEADS, SIZE, generator=generator, dtype=torch.float64)


def test_each_pair_turns_by_its_angle_and_the_first_stays() -> None:
    """As products of complex numbers, in fp64."""
    states, positions = draw(0), torch.randint(0, 500, (2, LENGTH)).double()
    half = SIZE // 2
    speeds = 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    speeds[0] = 0
    angle = positions[..., None, None] * speeds
    plane = torch.complex(states[..., :half], states[..., half:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    wanted = torch.cat([plane.real, plane.imag], -1)
    torch.testing.assert_close(rotate_states(states, rotary_of(positions)), wanted)


def test_products_depend_on_distance_alone() -> None:
    B, C = draw(1), draw(2)
    at = torch.arange(LENGTH).double().expand(2, LENGTH)
    near, far = (rotate_states(B, rotary_of(p)) for p in (at, at + 300))
    asked, asked_far = (rotate_states(C, rotary_of(p)) for p in (at, at + 300))
    scores = torch.einsum("bthn,bshn->bhts", asked, near)
    torch.testing.assert_close(torch.einsum("bthn,bshn->bhts", asked_far, far), scores)
    assert not torch.allclose(scores, torch.einsum("bthn,bshn->bhts", C, B))


def test_a_mixer_scores_as_turned_linear_attention(make_hybrid, draw_ids) -> None:
    """With no decay, y_t is the sum of dt_s (C_t . B_s) x_s over the past."""
    settings = mamba2_from_attention(tiny_config(["attention"]), True, rotary=True)
    model = make_hybrid(["mamba2"], mamba2=settings, seed=5).double()
    inner, mixer = model.model, model.model.layers[0].mixer
    with torch.no_grad():
        mixer.A_log.fill_(-60.0)
        mixer.D.zero_()
        hidden, context = inner.enter(draw_ids(2, LENGTH))
        seen = {}
        mixer.norm.register_forward_hook(lambda _, given, out: seen.update(y=given[0]))
        mixer.features(hidden, context)
        _, raw, dt = mixer._project(hidden, whole=False)
        taps = torch.nn.functional.pad(raw.mT, (3, 0))
        conv = mixer.conv1d
        taps = torch.nn.functional.conv1d(taps, conv.weight, conv.bias, groups=conv.groups)
        mixed = torch.nn.functional.silu(taps).mT
        x, B, C = mixer._split(mixed)
        x, B = (t.repeat_interleave(2, 2) for t in (x, rotate_states(B, context.rotary)))
        dt = torch.nn.functional.softplus(dt + mixer.dt_bias)
        scores = torch.einsum("bthn,bshn->bhts", rotate_states(C, context.rotary), B).tril()
        wanted = torch.einsum("bhts,bsh,bshp->bthp", scores, dt, x)
    torch.testing.assert_close(seen["y"], wanted, rtol=1e-9, atol=1e-9)


def test_what_cannot_turn_is_refused() -> None:
    settings = mamba2_from_attention(tiny_config(["attention"]), True, rotary=True)
    with pytest.raises(StrictDataclassError, match="24 channels, the angles of this model 16"):
        tiny_config(["mamba2"], mamba2=replace(settings, d_state=24))
    # a model of attention alone may carry the settings of another
    assert not tiny_config(["attention"], mamba2=settings).rotates


def test_their_positions_are_bounded_by_training() -> None:
    settings = mamba2_from_attention(tiny_config(["attention"]), True, rotary=True)
    assert tiny_config(["mamba2"], mamba2=settings).attends
    assert not tiny_config(["mamba2"]).attends
