"""Draft heads: exact greedy speculation, no trace of what was rejected, and their files."""

from functools import partial
from itertools import cycle

import pytest
import torch
from decode.engines import rows_one_by_one
from decode.heads import guided, head_for
from decode.memory import poisoned

from mambactl.decode import prefill
from mambactl.decode.draft_count import Choice
from mambactl.decode.engine import Engine
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.gpu.head_pass import HeadPass
from mambactl.decode.head_drafter import HeadDrafter, HeadReading
from mambactl.decode.open_batch import RowRequest
from mambactl.decode.prompt_reading import PromptReading
from mambactl.decode.row_by_row import RowByRow
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.cpu.cpu_ops import CpuOps
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.kernels.decode.reference.verdict import Field
from mambactl.models.cache import HybridCache
from mambactl.models.draft_head import DraftHead

MIXERS = ["mamba2", "attention", "mamba2_window"]
PROMPTS = [[5, 9, 11, 30, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9, 10, 40, 41, 42]]


@pytest.fixture(scope="module")
def target(make_hybrid):
    return guided(make_hybrid(MIXERS, seed=3))


@pytest.mark.parametrize(("k", "tokens"), [(1, 60), (5, None)])
def test_every_greedy_token_is_that_of_plain_decoding(target, k, tokens) -> None:
    params = SamplingParams(max_new_tokens=60, eos_token_ids=(8,))
    plain = Engine(target).generate(PROMPTS, params)
    found = Engine(target, HeadDrafter(head_for(target, tokens)), k).generate(PROMPTS, params)
    assert found.tokens == plain.tokens
    assert found.stats.accepted > 15 and found.stats.rejections > 15


def test_a_prompt_is_read_in_pieces(target, monkeypatch) -> None:
    """The head reads along piece by piece: no pass of it is longer than a piece of the prompt."""
    params, prompts = SamplingParams(max_new_tokens=12), [list(range(3, 90))]
    head, lengths = head_for(target), []
    whole = Engine(target, HeadDrafter(head), 3).generate(prompts, params)
    read = DraftHead.read

    def watched(self, streams, tokens, cache, n_new):
        lengths.append(tokens.shape[1])
        return read(self, streams, tokens, cache, n_new)

    monkeypatch.setattr(DraftHead, "read", watched)
    monkeypatch.setattr(prefill, "CHUNK_TOKENS", 20)
    found = Engine(target, HeadDrafter(head), 3).generate(prompts, params)
    assert found.tokens == whole.tokens and found.stats.row_steps == whole.stats.row_steps
    assert max(lengths) == 20 and lengths.count(20) == 4


def test_rejected_drafts_leave_no_trace(target) -> None:
    """After many steps the head's keys are those of a head that read the text alone."""
    head = head_for(target)
    engine = Engine(target, HeadDrafter(head), 4)
    texts = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=40)).tokens
    drafter = engine.drafter
    assert isinstance(drafter, HeadDrafter)
    held = int(drafter.known[0])
    text = [*PROMPTS[0], *texts[0]][:held]
    other = HeadReading.start(head, 1)
    plain = Engine(target)
    cache = plain.prefixes.of([text])
    assert cache is None and held > 40
    # token by token, as the engine's passes of few tokens compute
    own = HybridCache(target.config, 1)
    for token in text:
        ids = torch.tensor([[token]])
        with torch.no_grad():
            other(ids, target.model.read(ids, own, None), None)
    for ours, theirs in zip(drafter.cache.layers, other.cache.layers, strict=True):
        for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
            torch.testing.assert_close(a[:, :, :held], b[:, :, :held], rtol=1e-4, atol=1e-4)


# operations of the engine of whole steps
ENGINES = {"reference": ReferenceOps, "cpu": partial(CpuOps, False)}


@pytest.mark.parametrize("ops", ENGINES)
@pytest.mark.parametrize(("k", "tokens"), [(1, None), (5, 60)])
def test_the_engine_of_whole_steps_drafts_the_same(target, k, tokens, ops) -> None:
    params, head = SamplingParams(max_new_tokens=40, eos_token_ids=(8,)), head_for(target, tokens)
    wanted = Engine(target, HeadDrafter(head), k).generate(PROMPTS, params)
    found = FusedEngine(target, head, k, ENGINES[ops]()).generate(PROMPTS, params)
    assert found.tokens == wanted.tokens
    # a draft more may be accepted at the end of a budget, where the plain engine drafts fewer
    assert found.stats.row_steps == wanted.stats.row_steps
    assert 0 <= found.stats.accepted - wanted.stats.accepted <= len(PROMPTS)


def test_sampled_text_is_the_same_in_both_engines(target) -> None:
    params = SamplingParams(temperature=3.0, top_k=40, top_p=0.95, max_new_tokens=25, seed=1)
    head = head_for(target, 60)
    wanted = Engine(target, HeadDrafter(head), 3).generate(PROMPTS, params)
    for ops in ENGINES.values():
        found = FusedEngine(target, head, 3, ops()).generate(PROMPTS, params)
        # the plain engine drafts nothing at the end of the budget
        assert [row[:-1] for row in found.tokens] == [row[:-1] for row in wanted.tokens]


