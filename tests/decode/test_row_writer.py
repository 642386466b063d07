"""Prompts that a graph lends: written into rows, overwritten by the next ones, kept as copies."""

from dataclasses import dataclass

import pytest
import torch
from decode.engines import prompts_of
from decode.test_prompt_reader import MODELS
from decode.test_whole_prompts import read, whole_of

from mambactl.decode.backend import open_batch
from mambactl.decode.gpu import row_writer
from mambactl.decode.gpu.prompt_graphs import WholePrompts
from mambactl.decode.kept_prompts import KeptPrompts
from mambactl.decode.open_batch import RowRequest
from mambactl.decode.prompt_reading import ReadRows
from mambactl.decode.sampler import SamplingParams
from mambactl.models.loan import Loan

NEW = 5


@dataclass(eq=False)
class Graph:
    """A graph on a CPU, which runs what it has recorded."""

    run: object = None
    runs: int = 0

    def replay(self) -> None:
        self.runs += 1
        if self.run is not None:
            self.run()


@pytest.fixture
def recorded(monkeypatch):
    """Graphs that were captured, which a CPU cannot do."""
    graphs = []

    def captured(run, device, pool=None):
        graphs.append(Graph(run))
        return graphs[-1], run()

    monkeypatch.setattr(row_writer, "captured", captured)
    return graphs


def lent(model, prompts, graph: Graph, memory) -> ReadRows:
    """Prompts read into `memory`, padded to four rows."""
    rows = [*prompts, *[[]] * (4 - len(prompts))]
    n_new = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([[*row, *[0] * (48 - len(row))] for row in rows])
    cache, last = WholePrompts(model.model, 4)._read(tokens, n_new)
    if memory is None:
        memory = cache
    else:
        held = [tensor for layer in memory.layers for tensor in layer.tensors()]
        new = [tensor for layer in cache.layers for tensor in layer.tensors()]
        for ours, theirs in zip([*held, memory.lengths], [*new, cache.lengths], strict=True):
            ours.copy_(theirs)
    graph.replay()
    memory.loan = Loan(graph, graph.runs)
    return ReadRows(prompts, memory, None, last[: len(prompts)].clone())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_from_lent_memory_decode_like_their_own(make_hybrid, recorded, name) -> None:
    model = make_hybrid(**MODELS[name], seed=5)
    batch = open_batch(model, None, 0, 6, 96, [])
    request = RowRequest(SamplingParams(max_new_tokens=NEW), 0)
    graph, memory = Graph(), None
    for turn in range(4):
        prompts = prompts_of([21, 7, 40], seed=turn)
        found = lent(model, prompts, graph, memory)
        memory = found.target
        apart = open_batch(model, None, 0, 6, 96, [])
        apart.join_all([(row, request) for row in range(3)], read(model, None, prompts))
        if turn == 3:
            # padding has no room behind these
            for row in (7, 8, 9):
                batch.join_all([(row, request)], read(model, None, prompts).select([0]))
        batch.join_all([(row, request) for row in range(3)], found)
        texts = [decoded(each) for each in (batch, apart)]
        assert [texts[0][row] for row in range(3)] == [texts[1][row] for row in range(3)]
    # launched, captured and run, run, and without room for the padding not run
    assert [graph.runs for graph in recorded] == [2]


def decoded(batch) -> dict[int, list[int]]:
    texts: dict[int, list[int]] = {}
    while batch.running:
        for step in batch.step():
            texts.setdefault(step.row, []).extend(step.tokens)
    return texts


@torch.no_grad()
def test_memory_that_was_overwritten_is_refused_and_kept_prompts_are_copies(make_hybrid) -> None:
    model = make_hybrid(["mamba2", "attention"], seed=5)
    graph = Graph()
    first = lent(model, prompts_of([21, 7], seed=1), graph, None)
    alone = first.prompt(0)
    kept = KeptPrompts(1 << 30)
    kept.keep(first)
    before = [tensor.clone() for layer in alone.target.layers for tensor in layer.tensors()]
    lent(model, prompts_of([30, 7], seed=2), graph, first.target)
    batch = open_batch(model, None, 0, 4, 96, [])
    stale = ReadRows(first.prompts, first.target, None, first.hidden)
    stale.target.loan = Loan(graph, 1)
    request = RowRequest(SamplingParams(max_new_tokens=NEW), 0)
    with pytest.raises(RuntimeError, match="overwritten by its next run"):
        batch.join_all([(0, request), (1, request)], stale)
    found = kept.longest(alone.tokens)
    assert found is not None and found.target.loan is None
    for prompt in (alone, found):
        held = [tensor for layer in prompt.target.layers for tensor in layer.tensors()]
        for ours, theirs in zip(held, before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@torch.no_grad()
def test_a_single_prompt_of_a_graph_is_copied_when_it_stands_alone(make_hybrid) -> None:
    model = make_hybrid(["mamba2", "attention"], seed=5)
    found = read(model, None, prompts_of([21], seed=1), whole_of(model))
    assert found.target.loan is None and found.own() is found
    found.target.loan = Loan(Graph(), 0)
    memory = {tensor.data_ptr() for layer in found.target.layers for tensor in layer.tensors()}
    alone = found.prompt(0).target
    assert not memory & {tensor.data_ptr() for layer in alone.layers for tensor in layer.tensors()}
