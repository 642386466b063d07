"""Rows that join and leave a batch between steps: each has the text that it has alone."""

import random
from dataclasses import replace

import pytest
import torch
from decode.engines import noisy, prompts_of

from mambactl.decode.backend import make_engine, open_batch
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.kept_prompts import KeptPrompts
from mambactl.decode.open_batch import RowRequest
from mambactl.decode.prompt_reading import PromptReading, ReadPrompt, ReadRows
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.kernels.dispatch import SWITCH

MIXERS = ["mamba2_mixed", "mamba1", "attention"]
EOS = (2, 5)
LIMIT = 96


def read_rows(target, draft, prompts, start=None, piece=7) -> ReadRows:
    reading = PromptReading(target, draft, prompts, start, piece)
    while not reading.read():
        pass
    return reading.rows()


def read(target, draft, prompts, start=None, piece=7) -> list[ReadPrompt]:
    rows = read_rows(target, draft, prompts, start, piece)
    return [rows.prompt(row) for row in range(len(prompts))]


def jobs_of(count: int) -> list[tuple[list[int], SamplingParams, int]]:
    """Prompts of 1 to 40 tokens, greedy and drawn, with seeds of any size."""
    draw = random.Random(count)
    prompts = prompts_of([draw.randint(1, 40) for _ in range(count)])
    return [
        (
            prompt,
            SamplingParams(
                temperature=draw.choice([0.0, 0.7, 1.2]),
                top_p=draw.choice([1.0, 0.8]),
                top_k=draw.choice([0, 9]),
                seed=draw.randint(0, 2**40),
                max_new_tokens=draw.randint(1, 9),
                eos_token_ids=EOS,
            ),
            draw.randint(0, 3),
        )
        for prompt in prompts
    ]


@pytest.fixture
def models(make_hybrid):
    target = make_hybrid(MIXERS, seed=1)
    return target, noisy(make_hybrid(MIXERS, seed=1), 0.02)


def decoded(batch, target, draft, jobs) -> dict[int, tuple[list[int], str | None]]:
    """All jobs through a batch, which some join while others are under way."""
    draw, waiting = random.Random(0), list(range(len(jobs)))
    texts, ends = {number: [] for number in waiting}, {}
    while waiting or batch.running:
        while waiting and batch.room and draw.random() < 0.7:
            number = waiting.pop(0)
            prompt, params, key = jobs[number]
            (found,) = read(target, draft, [prompt])
            batch.join(number, RowRequest(params, key, likely=number % 3 == 0), found)
        for written in batch.step():
            texts[written.row] += written.tokens
            assert (written.likely is not None) == (written.row % 3 == 0)
            assert written.likely is None or len(written.likely) == len(written.tokens)
            if written.finish is not None:
                ends[written.row] = written.finish
    return {number: (texts[number], ends[number]) for number in texts}


