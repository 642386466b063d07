"""Drafts copied from the text beside a model's or a head's own."""

from itertools import cycle

import pytest
import torch
from decode.engines import noisy, prompts_of
from decode.heads import guided, head_for

from mambactl.decode import copying
from mambactl.decode.copying import Copying
from mambactl.decode.drafters import ModelDrafter
from mambactl.decode.engine import Engine
from mambactl.decode.gpu import step
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.head_drafter import HeadDrafter
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.cpu.cpu_ops import CpuOps
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.models.draft_head import DraftHead

MIXERS = ["mamba2", "attention", "mamba1"]
PROMPTS = prompts_of([30, 17])
K = 3
GREEDY = SamplingParams(max_new_tokens=30)
SAMPLED = SamplingParams(temperature=3.0, top_k=40, top_p=0.95, max_new_tokens=20, seed=1)


def engines(target, draft, head: bool):
    drafter = HeadDrafter(draft) if head else ModelDrafter(draft)
    yield Engine(target, drafter, K, copying=Copying(0.2, K))
    for ops in (ReferenceOps(), CpuOps(False)):
        yield FusedEngine(target, draft, K, ops, copying=True)


@pytest.fixture
def in_turn(monkeypatch) -> None:
    """Copies in about two steps of three, whatever pays, and short matches too."""
    monkeypatch.setattr(copying, "MATCH", 2)
    monkeypatch.setattr(step, "MATCH", 2)

    def due(self, rows, k) -> bool:
        """Decide by the number of tokens so far, which is the same in every engine."""
        rows = list(rows)
        found = all(self.texts[row].next() is not None for row in rows)
        return found and sum(len(self.texts[row].tokens) for row in rows) % 3 > 0

    monkeypatch.setattr(Copying, "due", due)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_engine_writes_the_same(make_hybrid, in_turn, head, params) -> None:
    target = guided(make_hybrid(MIXERS, seed=3))
    draft = head_for(target) if head else noisy(guided(make_hybrid(MIXERS, seed=3)), 0.02)
    for prompt in PROMPTS:
        first, *others = [one.generate([prompt], params) for one in engines(target, draft, head)]
        assert first.stats.accepted > 0
        # the plain engine drafts nothing at the end of the budget
        assert all(one.tokens[0][:-1] == first.tokens[0][:-1] for one in others)
    if params.greedy:
        plain = Engine(target).generate(PROMPTS, params)
        for engine in engines(target, draft, head):
            assert engine.generate(PROMPTS, params).tokens == plain.tokens


def test_a_draft_keeps_in_step(make_hybrid, monkeypatch) -> None:
    """The target drafts for itself without a miss, behind whatever was copied and accepted."""
    target, seen, lengths = guided(make_hybrid(MIXERS, seed=3)), [], []
    start = PROMPTS[0][:12]
    prompt = [
        *start,
        *Engine(target).generate([start], SamplingParams(max_new_tokens=80)).tokens[0],
    ]
    monkeypatch.setattr(copying, "MATCH", 1)
    monkeypatch.setattr(step, "MATCH", 1)
    turns = cycle((True, True, False))
    monkeypatch.setattr(Copying, "due", lambda self, rows, k: next(turns))
    monkeypatch.setattr(copying.Rate, "observe", lambda self, d, a: seen.append((d, a)))
    for engine in engines(target, target, False):
        seen.clear()
        done = engine.generate([prompt], SamplingParams(max_new_tokens=90))
        # a copied token is one test
        own = [(drafted, accepted) for drafted, accepted in seen if drafted > 1]
        assert len(own) > 2 and all(drafted == accepted for drafted, accepted in own[:-1])
        lengths.append(done.stats.accepted - sum(accepted for _, accepted in own))
    assert min(lengths) > 5


def test_copies_where_the_text_repeats() -> None:
    told = Copying(0.2, 6)
    told.start([[1, 2, 3, 4, 5, 6, 7, 8], [5, 9, 2, 7, 1, 8, 3]])
    assert not told.due([0, 1], 4)
    told.add(0, [1, 2, 3, 4, 5])
    assert told.copies(0, 2) == [6, 7] and told.copies(1, 2) == []
    # nothing is known yet, and a draft is believed to do better
    assert not told.due([0], 1)
    told.add(0, [6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5] * 2)
    assert told.due([0], 4)
    # one row that repeats itself does not pay for many that do not
    told.start([told.texts[0].tokens, *([[5, 9, 2, 7, 1, 8, 3]] * 5)])
    assert told.due([0], 4) and not told.due(range(6), 4)
    for _ in range(40):
        told.copied.observe(6, 0)
    assert not told.due([0], 4)


def test_a_batch_does_not_switch_without_matches(make_hybrid) -> None:
    target = make_hybrid(MIXERS, seed=3)
    prompts = [torch.randperm(90, generator=torch.Generator().manual_seed(1)).tolist()[:20]]
    engine = FusedEngine(target, target, K, CpuOps(False), copying=True)
    wanted = FusedEngine(target, target, K, CpuOps(False)).generate(prompts, GREEDY)
    assert engine.generate(prompts, GREEDY).tokens == wanted.tokens


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["mamba2", "attention"])
@pytest.mark.parametrize("temperature", [0.0, 4.0])
def test_device_kernels_in_the_interpreter(make_hybrid, in_turn, mixer, temperature) -> None:
    """The kernels of a GPU, tiny as they are slow here."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    from mambactl.kernels.decode.triton.ops import TritonOps

    sizes = {"hidden_size": 32, "intermediate_size": 24, "vocab_size": 40}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    target = guided(make_hybrid([mixer], seed=4, **sizes))
    draft = head_for(target) if mixer == "attention" else target
    beside = HeadDrafter(draft) if isinstance(draft, DraftHead) else ModelDrafter(target)
    prompt, params = [5, 6, 7, 8, 5, 6, 7], SamplingParams(temperature, max_new_tokens=7)
    wanted = Engine(target, beside, 2, copying=Copying(0.2, 2)).generate([prompt], params)
    engine = FusedEngine(target, draft, 2, TritonOps(exact=True), copying=True)
    assert engine.generate([prompt], params).tokens[0][:-1] == wanted.tokens[0][:-1]
