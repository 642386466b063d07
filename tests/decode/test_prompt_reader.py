"""Prompts read into the memory that a session decodes in: in pieces, and as graphs on a GPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decode.engines import NATIVE1, NATIVE2, ROTARY, fused, plain, prompts_of
from decode.memory import poisoned

from mambactl.decode import prefill as prefill_module
from mambactl.decode.gpu import prompt_graphs
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.gpu.prompt_graphs import GRAPH_TOKENS, LENGTHS, graph_length
from mambactl.decode.gpu.prompt_reader import Reader
from mambactl.decode.gpu.session import Session
from mambactl.decode.gpu.state import pack
from mambactl.decode.prefill import prefill
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.models.key_ring import WindowSettings
from mambactl.models.packed import AttentionState
from mambactl.models.session_size import SessionSize

SPAN = WindowSettings(window=9, sinks=3)
MODELS = {
    "attention": {"mixers": ["attention"] * 2},
    "sliding": {"mixers": ["attention", "mamba2"], "sliding_window": 8},
    "recurrent": {"mixers": ["mamba2", "mamba1"]},
    "native": {"mixers": ["mamba1"] * 2, "mamba1": NATIVE1, "has_mlp": False},
    "native2": {"mixers": ["mamba2"] * 2, "mamba2": NATIVE2, "has_mlp": False},
    "windowed": {"mixers": ["mamba2_window", "attention"], "mamba2_window": SPAN},
    "kept heads": {"mixers": ["mamba2_mixed"] * 2, "mamba2_window": SPAN},
    "rotary": {"mixers": ["mamba2"] * 2, "mamba2": ROTARY},
}
# one ends in the first piece, one at the end of a piece, one a token behind it
RAGGED = [87, 60, 61, 1, 7]


@pytest.fixture(scope="module", params=MODELS)
def model(request, make_hybrid):
    return make_hybrid(**MODELS[request.param], seed=5)


@pytest.fixture
def pieces_of_20(monkeypatch) -> None:
    monkeypatch.setattr(prefill_module, "CHUNK_TOKENS", 20 * len(RAGGED))


def stand(model, batch: int, capacity: int = 256) -> tuple[Session, Reader]:
    """A session of that size, and what reads its prompts."""
    size = SessionSize(batch, capacity, 0)
    session = Session(pack(model, capacity), None, ReferenceOps(), size)
    return session, session.reader


def held(session: Session, lengths: list[int]) -> list[torch.Tensor]:
    """Everything that decoding may read of prompts of these lengths, NaN included."""
    found = []
    for state in session.target.layers:
        parts = [state] if isinstance(state, AttentionState) else [state.kept, state.window]
        for part in (p for p in parts if p is not None):
            for row, length in enumerate(lengths):
                slots = slice(None) if part.ring else slice(length)
                found += [part.keys[row, :, slots], part.values[row, :, slots]]
        if not isinstance(state, AttentionState):
            found.append(state.state)
    return [t.clone() for t in found]


def assert_alike(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float) -> None:
    for mine, theirs in zip(one, other, strict=True):
        scale = theirs.abs().max().clamp(min=1)
        assert (mine - theirs).abs().max() <= tolerance * scale


@torch.no_grad()
def test_pieces_leave_what_whole_prompts_leave(model, monkeypatch, pieces_of_20) -> None:
    """fp32 sums in another order: 1e-5 of the largest number."""
    prompts = prompts_of(RAGGED, seed=3)
    with poisoned(monkeypatch):
        session, reader = stand(model, len(prompts))
        last, state = reader.read(prompts), held(session, RAGGED)
        monkeypatch.setattr(prefill_module, "CHUNK_TOKENS", 10_000)
        other, whole = stand(model, len(prompts))
        assert_alike([last, *state], [whole.read(prompts), *held(other, RAGGED)], 1e-5)
        # and the memory of another batch is no obstacle
        assert_alike([reader.read(prompts)], [last], 1e-5)
    hidden = prefill(model, prompts, recording=False)[1]
    assert_alike([model.model.norm(last)], [hidden], 1e-5)
    # kernels read it as rows one behind the other
    full = reader.read(prompts_of([45] * len(prompts)))
    assert last.is_contiguous() and full.is_contiguous()


def test_tokens_behind_pieces_are_those_of_the_plain_engine(model, pieces_of_20) -> None:
    prompts, params = prompts_of(RAGGED, seed=4), SamplingParams(max_new_tokens=8)
    expected = plain(model).generate(prompts, params).tokens
    for draft, k in ((None, 0), (model, 3)):
        assert fused(model, draft, k).generate(prompts, params).tokens == expected


@torch.no_grad()
def test_keys_of_all_tokens_are_written_once(make_hybrid) -> None:
    model = make_hybrid(**MODELS["kept heads"])
    session, reader = stand(model, 2)
    cache = reader._cache()
    tokens, counts = torch.randint(3, 97, (2, 20)), torch.tensor([20, 11])
    model.model.read(tokens, cache, counts)
    for state, layer in zip(session.target.layers, cache.layers, strict=True):
        assert layer.kept.keys is state.kept.keys and layer.kept.values is state.kept.values
        assert state.kept.keys[0, :, :20].all() and not state.kept.keys[0, :, 20:].any()
    with pytest.raises(RuntimeError, match="do not fit"):
        reader.read([[5] * 300])


@pytest.mark.parametrize("batch", [1, 3, 8, 32])
def test_graphs_pad_to_less_than_twice_the_tokens(batch) -> None:
    for longest in range(1, 2100):
        length = graph_length(longest, batch, capacity=2048)
        if length is None:
            assert longest > min(max(LENGTHS), GRAPH_TOKENS // batch * 0.6)
            continue
        assert longest <= length <= min(2048, GRAPH_TOKENS // batch)
        assert length < 2 * longest or length == LENGTHS[0]
    assert graph_length(100, 1, capacity=99) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_graphs_leave_what_eager_reading_leaves(model, ops, monkeypatch) -> None:
    """At, before and behind every length that is captured; rows that are ragged, and idle ones.

    Graphs change no bit; padding changes how kernels are cut: 1e-4 of the largest number in fp32.
    """
    model = model.to("cuda")
    weights = pack(model, 2304)
    for batch, lengths in ((1, LENGTHS), (3, [n for n in LENGTHS if n <= 512])):
        with poisoned(monkeypatch):
            session, other = (
                Session(weights, None, ops(exact=True), SessionSize(batch, 2304, 0))
                for _ in range(2)
            )
            around = sorted({max(n + d, 1) for n in lengths for d in (-1, 0, 1)})
            for length in around:
                rows = [length, max(length // 3, 1)][: max(batch - 1, 1)]
                prompts = prompts_of(rows, seed=length)
                whole = [*prompts, *[[]] * (batch - len(prompts))]
                last = other.reader._in_pieces(whole, None)
                found = [[last[: len(rows)].clone(), *held(other, rows)]]
                for _ in range(3):
                    last = session.reader.read(prompts)[: len(rows)].clone()
                    found.append([last, *held(session, rows)])
                    assert_alike(found[-1], found[0], 1e-4)
                    assert_alike(found[-1], found[1], 0)
            most = session.reader.most
            captured = {graph_length(n, batch, 2304, most) for n in around} - {None}
            assert set(session.reader.graphs.graphs) == {(batch, length) for length in captured}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [300, 700])
def test_full_rows_have_the_tokens_of_rows_alone(model, ops, monkeypatch, length) -> None:
    """As a graph, twice in pieces without padding, and after a graph that was made elsewhere."""
    monkeypatch.setattr(prefill_module, "CHUNK_TOKENS", 1024)
    # as of models that are no narrower than this
    for module in (prefill_module, prompt_graphs):
        monkeypatch.setattr(module, "CHUNK_WIDTH", 1)
    model = model.to("cuda")
    prompts, params = prompts_of([length] * 8, seed=6), SamplingParams(max_new_tokens=4)
    alone = FusedEngine(model, None, 0, ops(exact=True), share=False)
    wanted = [alone.generate([prompt], params).tokens[0] for prompt in prompts]
    engine = FusedEngine(model, None, 0, ops(exact=True), share=False)
    for _ in range(3):
        with ThreadPoolExecutor(1) as other:
            # another thread each time, with handles of its own
            assert other.submit(engine.generate, prompts, params).result().tokens == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_long_prompt_needs_one_cache(make_hybrid) -> None:
    """Beside the memory that decodes, less than a quarter of it while 65,536 tokens are read."""
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 16,
             "head_dim": 64, "max_position_embeddings": 70_000}  # fmt: skip
    model = make_hybrid(["attention"] * 8, **sizes).to("cuda", torch.bfloat16)
    session, reader = stand(model, 1, capacity=66_048)
    cache = sum(tensor.nbytes for tensor in session.target.tensors())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    reader.read([torch.randint(3, 97, (65_536,)).tolist()])
    assert cache > 1e9
    assert torch.cuda.max_memory_allocated() - before < cache / 4
