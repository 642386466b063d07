"""Bytes of a cache by formula, against the tensors that both engines hold."""

from dataclasses import asdict

import pytest
import torch
from decode.engines import NATIVE1, NATIVE2, ROTARY, SPAN, fused, prompts_of

from mambactl.decode.gpu.session import Session
from mambactl.decode.gpu.state import ModelState, pack
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.models import cache_bytes as bytes_of
from mambactl.models.cache import AttentionCache, HybridCache
from mambactl.models.cache_bytes import (
    attention_bytes,
    cache_bytes,
    sequence_bytes,
    sequences,
    session_bytes,
)
from mambactl.models.key_ring import KeyRing
from mambactl.models.mixers.mamba2_decode import Mamba2Settings
from mambactl.models.packed import RecurrentState
from mambactl.models.session_size import SessionSize

MODELS = {
    "attention": {"mixers": ["attention"] * 2},
    "sliding window": {"mixers": ["attention"], "sliding_window": 8, "num_key_value_heads": 1},
    "mamba1": {"mixers": ["mamba1", "attention"]},
    "mamba2": {"mixers": ["mamba2", "attention"]},
    "short taps": {
        "mixers": ["mamba2"],
        "mamba2": Mamba2Settings(4, 8, 12, 4, 2, 4, norm_groups=2, d_conv=3),
    },
    "native1": {"mixers": ["mamba1"] * 2, "mamba1": NATIVE1, "has_mlp": False},
    "native2": {"mixers": ["mamba2"] * 2, "mamba2": NATIVE2, "has_mlp": False},
    "windowed": {"mixers": ["mamba2_window", "attention"], "mamba2_window": SPAN},
    "rotary": {"mixers": ["mamba2_window"], "mamba2": ROTARY, "mamba2_window": SPAN},
    "kept heads": {
        "mixers": ["mamba2_mixed", "mamba2_window", "mamba1", "mamba2_mixed"],
        "num_attention_heads": 6, "num_key_value_heads": 3, "kept_heads": {0: (0, 2), 3: (1,)},
    },
}  # fmt: skip
# no kernel decodes in fp64
FOR_REFERENCE = {**MODELS, "double": {"mixers": ["mamba2_mixed", "attention"]}}
KINDS = {"kept heads": torch.bfloat16, "native1": torch.bfloat16, "double": torch.float64}


@pytest.fixture(scope="module")
def built(make_hybrid):
    """name -> a model of that form."""
    return {
        name: make_hybrid(**fields).to(KINDS.get(name, torch.float32))
        for name, fields in FOR_REFERENCE.items()
    }


@pytest.mark.parametrize(
    ("asked", "room", "slots", "eager"),
    [
        ((1, 1022, 0), (1, 1024), (0, 8), (0, 8)),
        ((1, 1023, 0), (1, 1280), (0, 8), (0, 8)),
        ((3, 300, 4), (3, 512), (13, 16), (13, 16)),
        ((8, 300, 0), (8, 512), (32, 32), (0, 8)),
        ((5, 300, 4), (5, 512), (13, 16), (13, 16)),
        ((9, 300, 12), (9, 512), (37, 64), (29, 32)),
    ],
)
def test_sizes(asked, room, slots, eager) -> None:
    """Rows, tokens and k; ring slots in use and there, states stored lazily or at every step."""
    size = SessionSize.holding(*asked)
    assert (size.batch, size.capacity) == room
    for stores_every_step, expected in ((False, slots), (True, eager)):
        found = size.ring_limit(stores_every_step), size.state_size(stores_every_step).slots
        assert found == expected


@pytest.mark.parametrize("window", [1, 7, 13, 62, 64])
def test_rings_of_windows_are_as_large_with_16_drafts_as_with_none(window) -> None:
    slots = [SessionSize(1, 256, k).state_size(False).window_slots(window) for k in (0, 1, 16, 17)]
    assert len(set(slots[:3])) == 1 and slots[3] == slots[0] + 16
    assert slots[0] % 16 == 0 and slots[0] >= window + 16


def held_bytes(state: ModelState) -> dict[str, int]:
    """Bytes of the tensors of every layer, by part."""
    found = dict.fromkeys(("kv", "windows", "rings", "states"), 0)

    def count(part: str, *tensors: torch.Tensor | None) -> None:
        found[part] += sum(tensor.nbytes for tensor in tensors if tensor is not None)

    for layer in state.layers:
        if not isinstance(layer, RecurrentState):
            count("kv", *layer.tensors())
            continue
        count("states", layer.state)
        count("rings", layer.ring, layer.mixed, layer.low)
        for part, attended in (("windows", layer.window), ("kv", layer.kept)):
            count(part, *(attended.tensors() if attended is not None else ()))
    assert sum(found.values()) == sum(tensor.nbytes for tensor in state.tensors())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_session_allocates_what_the_formula_says(built, name) -> None:
    model = built[name]
    itemsize = model.dtype.itemsize
    for k in (0, 4):
        for rows in (1, 3, 8):
            size = SessionSize.holding(rows, 300, k)
            session = Session(pack(model, size.capacity), None, ReferenceOps(), size)
            found = session_bytes(model.config, itemsize, size)
            assert asdict(found) == held_bytes(session.target)
            assert found.total == sum(held_bytes(session.target).values())


