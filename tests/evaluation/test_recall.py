"""Recall probes: what they ask for stands in the row, and the numbers are those of the answers."""

from types import SimpleNamespace

import pytest
import torch

from mambactl.data.recall_documents import word_ids
from mambactl.errors import UsageError
from mambactl.evaluation.recall import (
    kv_probe,
    measure_answers,
    measure_recall,
    mqar_probe,
    recall_probes,
    recalled_by_row,
)

MAKERS = {"kv": kv_probe, "mqar": mqar_probe}


def statements(probe, tokenizer, row):
    """(key, value, asked) of every pair of a row, found by its separators; keys are two words."""
    ids, answers = probe.input_ids[row].tolist(), probe.answers[row].tolist()
    kv = probe.name.startswith("kv")
    mark = tokenizer.convert_tokens_to_ids(":" if kv else ",")
    # where keys and values are, seen from the mark
    key, value = ((-2, 0), (1, 3)) if kv else ((-3, -1), (-1, 0))
    return [
        (
            tuple(ids[place + key[0] : place + key[1]]),
            tuple(ids[place + value[0] : place + value[1]]),
            all(answers[place + value[0] : place + value[1]]),
        )
        for place, index in enumerate(ids)
        if index == mark
    ]


@pytest.mark.parametrize("name", MAKERS)
def test_every_question_has_one_answer_in_its_row(tiny_tokenizer, name):
    probe = MAKERS[name](tiny_tokenizer, 300, rows=3, seed=1)
    assert probe.input_ids.shape[0] == 3 and 250 < probe.input_ids.shape[1] <= 300
    assert probe.chance == 1 / probe.pairs and probe.name == f"{name}-300"
    total = 0
    for row in range(3):
        found = statements(probe, tiny_tokenizer, row)
        stated = {key: value for key, value, asked in found if not asked}
        questions = [(key, value) for key, value, asked in found if asked]
        assert len(stated) == probe.pairs
        assert questions and all(stated[key] == value for key, value in questions)
        assert len({key for key, _ in questions}) == len(questions)
        # asked at the end, after everything was stated
        first = int(probe.answers[row].nonzero()[0])
        assert first > 0.6 * probe.input_ids.shape[1]
        total += len(questions)
    assert probe.queries == total


@pytest.mark.parametrize("make", MAKERS.values())
def test_a_seed_decides_the_rows(tiny_tokenizer, make):
    one, again, other = (make(tiny_tokenizer, 200, 2, seed).input_ids for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


class Knowing(torch.nn.Module):
    """A model that knows the next token of every row, but for what `spoil` changes."""

    def __init__(self, vocabulary, spoil=lambda following: following):
        super().__init__()
        self.head = torch.nn.Linear(vocabulary, vocabulary, bias=False)
        torch.nn.init.eye_(self.head.weight)
        self.device, self.vocabulary, self.spoil = torch.device("cpu"), vocabulary, spoil

    def base_model(self, input_ids, use_cache):
        following = self.spoil(input_ids.roll(-1, 1))
        hidden = 30 * torch.nn.functional.one_hot(following, self.vocabulary).float()
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self):
        return self.head


def test_numbers_are_those_of_the_answers(tiny_tokenizer):
    probe = kv_probe(tiny_tokenizer, 200, rows=3, seed=0)
    found = measure_recall(Knowing(97), probe, batch_size=2)
    assert (found["recall"], found["token_recall"]) == (1, 1)
    assert found["recall_loss"] < 1e-6
    # the second token of every value is wrong: half of the tokens, no whole value
    second = probe.picked & probe.picked.roll(1, 1)

    def spoil(following):
        rows = [int((probe.input_ids.roll(-1, 1) == row).all(1).nonzero()) for row in following]
        return torch.where(second[rows], 0, following)

    found = measure_recall(Knowing(97, spoil), probe, batch_size=2)
    assert (found["recall"], found["token_recall"]) == (0, 0.5)
    assert found["recall_loss"] == pytest.approx(15, rel=1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_values_are_counted_in_the_row_that_asks_for_them(tiny_tokenizer, name):
    probe = MAKERS[name](tiny_tokenizer, 200, rows=4, seed=0)

    def spoil(following):
        rows = [int((probe.input_ids.roll(-1, 1) == row).all(1).nonzero()) for row in following]
        # all of row 1 is wrong, and of row 2 the last token of its last value
        changed = following.clone()
        for index, row in enumerate(rows):
            wrong = probe.picked[row].nonzero().flatten()
            changed[index, {1: wrong, 2: wrong[-1:]}.get(row, wrong[:0])] = 0
        return changed

    answers = measure_answers(Knowing(97, spoil), probe, batch_size=3)
    found, asked = recalled_by_row(answers, probe), probe.queries // 4
    assert found.tolist() == [asked, 0, asked - 1, asked]
    recall = measure_recall(Knowing(97, spoil), probe)["recall"]
    assert found.sum() / probe.queries == pytest.approx(recall)


def test_batches_do_not_change_the_numbers(tiny_tokenizer, make_hybrid):
    model = make_hybrid(["mamba2", "attention"])
    probe = mqar_probe(tiny_tokenizer, 120, rows=3, seed=0)
    one, three = (measure_recall(model, probe, size) for size in (1, 3))
    assert one == pytest.approx(three, rel=1e-5)
    assert 0 <= one["recall"] < 0.5 and one["recall_loss"] > 1


def test_rows_of_8192_tokens_never_have_all_their_logits(tiny_tokenizer, make_hybrid, monkeypatch):
    from mambactl.evaluation import recall

    model = make_hybrid(["mamba2"])
    probe = mqar_probe(tiny_tokenizer, 8192, rows=2, seed=0)
    assert probe.input_ids.shape[1] > 8180 and probe.queries > 500
    sizes = []
    model.lm_head.register_forward_hook(lambda _, given, logits: sizes.append(logits.numel()))
    whole = measure_recall(model, probe, batch_size=2)
    monkeypatch.setattr(recall, "CHUNK_ELEMENTS", 97 * 100)
    monkeypatch.setattr(recall, "MOST_TOKENS", 8192)
    assert measure_recall(model, probe, batch_size=2) == pytest.approx(whole, rel=1e-5)
    assert sizes[0] == probe.queries * 97 and max(sizes[1:]) == 97 * 100


def test_what_cannot_be_made_is_said(tiny_tokenizer):
    with pytest.raises(UsageError, match="does not fit in 16 tokens"):
        recall_probes(tiny_tokenizer, [16], 1, 0)
    wordless = SimpleNamespace(get_vocab=lambda: {"a": 0, "##": 1, "Ġ12": 2})
    with pytest.raises(UsageError, match="no vocabulary of plain words"):
        word_ids(wordless)
