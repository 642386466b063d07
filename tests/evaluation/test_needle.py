"""Needle scores of models whose answers are known, and their picture."""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS

from mambactl.data.haystack import ANSWER, NEEDLE
from mambactl.evaluation.heatmap import draw_grids
from mambactl.evaluation.needle import (
    found_by_prompt,
    make_grid,
    measure_needle,
    retrieved,
    rouge1,
    scores_by_depth,
)

ROWS = [{"text": " ".join(["the old house . a red door ."] * 40)}]


def test_an_answer_is_right_when_it_holds_all_of_it():
    assert retrieved(NEEDLE) == retrieved("In DOLORES PARK, with a Sandwich!") == 1
    assert retrieved("Sit in Dolores Park.") == retrieved("Eat a sandwich.") == retrieved("") == 0


def test_rouge1_is_the_f1_of_shared_words():
    assert rouge1(NEEDLE, NEEDLE) == 1 and rouge1("", "a b") == 0
    # three of four words shared, each as often as in both
    assert rouge1("a a b c", "a a a b") == pytest.approx(0.75)
    assert rouge1("A, b!", "a b c d") == pytest.approx(2 * 2 / 6)


class Knowing(torch.nn.Module):
    """A model that knows every next token in prompts of one length, and none in others."""

    def __init__(self, length):
        super().__init__()
        self.head = torch.nn.Linear(97, 97, bias=False)
        torch.nn.init.eye_(self.head.weight)
        self.device, self.length, self.seen = torch.device("cpu"), length, []

    def base_model(self, input_ids, use_cache):
        self.seen.append(tuple(input_ids.shape))
        following = input_ids.roll(-1, 1)
        if input_ids.shape[1] != self.length:
            following = (following + 1) % 97
        # nothing follows the last token in the row: the answer's last one does
        following[:, -1] = self.last
        return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(following, 97).float())

    def get_output_embeddings(self):
        return self.head


def test_argmax_scores_are_those_of_the_answer_by_length(tiny_tokenizer):
    grid = make_grid(tiny_tokenizer, ROWS, [300, 200], 3, 0, "argmax")
    assert grid.lengths == [200, 300] and grid.depths == [0, 0.5, 1]
    answer = len(tiny_tokenizer(ANSWER)["input_ids"])
    model = Knowing(200 - 1)
    model.last = grid.answer[-1]
    found = scores_by_depth(grid, measure_needle(model, tiny_tokenizer, grid, []))
    # all but the answer's last token are read, the longest first
    assert model.seen == [(3, 299), (3, 199)] and len(grid.answer) == answer
    assert found["retrieved"] == [[1, 1, 1], [0, 0, 0]] and found["mean_retrieved"] == 0.5
    assert found["tokens"][1] == [pytest.approx(1 / answer)] * 3


def test_generated_answers_are_those_of_the_engine(make_hybrid, tiny_tokenizer, monkeypatch):
    from mambactl.decode.engine import Engine
    from mambactl.decode.sampler import SamplingParams

    model = make_hybrid(["mamba2", "attention"])
    grid = make_grid(tiny_tokenizer, ROWS, [160, 240], 2, 0, "generate")
    # one prompt at a time
    monkeypatch.setattr("mambactl.evaluation.needle.BATCH_TOKENS", 240)
    told = []
    scores = measure_needle(model, tiny_tokenizer, grid, [2], told.append)
    found = scores_by_depth(grid, scores, samples=True)
    params = SamplingParams(max_new_tokens=32, eos_token_ids=(2,))
    for prompts, answers in zip(grid.prompts, found["answers"], strict=True):
        tokens = Engine(model).generate(prompts, params).tokens
        assert answers == [
            text.strip() for text in tiny_tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ]
    assert found["mean_retrieved"] == 0 and sum(told) == 4
    assert "answers" not in scores_by_depth(grid, scores)


def test_several_texts_are_tried_at_every_depth(tiny_tokenizer):
    rows = [{"text": " ".join(random.Random(0).choices(WORDS, k=400))}]
    one, three = (make_grid(tiny_tokenizer, rows, [200], 4, 0, "argmax", n) for n in (1, 3))
    assert [len(grid.prompts[0]) for grid in (one, three)] == [4, 12] and three.texts == 3
    # the first text of a depth is the one that is tried alone
    assert three.prompts[0][::3] == one.prompts[0]
    assert len({tuple(prompt) for prompt in three.prompts[0]}) == 12
    known = [1.0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1]
    scores = [[{"retrieved": right, "answers": str(i)} for i, right in enumerate(known)]]
    found = scores_by_depth(three, scores, samples=True)
    assert found["retrieved"] == [[1 / 3, 0, 2 / 3, 1]]
    assert found["mean_retrieved"] == pytest.approx(0.5)
    assert found["answers"][0][3] == ["9", "10", "11"]
    assert found_by_prompt(scores)[0].tolist() == known


def test_a_picture_shows_every_cell(tmp_path):
    pytest.importorskip("matplotlib")
    panels = {"student": [[1, 0], [0.5, 0], [0, 0]], "teacher": [[1, 1], [1, 1], [1, 1]]}
    draw_grids(panels, [64, 128, 256], [0, 1], "a model", tmp_path / "a.png.partial")
    content = (tmp_path / "a.png.partial").read_bytes()
    panels["student"][2][1] = 1
    draw_grids(panels, [64, 128, 256], [0, 1], "a model", tmp_path / "b.png")
    assert content.startswith(b"\x89PNG") and content != (tmp_path / "b.png").read_bytes()
