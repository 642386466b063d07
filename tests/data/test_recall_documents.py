"""Recall documents can be answered from themselves, are made by their seed, and are no probes."""

import itertools

import numpy as np
import pytest

from mambactl.data.recall_documents import (
    SHORTEST,
    recall_documents,
    recall_tokens,
    training_words,
    word_ids,
)
from mambactl.errors import UsageError
from mambactl.evaluation.recall import recall_probes

PROBE_LENGTHS = [64, 256]


@pytest.fixture(scope="module")
def wordy_tokenizer():
    """A word-level tokenizer with more lower-case words than probes use, and 676 names."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["<s>", "<unk>", "\n", *":,;.|/=->", "->"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(word) for word in itertools.islice(itertools.product(letters, repeat=3), 5000)]
    names = ["N" + "".join(name) for name in itertools.product(letters, repeat=2)]
    vocabulary = {word: place for place, word in enumerate([*signs, *words, *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<s>"
    )


def runs(document):
    """[start, stop) of every stretch of answers."""
    edges = np.flatnonzero(np.diff(np.pad(document.answers.astype(int), 1)))
    return edges.reshape(-1, 2).tolist()


def holds(ids, part):
    size = len(part)
    return any(ids[place : place + size] == part for place in range(len(ids) - size + 1))


def test_every_answer_stands_before_its_question(wordy_tokenizer):
    documents = recall_documents(wordy_tokenizer, 20_000, 300, seed=0)
    assert {document.kind for document in documents} == {"kv", "mqar", "copy"}
    for document in documents:
        ids, found = document.input_ids.tolist(), runs(document)
        assert found and document.choices > 1
        for start, stop in found:
            # a pair is found by its key, or at least by the last token of what stands before it
            first = start if document.kind == "copy" else start - 1
            assert holds(ids[:start], ids[first:stop]), (document.kind, start)
        assert found[0][0] >= len(ids) // 6


@pytest.mark.parametrize("tokens", [64, 1000, 50_000])
def test_lengths_and_their_sum_are_as_asked(wordy_tokenizer, tokens):
    lengths = [len(d.input_ids) for d in recall_documents(wordy_tokenizer, tokens, 300, seed=1)]
    assert min(lengths) >= SHORTEST and max(lengths) <= 300
    assert abs(sum(lengths) - tokens) <= SHORTEST // 2
    if tokens == 50_000:
        # every scale of length gets as many tokens, a document in two is shorter than the middle
        assert np.median(lengths) == pytest.approx((64 * 300) ** 0.5, rel=0.15)
    assert recall_documents(wordy_tokenizer, 0, 16, seed=1) == []


def test_a_seed_decides_the_documents(wordy_tokenizer):
    one, again, other = (
        [d.input_ids.tobytes() for d in recall_documents(wordy_tokenizer, 5000, 200, seed)]
        for seed in (3, 3, 4)
    )
    assert one == again and not set(one) & set(other)
    assert len(set(one)) == len(one)


def test_every_token_but_the_first_is_learned(wordy_tokenizer):
    for document in recall_documents(wordy_tokenizer, 2000, 200, seed=0):
        assert document.example.loss_mask.all()
        assert np.array_equal(document.example.input_ids, document.input_ids)


def test_documents_and_probes_share_no_word(wordy_tokenizer):
    assert len(word_ids(wordy_tokenizer)) == 4096 and len(training_words(wordy_tokenizer)) == 676
    assert not set(word_ids(wordy_tokenizer)) & set(training_words(wordy_tokenizer))
    probes = recall_probes(wordy_tokenizer, PROBE_LENGTHS, rows=4, seed=0)
    asked = {int(index) for probe in probes for index in probe.input_ids[probe.answers]}
    documents = recall_documents(wordy_tokenizer, 20_000, 300, seed=0)
    used = {int(index) for document in documents for index in document.input_ids}
    assert len(asked) > 100 and not asked & used


def test_with_few_words_no_document_repeats_a_probe(tiny_tokenizer):
    assert training_words(tiny_tokenizer) == word_ids(tiny_tokenizer)
    size, separators = 8, set(tiny_tokenizer.convert_tokens_to_ids([":", ","]))
    documents = [d.input_ids.tolist() for d in recall_documents(tiny_tokenizer, 30_000, 256, 0)]
    seen = {tuple(ids[i : i + size]) for ids in documents for i in range(len(ids) - size + 1)}
    probed = {
        tuple(row[i : i + size])
        for seed in range(3)
        for probe in recall_probes(tiny_tokenizer, PROBE_LENGTHS, 4, seed)
        for row in probe.input_ids.tolist()
        for i in range(len(row) - size + 1)
    }
    assert len(seen) > 10_000 and len(probed) > 2000 and not seen & probed
    assert not separators & {index for ids in documents for index in ids}


def test_a_share_is_of_all_tokens():
    assert recall_tokens(0.0, 1000) == 0 and recall_tokens(0.5, 1000) == 1000
    added = recall_tokens(0.04, 1_000_000)
    assert added / (1_000_000 + added) == pytest.approx(0.04, rel=1e-5)


def test_short_rows_and_wordless_vocabularies_are_refused(tiny_tokenizer):
    with pytest.raises(UsageError, match="64 tokens and more, rows have 63") as caught:
        recall_documents(tiny_tokenizer, 1000, 63, 0)
    assert "--max-length" in caught.value.hint