def test_the_engine_takes_the_size_that_its_rows_ask_for(built) -> None:
    target, draft = built["windowed"], built["mamba1"]
    prompts, new = prompts_of([3, 260, 5, 1, 9]), 2
    engine = fused(target, draft, 4)
    engine.generate(prompts, SamplingParams(max_new_tokens=new))
    size = SessionSize.holding(len(prompts), 260 + new, 4)
    assert (size.batch, size.capacity) == (5, 512)
    for model, state in ((target, engine.sessions[5].target), (draft, engine.sessions[5].draft)):
        assert asdict(session_bytes(model.config, 4, size)) == held_bytes(state)


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_takes_what_an_engine_allocates_for_it(built, name) -> None:
    """Without room to spare, and without drafts."""
    model, tokens = built[name], 512
    itemsize = model.dtype.itemsize
    session = Session(pack(model, tokens), None, ReferenceOps(), SessionSize(1, tokens, 0))
    found = sequence_bytes(model.config, itemsize, tokens)
    assert asdict(found) == held_bytes(session.target)


def test_sequences_of_a_student_beside_its_teacher(built, make_hybrid, monkeypatch) -> None:
    """Tensors of both engines' states, of a student in which heads are kept and of attention."""
    monkeypatch.setattr(bytes_of, "LENGTHS", (128, 1024))
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    student, teacher = built["kept heads"], make_hybrid(["attention"] * 4, **heads).bfloat16()
    found = sequences(student.config, 2, lambda n: sequence_bytes(teacher.config, 2, n).total)
    assert list(found) == ["128", "1024"]
    for tokens, numbers in found.items():
        size = SessionSize(1, int(tokens), 0)
        states = [Session(pack(each, size.capacity), None, ReferenceOps(), size).target
                  for each in (student, teacher)]  # fmt: skip
        ours, theirs = (sum(held_bytes(state).values()) for state in states)
        assert (numbers["total"], numbers["teacher_total"]) == (ours, theirs)
        assert numbers["share"] == ours / theirs
        assert attention_bytes(student.config, 2, int(tokens)) == theirs
        # one that has read so many tokens
        cache = HybridCache(student.config, 1)
        with torch.no_grad():
            student(torch.ones(1, int(tokens), dtype=torch.long), past_key_values=cache)
        kept = [layer.kept for layer in cache.layers if hasattr(layer, "kept")]
        assert numbers["kv"] == sum(each.keys.nbytes + each.values.nbytes for each in kept)
        states = [each.live for each in cache.layers if not isinstance(each, AttentionCache)]
        assert numbers["states"] == sum(state.nbytes for state in states)
    # states are as large however long the text, keys and values of kept heads are not
    assert found["1024"]["share"] < found["128"]["share"]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", FOR_REFERENCE)
def test_the_reference_engine_holds_what_the_formula_says(built, name, rows) -> None:
    """Its states, and its keys and values of all tokens, take what a session's do."""
    model, tokens = built[name], 20
    itemsize, cache = model.dtype.itemsize, HybridCache(model.config, rows)
    with torch.no_grad():
        model(torch.ones(rows, tokens, dtype=torch.long), past_key_values=cache)
    found = cache_bytes(model.config, itemsize)
    per_row = found["bytes_per_sequence"] + tokens * found["bytes_per_token"]
    assert cache.nbytes() == rows * per_row
    rings = [layer for layer in cache.layers if isinstance(layer, KeyRing)]
    windows = sum(ring.keys.nbytes + ring.values.nbytes for ring in rings)
    assert windows == rows * found.get("window_bytes", 0)
    session = session_bytes(model.config, itemsize, SessionSize(rows, tokens, 4))
    states = [layer.live for layer in cache.layers if not isinstance(layer, AttentionCache)]
    assert session.states == sum(state.nbytes for state in states)
    kept = [getattr(layer, "kept", layer) for layer in cache.layers]
    keys = [layer for layer in kept if isinstance(layer, AttentionCache)]
    assert session.kv == sum(layer.keys.nbytes + layer.values.nbytes for layer in keys)
