"""Prompts that are read at once, padded: as in pieces, and the same bits as CUDA graphs."""

import pytest
import torch
from decode.engines import noisy, prompts_of
from decode.test_prompt_reader import MODELS

from mambactl.decode.backend import open_batch
from mambactl.decode.gpu.prompt_graphs import MOST_KEPT, WholePrompts, graph_tokens
from mambactl.decode.open_batch import RowRequest
from mambactl.decode.prompt_reading import PromptReading, ReadRows
from mambactl.decode.sampler import SamplingParams

ROWS, NEW = 4, 6
LENGTHS = [21, 1, 40]


@pytest.fixture(scope="module", params=MODELS)
def model(request, make_hybrid):
    return make_hybrid(**MODELS[request.param], seed=5)


def read(model, draft, prompts, whole=None) -> ReadRows:
    reading = PromptReading(model, draft, prompts, None, 4096, whole)
    while not reading.read():
        pass
    return reading.rows()


def whole_of(*models):
    readers = [WholePrompts(each.model, ROWS) for each in models]
    return readers[0], readers[1] if len(readers) > 1 else None


def written(model, draft, found: ReadRows) -> list[list[int]]:
    """Greedy tokens behind the prompts."""
    batch = open_batch(model, draft, 2 if draft else 0, ROWS, 96, [])
    request = RowRequest(SamplingParams(max_new_tokens=NEW), 0)
    batch.join_all([(row, request) for row in range(len(found.prompts))], found)
    texts: list[list[int]] = [[] for _ in found.prompts]
    while batch.running:
        for step in batch.step():
            texts[step.row] += step.tokens
    return texts


def test_whole_prompts_leave_what_pieces_leave(model) -> None:
    prompts = prompts_of(LENGTHS, seed=3)
    draft = noisy(model, 0.02)
    for other in (None, draft):
        models = [model] if other is None else [model, other]
        pieces = read(model, other, prompts)
        at_once = read(model, other, prompts, whole_of(*models))
        torch.testing.assert_close(at_once.hidden, pieces.hidden, rtol=1e-4, atol=1e-4)
        assert written(model, other, at_once) == written(model, other, pieces)
        # each alone, as it is kept for later requests
        alone = [read(model, other, [prompt]) for prompt in prompts]
        kept = [ReadRows.of(at_once.prompt(row)) for row in range(len(prompts))]
        for one, other_one in zip(alone, kept, strict=True):
            assert written(model, other, one) == written(model, other, other_one)


def test_long_prompts_and_many_tokens_are_read_in_pieces(model) -> None:
    whole = WholePrompts(model.model, ROWS)
    assert whole.length([[5] * 100], 4096) == 128
    assert whole.length([[5] * 100] * 3, 4096) == 128
    # three rows take the memory of four
    assert whole.length([[5] * 100] * 3, 511) is None
    assert whole.length([[5] * 2049], 10_000) is None


@pytest.mark.parametrize("width, most", [(8192, 4096), (4096, 4096), (2048, 16384), (576, 58254)])
def test_narrow_models_read_more_tokens_as_a_graph(width, most) -> None:
    assert graph_tokens(width) == most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_graphs_change_no_bit_and_keep_earlier_results(model) -> None:
    model = model.to("cuda")
    whole = whole_of(model)
    first = prompts_of(LENGTHS, seed=3)
    results = [read(model, None, first, whole).own() for _ in range(3)]
    assert list(whole[0].graphs.graphs) == [(ROWS, 48)]
    before = results[2].hidden.clone()
    other = read(model, None, prompts_of([40, 3], seed=4), whole)
    another = read(model, None, prompts_of([33, 48, 47, 2], seed=5), whole)
    assert not torch.equal(other.hidden[0], before[0])
    assert not torch.equal(another.hidden[0], before[0])
    texts = [written(model, None, found) for found in results]
    assert texts[0] == texts[1] == texts[2] == written(model, None, read(model, None, first))
    for found in results:
        assert torch.equal(found.hidden, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("drafted", [False, True])
def test_rows_that_graphs_lend_are_written_by_a_graph(model, drafted) -> None:
    model = model.to("cuda")
    draft = noisy(model, 0.02) if drafted else None
    models = [model] if draft is None else [model, draft]
    whole = whole_of(*models)
    batch = open_batch(model, draft, 2 if drafted else 0, ROWS + 2, 96, [])
    texts: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    for turn in range(4):
        prompts = prompts_of(LENGTHS, seed=turn)
        lent = read(model, draft, prompts, whole)
        assert (lent.target.loan is None) == (turn == 0)
        for index, text in enumerate(written(model, draft, read(model, draft, prompts))):
            texts[10 * turn + index] = text
        request = RowRequest(SamplingParams(max_new_tokens=NEW), 0)
        names = [10 * turn + index for index in range(len(prompts))]
        if turn == 2:
            # the fourth row, which is padding, has no room behind these
            more = read(model, draft, prompts_of(LENGTHS, seed=9))
            for name, row in ((100, 0), (101, 1), (102, 2)):
                batch.join_all([(name, request)], more.select([row]))
        batch.join_all([(name, request) for name in names], lent)
        while batch.running:
            for step in batch.step():
                found.setdefault(step.row, []).extend(step.tokens)
    assert {name: found[name] for name in texts} == texts
    assert len(batch.session.target.writer._writes) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_the_graphs_used_last_are_kept(make_hybrid) -> None:
    whole = WholePrompts(make_hybrid(["mamba2"]).to("cuda").model, 64)
    whole.prepare(2048)
    shapes = list(whole.graphs.graphs)
    assert len(shapes) == 18 and shapes[0] == (1, 16)
    for rows in (2, 4, 8, 16, 32, 64, 2, 4):
        for length in (16, 32):
            for _ in range(2):
                whole.read([[7] * length] * rows, length)
    assert len(whole.graphs.graphs) == MOST_KEPT
    assert (64, 32) in whole.graphs.graphs and (1, 16) not in whole.graphs.graphs
