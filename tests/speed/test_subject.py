"""Prompts, and the check of scripted answers."""

from types import SimpleNamespace

import pytest

from mambactl.decode import backend
from mambactl.decode.engine import Engine
from mambactl.errors import CheckError
from mambactl.speed import subject as subject_module
from mambactl.speed.shapes import cycle_of, follows, successors
from mambactl.speed.subject import Grid, random_prompts, scripted_prompts
from mambactl.speed.throughput import throughput


def test_prompts_depend_on_the_seed_alone():
    assert random_prompts(97, 2, 50, 1) == random_prompts(97, 2, 50, 1)
    assert random_prompts(97, 2, 50, 1) != random_prompts(97, 2, 50, 2)
    assert max(map(max, random_prompts(97, 4, 500, 0))) == 96


def test_scripted_prompts_are_pieces_of_the_cycle():
    successor = successors(64, limit=24)
    prompts = scripted_prompts(successor, 20, 30, 0)
    assert [len(prompt) for prompt in prompts] == [30] * 20
    assert len({prompt[0] for prompt in prompts}) > 5
    for prompt in prompts:
        assert follows(prompt, successor)
        # a draft of a trimmed vocabulary knows all of them
        assert max(prompt) < 24


def test_scripted_prompts_end_where_a_period_begins():
    successor = successors(64, limit=24)
    first = cycle_of(successor)[::6].tolist()
    for prompt in scripted_prompts(successor, 20, 30, 0, period=6):
        assert prompt[-1] in first and follows(prompt, successor)


def test_rounds_are_of_new_engines(scripted, monkeypatch):
    made = []

    class Counted(Engine):
        def __init__(self, *arguments):
            made.append(0)
            super().__init__(*arguments)

        def generate(self, *arguments, **keywords):
            made[-1] += 1
            return super().generate(*arguments, **keywords)

    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    monkeypatch.setattr(backend, "Engine", Counted)
    subject, _ = scripted("tiny")
    (point,) = throughput(subject, Grid([4], [1], 6, 1, 2, repeats=3))
    assert made == [3, 3, 3]
    for name in ("first_token_ms", "decode_tokens_per_second"):
        low, high = point["intervals"][name]
        assert 0 < low <= point[name] <= high


def test_the_first_token_takes_the_prompt_and_a_step(scripted, monkeypatch):
    now = 0.0

    class Slow(Engine):
        def generate(self, prompts, params, on_tokens=None, keys=None):
            nonlocal now
            now += 2.0
            first = True

            def heard(row, tokens):
                nonlocal now, first
                now, first = now + (0.5 if first else 7.0), False
                return on_tokens(row, tokens)

            return super().generate(prompts, params, heard, keys)

    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    monkeypatch.setattr(backend, "Engine", Slow)
    monkeypatch.setattr(subject_module, "time", SimpleNamespace(perf_counter=lambda: now))
    subject, _ = scripted("tiny")
    (point,) = throughput(subject, Grid([4], [1], 3, 0, 1))
    assert point["first_token_ms"] == pytest.approx(2500)


def test_a_wrong_token_is_named(scripted, monkeypatch):
    class Wrong(Engine):
        def generate(self, prompts, params, **kwargs):
            output = super().generate(prompts, params, **kwargs)
            output.tokens[1][3] ^= 1
            return output

    subject, _ = scripted("tiny")
    throughput(subject, Grid([4], [2], 6, 0, 1))
    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    monkeypatch.setattr(backend, "Engine", Wrong)
    with pytest.raises(CheckError, match="tiny: token 3 of row 1 is") as raised:
        throughput(subject, Grid([4], [2], 6, 0, 1))
    assert raised.value.code == 7
