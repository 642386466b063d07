"""Pieces of text add up to the text of all tokens, for tokenizers of every kind."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mambactl.generation.detokenizer import INCOMPLETE, MOST_TOKENS, Detokenizer


def of_bytes() -> PreTrainedTokenizerFast:
    """Every byte is a token, as in a byte-level BPE without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def of_pieces() -> PreTrainedTokenizerFast:
    """Words with their space and bytes as a way out, decoded as SentencePiece does."""
    words = ["▁the", "▁old", "▁", "house", "▁house", "s", ".", "é"]
    names = ["<unk>", *words, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def of_words(tidies: bool) -> PreTrainedTokenizerFast:
    """Whole words that are joined by spaces, which may be tidied before punctuation."""
    names = ["<unk>", "<end>", "do", "n't", "it", "'s", ".", ",", "?", "'", "we", "house"]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        clean_up_tokenization_spaces=tidies,
    )


KINDS = {
    "bytes": of_bytes,
    "pieces": of_pieces,
    "words": lambda: of_words(False),
    "tidied words": lambda: of_words(True),
}


def pieces(tokenizer, steps: list[list[int]]) -> list[str]:
    text = Detokenizer(tokenizer)
    return [*(text.add(step) for step in steps), text.finish()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_pieces_add_up(kind: str, seed: int) -> None:
    """Random tokens: characters that never end, special tokens, several tokens in a step."""
    tokenizer, draw = KINDS[kind](), random.Random(seed)
    steps = [
        [draw.randrange(len(tokenizer)) for _ in range(draw.choice((1, 1, 2, 5, 30)))]
        for _ in range(8 * MOST_TOKENS)
    ]
    tokens = [token for step in steps for token in step]
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    found = pieces(tokenizer, steps)
    assert "".join(found) == whole
    assert sum(map(bool, found)) > 10


def test_a_character_comes_whole() -> None:
    tokenizer = of_bytes()
    words = "naïve 🦔 über ☃"
    steps = [[token] for token in tokenizer(words).input_ids]
    found = pieces(tokenizer, steps)
    assert "".join(found) == words and len(steps) > len(words)
    assert not any(INCOMPLETE in piece for piece in found)
    # a letter is not held back by what follows it
    assert found[:2] == ["n", "a"]


def test_punctuation_moves_up_to_its_word() -> None:
    tokenizer = of_words(tidies=True)
    steps = [[tokenizer.convert_tokens_to_ids(word)] for word in ("we", "do", "n't", ".")]
    assert pieces(tokenizer, steps) == ["", "we", "", "", " don't."]


def test_a_step_costs_the_same_however_long_the_text() -> None:
    tokenizer, asked = of_bytes(), []

    class Counting:
        clean_up_tokenization_spaces = False

        def decode(self, tokens, skip_special_tokens):
            asked.append(len(tokens))
            return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

        def convert_ids_to_tokens(self, ids):
            return tokenizer.convert_ids_to_tokens(ids)

    text = Detokenizer(Counting())
    for token in tokenizer("the old house and the river " * 100).input_ids:
        text.add([token])
    assert max(asked) <= MOST_TOKENS
