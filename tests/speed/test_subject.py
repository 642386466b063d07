"""Prompts, and the check of scripted answers."""

import pytest

from mambactl.decode import backend
from mambactl.decode.engine import Engine
from mambactl.errors import CheckError
from mambactl.speed.subject import Grid, random_prompts, scripted_prompts
from mambactl.speed.synthetic import follows, successors
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


def test_a_wrong_token_is_named(scripted, monkeypatch):
    class Wrong(Engine):
        def generate(self, prompts, params, **kwargs):
            output = super().generate(prompts, params, **kwargs)
            output.tokens[1][3] ^= 1
            return output

    subject, _ = scripted("tiny")
    throughput(subject, Grid([4], [2], 6, 0, 1))
    monkeypatch.setattr(backend, "Engine", Wrong)
    with pytest.raises(CheckError, match="tiny: token 3 of row 1 is") as raised:
        throughput(subject, Grid([4], [2], 6, 0, 1))
    assert raised.value.code == 7
