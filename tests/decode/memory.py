"""Memory of sessions of the device engine: compared bit for bit, and set in memory of NaN."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mambactl.decode.engine import Generation
from mambactl.decode.gpu import session as session_module
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.gpu.session import Session
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.reference.slots import slot_of
from mambactl.kernels.decode.reference.verdict import Field
from mambactl.models.packed import AttentionState, LayerState, PackedMixer, RecurrentState

# numbers on either side of a tensor
GUARD = 1024


def position(session: Session, field: Field, row: int) -> int:
    """A field of a row of a session, such as its length."""
    return int(session.batch.field(field)[row])


def assert_same_memory(one: Session, other: Session, row: int, first: int) -> bool:
    """All that two sessions hold of a row's tokens is the same: keys and values, those that the
    next token sees of windows, and projections from position `first` on.

    Returns whether states were compared too: they are where both were stored at one position.
    """
    lengths = [position(session, Field.LENGTH, row) for session in (one, other)]
    bases = [position(session, Field.BASE, row) for session in (one, other)]
    # a step may have written k positions behind its last token
    oldest = max(
        length + session.k + 1 - _ring_slots(session)
        for length, session in zip(lengths, (one, other), strict=True)
    )
    projected = range(max(first, oldest), min(lengths))
    layers = zip(one.target.layers, other.target.layers, one.target_weights.layers, strict=True)
    for mine, theirs, layer in layers:
        both = mine, theirs
        if isinstance(mine, AttentionState):
            _assert_same_keys(both, row, range(min(lengths)))
            continue
        if mine.kept is not None:
            _assert_same_keys((mine.kept, theirs.kept), row, range(min(lengths)))
        if mine.window is not None:
            seen = _seen(layer.mixer, max(lengths), min(lengths))
            _assert_same_keys((mine.window, theirs.window), row, seen, layer.mixer.window.sinks)
        for name in ("ring", "mixed", "low"):
            rings = [getattr(state, name) for state in both]
            if rings[0] is not None:
                _assert_equal(*(ring[row, _slots(projected, ring)] for ring in rings))
        if bases[0] == bases[1]:
            _assert_equal(mine.state[row], theirs.state[row])
    return bases[0] == bases[1]


def assert_exact(
    engine: FusedEngine, plain: FusedEngine, prompts: list[list[int]], params: SamplingParams
) -> Generation:
    """Tokens and memory after speculation are those of plain decoding; returns what it wrote."""
    done = engine.generate(prompts, params)
    assert done.tokens == plain.generate(prompts, params).tokens
    (session,) = engine.sessions.values()
    (other,) = plain.sessions.values()
    for row, prompt in enumerate(prompts):
        assert_same_memory(session, other, row, len(prompt))
    for row, prompt in enumerate(prompts):
        # plain decoding of few rows stores a state at every token, so also where this one is
        written = position(session, Field.BASE, row) - (len(prompt) - 1)
        assert params.max_new_tokens // 2 < written
        plain.generate(prompts, SamplingParams(max_new_tokens=written))
        assert assert_same_memory(session, other, row, len(prompt))
    return done


@contextmanager
def poisoned(monkeypatch) -> Iterator[None]:
    """Sessions that are made within: their memory holds NaN, and lies between more of it.

    At the end nobody has written where nothing belongs.
    """
    rooms: list[Tensor] = []
    make_state = session_module.make_state

    def make(*arguments, **keywords):
        state = make_state(*arguments, **keywords)
        for layer in state.layers:
            _set_in_nan(layer, rooms)
        return state

    with monkeypatch.context() as patched:
        patched.setattr(session_module, "make_state", make)
        yield
    assert rooms
    for room in rooms:
        assert room[:GUARD].isnan().all() and room[-GUARD:].isnan().all()


def _set_in_nan(layer: LayerState, rooms: list[Tensor]) -> None:
    for name, value in vars(layer).items():
        if isinstance(value, AttentionState | RecurrentState):
            _set_in_nan(value, rooms)
        elif isinstance(value, Tensor):
            rooms.append(value.new_full((value.numel() + 2 * GUARD,), float("nan")))
            setattr(layer, name, rooms[-1][GUARD:-GUARD].view(value.shape))


def _ring_slots(session: Session) -> int:
    """Slots of the rings of projections; many where there is none."""
    held = [layer for layer in session.target.layers if isinstance(layer, RecurrentState)]
    return held[0].ring.shape[1] if held else session.capacity


def _seen(mixer: PackedMixer, length: int, end: int) -> list[int]:
    """Positions before `end` that the token behind `length` others sees in the window."""
    sinks = mixer.window.sinks
    first = max(length - mixer.window.window + 1, sinks)
    return [*range(min(sinks, end)), *range(first, end)]


def _slots(positions: range, ring: Tensor) -> Tensor:
    return torch.tensor(positions, device=ring.device) % ring.shape[1]


def _assert_same_keys(
    states: tuple[AttentionState, AttentionState], row: int, positions, sinks: int = 0
) -> None:
    at = torch.tensor([*positions], device=states[0].keys.device)
    slots = [slot_of(at, sinks, state.ring) for state in states]
    for name in ("keys", "values"):
        _assert_equal(*(getattr(s, name)[row, :, i] for s, i in zip(states, slots, strict=True)))


def _assert_equal(one: Tensor, other: Tensor) -> None:
    assert one.numel() and one.isfinite().all()
    assert torch.equal(one, other)