def test_a_number_of_drafts_may_change_between_steps(target, monkeypatch) -> None:
    params, head = SamplingParams(max_new_tokens=40), head_for(target)
    plain = FusedEngine(target, None, 0, ReferenceOps()).generate(PROMPTS, params)
    numbers = cycle((1, 6, 2, 3))
    monkeypatch.setattr(Choice, "update", lambda self: next(numbers))
    auto = FusedEngine(target, head, "auto", ReferenceOps()).generate(PROMPTS, params)
    assert auto.tokens == plain.tokens
    assert auto.stats.accepted > 10 and len(auto.stats.lengths) == 4


def test_what_was_rejected_leaves_no_bit(target, monkeypatch) -> None:
    """Keys of the head behind a text are the same bits whatever was drafted on the way."""
    rows_one_by_one(monkeypatch)
    whole = DraftHead.joined

    def by_row(self, streams, embedded):
        if streams.ndim > 2:
            return whole(self, streams, embedded)
        pairs = zip(streams.split(1), embedded.split(1), strict=True)
        return torch.cat([whole(self, *pair) for pair in pairs])

    monkeypatch.setattr(DraftHead, "joined", by_row)
    head, prompt, held = head_for(target), PROMPTS[0], []
    for k in (1, 4):
        engine = FusedEngine(target, head, k, ReferenceOps())
        done = engine.generate([prompt], SamplingParams(max_new_tokens=40))
        assert done.stats.rejections > 5
        session = engine.sessions[1]
        guide = session.step.draft
        assert isinstance(guide, HeadPass) and session.draft is not None
        known = int(session.batch.field(Field.LENGTH)[0] - guide.behind[0])
        held.append((known, session.draft.tensors()))
    known = min(length for length, _ in held)
    assert known > 40
    for one, other in zip(*(tensors for _, tensors in held), strict=True):
        assert torch.equal(one[:, :, :known], other[:, :, :known])


@pytest.mark.parametrize("piece", [2, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fused", [True, False])
def test_rows_come_and_go(target, fused, piece) -> None:
    """Rows of an open batch get the tokens that they get alone, and draft as they do there."""
    head, params = head_for(target), SamplingParams(max_new_tokens=24)
    if fused:
        batch = FusedEngine(target, head, 3, CpuOps(False)).open(2, 64, ())
    else:
        batch = RowByRow(target, lambda: HeadDrafter(head), 3, 2, ())
    alone = [Engine(target, HeadDrafter(head), 3).generate([p], params) for p in PROMPTS]
    start = read_whole(target, head, [PROMPTS[2][:4]], None, piece)[0]
    prompts = [
        *read_whole(target, head, PROMPTS[:2], None, piece),
        *read_whole(target, head, [PROMPTS[2]], start, piece),
    ]
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    accepted, waiting = 0, [0, 1, 2]
    while waiting or batch.running:
        if waiting and batch.room:
            row = waiting.pop(0)
            batch.join(row, RowRequest(params, key=0), prompts[row])
        for written in batch.step():
            found[written.row] += written.tokens
            accepted += written.accepted
    assert [found[row] for row in range(3)] == [each.tokens[0] for each in alone]
    assert 0 <= accepted - sum(each.stats.accepted for each in alone) <= 3 * len(PROMPTS)


def test_rows_read_together_join_together(target) -> None:
    head, params = head_for(target), SamplingParams(max_new_tokens=24)
    batch = FusedEngine(target, head, 3, CpuOps(False)).open(3, 64, ())
    alone = [Engine(target, HeadDrafter(head), 3).generate([p], params) for p in PROMPTS]
    rows = [(row, RowRequest(params, key=0)) for row in range(len(PROMPTS))]
    batch.join_all(rows, reading_of(target, head, PROMPTS, None, 7).rows())
    found: dict[int, list[int]] = {row: [] for row, _ in rows}
    while batch.running:
        for written in batch.step():
            found[written.row] += written.tokens
    assert list(found.values()) == [each.tokens[0] for each in alone]


def reading_of(target, head, prompts, start, piece):
    reading = PromptReading(target, head, prompts, start, piece)
    while not reading.read():
        pass
    return reading


def read_whole(target, head, prompts, start, piece):
    rows = reading_of(target, head, prompts, start, piece).rows()
    return [rows.prompt(row) for row in range(len(prompts))]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("temperature", [0.0, 4.0])
def test_device_kernels_in_the_interpreter(make_hybrid, monkeypatch, temperature) -> None:
    """The kernels of a GPU, tiny as they are slow here, in memory that holds NaN."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: see test_head_gpu.py")
    from mambactl.kernels.decode.triton.ops import TritonOps

    sizes = {"hidden_size": 32, "intermediate_size": 24, "vocab_size": 40,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    target = guided(make_hybrid(["attention"], seed=4, **sizes))
    head, params = head_for(target, 30), SamplingParams(temperature, max_new_tokens=5)
    wanted = Engine(target, HeadDrafter(head), 2).generate([PROMPTS[0][:3]], params)
    with poisoned(monkeypatch):
        engine = FusedEngine(target, head, 2, TritonOps(exact=True))
        found = engine.generate([PROMPTS[0][:3]], params)
    assert found.tokens[0][:-1] == wanted.tokens[0][:-1]
    assert found.stats.drafted > 0