@pytest.mark.parametrize(
    "engine, draft",
    [
        ("auto", None),
        ("auto", "model"),
        ("device", "ngram"),
        ("reference", "model"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("auto", "ngram"),
                ("device", None),
                ("device", "model"),
                ("kernels", None),
                ("kernels", "model"),
            )
        ),
    ],
)
def test_rows_have_the_text_that_they_have_alone(models, monkeypatch, ops, engine, draft) -> None:
    """`device`: as on a GPU, where states are stored seldom and steps have 2^n rows; `kernels`:
    with a GPU's kernels.
    """
    if engine == "kernels" and torch.cuda.is_available():
        pytest.skip("not interpreted here: test_rows_on_a_gpu_have_the_text_of_the_reference")
    if engine == "reference":
        monkeypatch.setenv(SWITCH, "reference")
    target, model = models
    helper = model if draft == "model" else draft
    k = 0 if draft is None else 3
    # interpreted kernels take seconds a step
    jobs = jobs_of(3 if engine == "kernels" else 8)
    alone = make_engine(target, helper, k)
    expected = [alone.generate([prompt], params, None, [key]) for prompt, params, key in jobs]
    if engine in ("device", "kernels"):
        own = ReferenceOps() if engine == "device" else ops()
        batch = FusedEngine(target, helper, k, own).open(9, LIMIT, EOS)
    else:
        batch = open_batch(target, helper, k, 5, LIMIT, EOS)
    found = decoded(batch, target, model if draft == "model" else None, jobs)
    assert found == {n: (one.tokens[0], one.finish[0]) for n, one in enumerate(expected)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("draft", [None, "ngram", "model"])
def test_rows_on_a_gpu_have_the_text_of_the_reference(models, draft) -> None:
    """In float32, greedy: what was drawn may differ where two kernels round."""
    target, model = (each.cuda() for each in models)
    helper = model if draft == "model" else draft
    k = 0 if draft is None else 3
    jobs = [(p, SamplingParams(max_new_tokens=q.max_new_tokens), 0) for p, q, _ in jobs_of(24)]
    alone = make_engine(target, helper, k, exact=True)
    expected = [alone.generate([prompt], params).tokens[0] for prompt, params, _ in jobs]
    batch = open_batch(target, helper, k, 8, LIMIT, ())
    found = decoded(batch, target, model if draft == "model" else None, jobs)
    same = sum(found[n][0] == tokens for n, tokens in enumerate(expected))
    assert same >= len(jobs) - 1


@pytest.mark.parametrize("engine", ["device", "reference"])
@pytest.mark.parametrize("draft", [None, "model"])
def test_rows_read_together_join_together(models, monkeypatch, engine, draft) -> None:
    """Prompts of different lengths, one of them for two rows, beside a row that is under way."""
    target, model = models
    helper, k = (model, 3) if draft else (None, 0)
    if engine == "reference":
        monkeypatch.setenv(SWITCH, "reference")
        batch = open_batch(target, helper, k, 9, LIMIT, EOS)
    else:
        batch = FusedEngine(target, helper, k, ReferenceOps()).open(9, LIMIT, EOS)
    (first, *prompts), limits = prompts_of([9, 21, 4, 13]), (12, 9, 7, 8, 6)
    drawn = SamplingParams(temperature=0.8, seed=5, eos_token_ids=EOS)
    requests = [
        RowRequest(replace(drawn, max_new_tokens=limit, temperature=0.8 * (row % 2)), row)
        for row, limit in enumerate(limits)
    ]
    batch.join(0, requests[0], *read(target, helper, [first]))
    texts = {row: [] for row in range(5)}
    for written in batch.step():
        texts[written.row] += written.tokens
    reading = PromptReading(target, helper, prompts, None, 7)
    while not reading.read():
        pass
    rows = reading.rows().select([0, 1, 2, 2])
    batch.join_all([(row, requests[row]) for row in range(1, 5)], rows)
    while batch.running:
        for written in batch.step():
            texts[written.row] += written.tokens
    alone = make_engine(target, helper, k)
    for row, prompt in enumerate([first, *prompts, prompts[2]]):
        request = requests[row]
        assert texts[row] == alone.generate([prompt], request.params, None, [request.key]).tokens[0]
    # what is kept of them is as it was
    batch.join(5, requests[2], reading.rows().prompt(1))
    again = []
    while batch.running:
        again += [token for written in batch.step() for token in written.tokens]
    assert again == texts[2]


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_row_leaves_before_the_next_step(models, monkeypatch, engine) -> None:
    if engine == "reference":
        monkeypatch.setenv(SWITCH, "reference")
    target = models[0]
    batch = open_batch(target, None, 0, 2, LIMIT, ())
    request = RowRequest(SamplingParams(max_new_tokens=30))
    first, second, third = prompts_of([5, 9, 12])
    for name, prompt in ((1, first), (2, second)):
        batch.join(name, request, *read(target, None, [prompt]))
    for _ in range(3):
        batch.step()
    assert batch.room == 0
    batch.leave(1)
    batch.leave(1)
    assert batch.room == 1 and batch.running == 1
    batch.join(3, request, *read(target, None, [third]))
    texts = {2: [], 3: []}
    while batch.running:
        for written in batch.step():
            texts[written.row] += written.tokens
    alone = make_engine(target, None, 0)
    assert texts[3] == alone.generate([third], request.params).tokens[0]
    assert texts[2] == alone.generate([second], request.params).tokens[0][-len(texts[2]) :]


@pytest.mark.parametrize(
    "limits, moves",
    [((6, 6, 6, 6), []), ((9, 6, 9, 6), [(2, 1)]), ((6, 9, 6, 9), [(3, 2), (2, 0)])],
)
def test_rows_that_end_together_are_not_moved(models, monkeypatch, limits, moves) -> None:
    """Rows that go on take the places of those that end."""
    target = models[0]
    batch = FusedEngine(target, None, 0, ReferenceOps()).open(len(limits), LIMIT, ())
    moved, move = [], batch.session.move

    def note(source: int, place: int) -> None:
        moved.append((source, place))
        move(source, place)

    monkeypatch.setattr(batch.session, "move", note)
    prompts = prompts_of([9, 4, 7, 12])
    requests = [RowRequest(SamplingParams(max_new_tokens=limit)) for limit in limits]
    batch.join_all(list(enumerate(requests)), read_rows(target, None, prompts))
    texts = {row: [] for row in range(len(limits))}
    while batch.running == len(limits):
        for written in batch.step():
            texts[written.row] += written.tokens
    assert moved == moves
    while batch.running:
        for written in batch.step():
            texts[written.row] += written.tokens
    alone = make_engine(target, None, 0)
    for row, request in enumerate(requests):
        assert texts[row] == alone.generate([prompts[row]], request.params).tokens[0]


def test_how_likely_tokens_are_is_what_the_model_says(models) -> None:
    target = models[0]
    (prompt,) = prompts_of([8])
    batch = open_batch(target, "ngram", 2, 2, LIMIT, ())
    request = RowRequest(SamplingParams(temperature=0.7, max_new_tokens=9), likely=True)
    batch.join(0, request, *read(target, None, [prompt]))
    tokens, likely = [], []
    while batch.running:
        for written in batch.step():
            tokens += written.tokens
            likely += written.likely
    with torch.no_grad():
        logits = target(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    for row, token, each in zip(logprobs, tokens, likely, strict=True):
        assert each.logprob == pytest.approx(row[token].item(), abs=1e-4)
        values = [value for _, value in each.top]
        assert values == pytest.approx(row.topk(len(values)).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("draft", [False, True])
def test_prompts_read_together_or_from_a_point_are_as_if_read_alone(models, draft) -> None:
    target, model = models
    draft = model if draft else None
    shared, *rest = prompts_of([20, 3, 11, 1])
    prompts = [shared + each for each in rest]
    alone = [read(target, draft, [prompt], piece=100)[0] for prompt in prompts]
    (start,) = read(target, draft, [shared])
    for found in (read(target, draft, prompts), read(target, draft, prompts, start, piece=6)):
        for one, expected in zip(found, alone, strict=True):
            assert one.tokens == expected.tokens
            torch.testing.assert_close(one.hidden, expected.hidden, atol=2e-4, rtol=1e-3)
            assert one.target.lengths.tolist() == [len(one.tokens)]
            if draft is not None:
                assert one.draft.lengths.tolist() == [len(one.tokens) - 1]


def test_points_are_found_by_their_tokens_and_forgotten_by_age(models) -> None:
    target = models[0]
    long, other = prompts_of([200, 150])
    points = [read(target, None, [tokens], piece=300)[0] for tokens in (long[:70], long, other)]
    kept = KeptPrompts(sum(point.nbytes() for point in points))
    for point in points:
        kept.keep(ReadRows.of(point))
    assert kept.longest(long).tokens == long and kept.longest(long[:199]).tokens == long[:70]
    # the same one each time
    assert kept.longest(long) is kept.longest(long)
    assert kept.longest(long[:69]) is None
    # 100 tokens are shared, of which 70 are known: too few more to be worth a point
    parting = long[:100] + other
    assert kept.branch(parting, known=70) is None
    assert kept.branch(parting, known=0) == 100
    # what was used longest ago goes first
    kept.longest(other), kept.longest(long[:70])
    kept.keep(ReadRows.of(read(target, None, [other[:149]], piece=300)[0]))
    assert kept.longest(long).tokens == long[:70]
    assert kept.nbytes == sum(point.size for point in kept.points) <= kept.most


def test_rows_read_together_are_kept_together_until_one_is_used(models) -> None:
    target = models[0]
    prompts = prompts_of([70, 50, 60])
    rows = read_rows(target, None, [*prompts, prompts[0]], piece=1000)
    alone = [read(target, None, [prompt])[0] for prompt in prompts]
    kept = KeptPrompts(rows.nbytes() + sum(point.nbytes() for point in alone[1:]))
    kept.keep(rows)
    # twice the same prompt is one point, and all of them are held in the memory of the rows
    assert [point.tokens for point in kept.points] == prompts
    assert kept.nbytes == rows.nbytes()
    for number in (1, 2):
        found = kept.longest([*prompts[number], 5])
        torch.testing.assert_close(found.hidden, alone[number].hidden, atol=2e-4, rtol=1e-3)
        assert found.nbytes() == alone[number].nbytes()
        assert found is kept.longest(prompts[number])
    assert kept.nbytes == kept.most
    # the last row of the others takes their memory with it, which is let go of for another prompt
    kept.keep(ReadRows.of(alone[0]))
    assert kept.nbytes == kept.most
    longer = prompts_of([80])
    kept.keep(ReadRows.of(read(target, None, longer, piece=300)[0]))
    assert [point.tokens for point in kept.points] == [prompts[1], prompts[2], longer[0]]


def test_rows_that_do_not_fit_together_are_kept_alone(models) -> None:
    target = models[0]
    prompts = prompts_of([70, 20])
    rows, alone = read_rows(target, None, prompts, piece=1000), read(target, None, prompts[1:])[0]
    kept = KeptPrompts(alone.nbytes())
    kept.keep(rows)
    assert [point.tokens for point in kept.points] == prompts[1:]
    assert kept.nbytes == alone.nbytes() < rows.nbytes()


def test_a_kept_prompt_that_memory_lacks_for_is_read_again(models, monkeypatch, capsys) -> None:
    target = models[0]
    rows = read_rows(target, None, prompts_of([30, 20]), piece=1000)
    kept = KeptPrompts(10**9)
    kept.keep(rows)

    def lack(*_) -> ReadPrompt:
        raise MemoryError("out of memory")

    monkeypatch.setattr(ReadRows, "prompt", lack)
    assert kept.longest(rows.prompts[0]) is None and len(kept.points) == 1
    assert "is read again" in capsys.readouterr().err
