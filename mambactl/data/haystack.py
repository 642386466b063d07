"""Prompts with one sentence hidden in a long text, and the question that it answers.

Needle and question are those of the paper (arXiv 2408.15237, section on long context; first by
G. Kamradt, 2023). Prompts are made of tokens, so that all of one length have exactly that length.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mambactl.data.chat_template import render_chat
from mambactl.data.format import encode
from mambactl.data.recall_documents import encode_words
from mambactl.data.turns import Row
from mambactl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEEDLE = (
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park "
    "on a sunny day."
)
QUESTION = "What is the best thing to do in San Francisco?"
# where the answer starts when it is not generated but compared with: `is` alone is often followed
# by `to`, and nothing of what was found is said before these words
ANSWER_START = "The best thing to do in San Francisco is eat a"
ANSWER = " sandwich and sit in Dolores Park"
BEFORE = "Here is a long text. A question about it follows.\n\n"
AFTER = "\n\nAnswer in one sentence, with what the text says."
# stands for the text while a chat template is rendered
_MARK = "\u2982"
_SENTENCE_ENDS = (".", "!", "?", "\n", "Ċ")
FEWEST_TOKENS = 32


@dataclass(frozen=True)
class Frame:
    """Token ids around a text: `before`, the text with the needle in it, `after`."""

    before: list[int]
    after: list[int]
    needle: list[int]

    @property
    def size(self) -> int:
        """Tokens of a prompt that are not text."""
        return len(self.before) + len(self.after) + len(self.needle)


def make_frame(
    tokenizer: "PreTrainedTokenizerBase",
    chat: bool = True,
    sentence: str = NEEDLE,
    question: str = QUESTION,
) -> Frame:
    """Needle and question as this tokenizer writes them, in its chat template if it has one."""
    after = f"{AFTER} {question}"
    text = f"{BEFORE}{_MARK}{after}"
    needle = encode_words(tokenizer, f" {sentence}")
    if not (chat and getattr(tokenizer, "chat_template", None)):
        start = list(tokenizer(BEFORE, verbose=False)["input_ids"])
        return Frame(start, encode_words(tokenizer, f"{after}\nAnswer:"), needle)
    rendered = render_chat(tokenizer, [{"role": "user", "content": text}], prompt=True)
    before, mark, after = rendered.partition(_MARK)
    if not mark:
        raise UsageError("the chat template drops parts of a message", "use another checkpoint")
    return Frame(encode_words(tokenizer, before), encode_words(tokenizer, after), needle)


class Haystack:
    """Real text as token ids, read from another offset for every prompt.

    Documents are put in another order each time around, so that a text shorter than a prompt is no
    pattern that repeats.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", seed: int):
        texts = [_plain(row) for row in rows]
        ids = [list(encode({"text": f"{text}\n\n"}, tokenizer).input_ids) for text in texts]
        # what the tokenizer puts before every text belongs before the first one only
        starts = [tokenizer.bos_token_id]
        self.documents = [
            [int(i) for i in (row[1:] if row and row[0] in starts else row)] for row in ids
        ]
        self.tokens = sum(map(len, self.documents))
        if self.tokens < FEWEST_TOKENS:
            raise UsageError(
                f"the haystack has {self.tokens} tokens", "give a longer text: --needle-text FILE"
            )
        unique = sorted({token for row in self.documents for token in row})
        names = tokenizer.convert_ids_to_tokens(unique)
        self.ends = {
            token
            for token, name in zip(unique, names, strict=True)
            if name is not None and name.endswith(_SENTENCE_ENDS)
        }
        self.seed = seed

    def read(self, length: int, name: str) -> list[int]:
        """Read `length` tokens; the same `name` and seed give the same ones."""
        rng = random.Random(f"haystack {self.seed} {name}")
        found: list[int] = []
        skip = rng.randrange(self.tokens)
        while len(found) < skip + length:
            order = list(range(len(self.documents)))
            rng.shuffle(order)
            found += [token for index in order for token in self.documents[index]]
        return found[skip : skip + length]

    def position(self, text: Sequence[int], depth: float) -> int:
        """Index in `text` for a needle at depth 0 to 1: after the last sentence that ends by there.

        If no sentence ends before it, exactly at that depth.
        """
        wanted = round(depth * len(text))
        if wanted in (0, len(text)):
            return wanted
        for position in range(wanted, 0, -1):
            if text[position - 1] in self.ends:
                return position
        return wanted


def needle_prompt(
    haystack: Haystack, frame: Frame, length: int, depth: float, room: int, text: int = 0
) -> list[int]:
    """A prompt of `length` - `room` tokens; raises UsageError where no text fits in.

    `room` is left for the answer, so that `length` is what the model has to hold. Every number of
    `text` is another part of the haystack.
    """
    free = length - room - frame.size
    if free < FEWEST_TOKENS:
        least = frame.size + room + FEWEST_TOKENS
        raise UsageError(
            f"a needle in {length} tokens leaves no room for text", f"ask for {least} at least"
        )
    name = f"{length} {depth:.4f}"
    around = haystack.read(free, f"{name} {text}" if text else name)
    position = haystack.position(around, depth)
    return [*frame.before, *around[:position], *frame.needle, *around[position:], *frame.after]


def _plain(row: Row) -> str:
    """The text of a row; of a chat, what was said."""
    if "messages" not in row:
        return "".join(row.get(name, "") for name in ("text", "prompt", "completion")).strip()
    return "\n\n".join(str(turn.get("content") or "").strip() for turn in row["messages"])
