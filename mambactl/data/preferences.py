"""Pairs of a better and a worse answer to one prompt: read by set, checked, and tokenised.

The answer starts where the rendering of the prompt with the generation prompt ends, and ends with
its end token. Nothing is cut: a pair that is longer than a row is a bad one.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mambactl.checkpoint.vocabulary import beyond_embedding
from mambactl.data.answer_spans import start_of_answer
from mambactl.data.bad_rows import BEYOND, DOUBLED, EMPTY, LONG, LOST, REFUSED, SAME, BadRows
from mambactl.data.begin_token import begins_twice, begun_twice
from mambactl.data.chat_template import ChatRenderer, TemplateStopped
from mambactl.data.doubts import Doubt, Doubts
from mambactl.data.encoding import Example
from mambactl.data.format import TOGETHER, Rules
from mambactl.data.rendered import LostTurn, compared
from mambactl.data.row_files import Found, is_on_hub, read_rows
from mambactl.data.row_forms import (
    CHOSEN,
    PAIRS,
    REJECTED,
    TEMPLATE,
    Preference,
    Reading,
    TextPreference,
    Unread,
    preference_of,
)
from mambactl.data.sources import POOL, round_robin, set_names
from mambactl.data.turns import ASSISTANT, BadRow, Row
from mambactl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = (CHOSEN, REJECTED)
EQUAL = "`chosen` equals `rejected`"


class Pair(NamedTuple):
    """One preference in tokens, all int32; `where` names its row and `key` hashes its prompt."""

    where: str
    key: int
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def answers(self) -> tuple[Example, Example]:
        """Prompt and answer as documents of which the answer is learned: chosen, rejected."""
        return self._example(self.chosen), self._example(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer of both documents."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    @property
    def every_id(self) -> np.ndarray:
        """The ids of prompt and answers."""
        return np.concatenate([self.prompt, self.chosen, self.rejected])

    def _example(self, answer: np.ndarray) -> Example:
        mask = np.zeros(len(self.prompt) + len(answer), bool)
        mask[len(self.prompt) :] = True
        return Example(np.concatenate([self.prompt, answer]), mask)


@dataclass
class PairSet:
    """Pairs of one data set, and its rows that are none."""

    pairs: list[Pair] = field(default_factory=list)
    bad: BadRows = field(default_factory=BadRows)

    def counts(self) -> dict[str, int]:
        """Rows of the set by what became of them."""
        long = self.bad.count(LONG)
        return {"pairs": len(self.pairs), "bad": len(self.bad.found) - long, "too_long": long}


class _Rendered(NamedTuple):
    """A pair as text; answers are characters from `start` of `chosen` and `rejected` on."""

    where: str
    start: int
    chosen: str
    rejected: str
    is_chat: bool
    doubts: Sequence[Doubt] = ()


def load_pairs(
    specs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    chat: bool = True,
    skip_bad_rows: bool = False,
    max_samples: int | None = None,
    used: int | None = None,
    rules: Rules | None = None,
    doubts: Doubts | None = None,
) -> dict[str, PairSet]:
    """Every data set of `specs` by its short name, rows taken from them round-robin.

    Rows hold `chosen` and `rejected` and perhaps a prompt, as messages or as text. Without a prompt
    it is what both answers start with. Text becomes turns of a chat, and stays text without a chat
    template, without a prompt, and if `chat` is off. Of `rules`, `day` and `vocabulary` count. A
    set on the hub is read until it gave `POOL` times the rows that are `used`. Raises UsageError
    that names the rows that are bad, or longer than `max_length` tokens, unless `skip_bad_rows`,
    and where no pair is left.
    """
    if not specs:
        raise UsageError("no data given", f"pass --data FILE with {PAIRS} per row")
    names = set_names(specs)
    found = {name: PairSet() for name in names}
    rendered: dict[str, list[_Rendered]] = {name: [] for name in names}
    sources = [_rows(n, spec, used, found[n].bad) for n, spec in zip(names, specs, strict=True)]
    rules, doubts, unread = rules or Rules(), doubts or Doubts(), Unread()
    with ChatRenderer(tokenizer, rules.day) as renderer:
        for name, (where, row, file) in islice(round_robin(sources), max_samples):
            bad = found[name].bad
            try:
                reading = Reading.of(row)
                one = _render(where, preference_of(reading), renderer, chat)
            except BadRow as error:
                bad.add(error.kind, where, str(error), error.cure or "correct the data")
            except TemplateStopped as error:
                raise error.at(where) from None
            except UsageError as error:
                kind = LOST if isinstance(error, LostTurn) else REFUSED
                bad.add(kind, where, str(error), error.hint or "correct the data")
            else:
                rendered[name].append(one)
                unread.see(file, reading)
                for doubt in one.doubts:
                    doubts.add(doubt, where)
    for name, texts in rendered.items():
        _tokenise(texts, tokenizer, max_length, rules.vocabulary, found[name])
    bad = BadRows(skip_bad_rows)
    bad.found = [row for result in found.values() for row in result.bad.found]
    bad.settle()
    if not any(result.pairs for result in found.values()):
        cure = bad.found[0].cure if bad.found else "give other data"
        raise UsageError("no pair is usable" if bad.found else "the data is empty", cure)
    return found


def held_out(
    sets: Mapping[str, PairSet], share: float
) -> tuple[dict[str, PairSet], dict[str, PairSet]]:
    """Split every set by prompt into training and about `share` of its prompts held out.

    The side of a prompt depends on nothing but its text.
    """
    bound = int(share * 2**64)
    sides = []
    for is_held in (False, True):
        side = {}
        for name, found in sets.items():
            pairs = [pair for pair in found.pairs if (pair.key < bound) == is_held]
            side[name] = PairSet(pairs, found.bad)
        sides.append(side)
    return sides[0], sides[1]


def without_prompts(sets: Mapping[str, PairSet], keys: set[int]) -> tuple[dict[str, PairSet], int]:
    """The sets less the pairs whose prompt is among `keys`, and how many those are."""
    kept = {
        name: PairSet([p for p in found.pairs if p.key not in keys], found.bad)
        for name, found in sets.items()
    }
    return kept, sum(len(sets[name].pairs) - len(kept[name].pairs) for name in sets)


def marked(pair: Pair, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Both documents as the model reads them, the learned answer in [[ ]], and where they lie."""
    prompt = tokenizer.decode(pair.prompt.tolist())
    chosen, rejected = (
        f"{prompt}[[{tokenizer.decode(answer.tolist())}]]"
        for answer in (pair.chosen, pair.rejected)
    )
    return {"where": pair.where, "chosen": chosen, "rejected": rejected}


def _rows(name: str, spec: str, used: int | None, bad: BadRows) -> Iterator[tuple[str, Found]]:
    most = POOL * used if used is not None and is_on_hub(spec) else None
    empty = True
    for found in islice(read_rows(spec, bad), most):
        empty = False
        yield name, found
    if empty and not bad.found:
        raise UsageError(f"{spec} is empty", "give a data set with at least one row")


def _render(
    where: str, pair: Preference | TextPreference, renderer: ChatRenderer, chat: bool
) -> _Rendered:
    """Check a pair and put it into text; raises BadRow or UsageError without saying where."""
    tokenizer = renderer.tokenizer
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(pair, TextPreference):
        if pair.prompt is None or not chat or not template:
            return _render_text(where, pair, tokenizer)
        pair = pair.as_turns()
    _check_turns(pair)
    doubts: list[Doubt] = []
    (start, chosen), (other, rejected) = (_side(pair, side, renderer, doubts) for side in SIDES)
    if start is None or other is None or chosen[:start] != rejected[:other]:
        raise BadRow("the chat template rewrites the prompt, so the answer cannot be located")
    return _Rendered(where, start, chosen, rejected, True, doubts)


def _side(
    pair: Preference, side: str, renderer: ChatRenderer, doubts: list[Doubt]
) -> tuple[int | None, str]:
    """Start of one answer (None if it is not found), and the text of the prompt with it."""
    row: Row = {"messages": [*pair.prompt, *getattr(pair, side)], **pair.extras}
    text = renderer.render(row["messages"], row.get("tools"), **row.get(TEMPLATE, {}))
    # a model never has to write what the template adds behind the end token
    text = text.rstrip()
    start = start_of_answer(row, len(pair.prompt), renderer, text, doubts)
    if start is not None:
        row["learned"] = range(len(pair.prompt), len(row["messages"]))
        doubts += compared(row, text, [(start, len(text))])
    return start, text


def _render_text(
    where: str, pair: TextPreference, tokenizer: "PreTrainedTokenizerBase"
) -> _Rendered:
    """Text as it is, and an end token behind each answer."""
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if pair.extras:
        raise BadRow("has tools or options of a chat template, and is no chat")
    if prompt is None:
        prompt = _shared_start(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if not prompt:
            raise BadRow("`chosen` and `rejected` start differently, and there is no `prompt`")
    _check_answers(chosen, rejected)
    end = str(tokenizer.eos_token or "")
    chosen, rejected = (
        prompt + (answer if answer.endswith(end) else answer + end) for answer in (chosen, rejected)
    )
    return _Rendered(where, len(prompt), chosen, rejected, is_chat=False)


def _shared_start(chosen: str, rejected: str) -> str:
    """Common beginning of both texts, up to the end of a word."""
    length = min(len(chosen), len(rejected))
    shared = next((n for n in range(length) if chosen[n] != rejected[n]), length)
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    return chosen[:shared].rstrip()


def _check_turns(pair: Preference) -> None:
    if pair.prompt[-1]["role"] == ASSISTANT:
        raise BadRow("`prompt` ends with an assistant turn, so nobody asks for an answer")
    for side in SIDES:
        turns = getattr(pair, side)
        for turn in turns:
            if turn["role"] in ("user", "system"):
                raise BadRow(f"`{side}` holds a turn of the {turn['role']} behind the shared start")
        if not any(turn.get("tool_calls") for turn in turns):
            _require_words(" ".join(turn["content"] for turn in turns), side)
    if pair.chosen == pair.rejected:
        raise BadRow(EQUAL, SAME)


def _check_answers(chosen: str, rejected: str) -> None:
    _require_words(chosen, "chosen")
    _require_words(rejected, "rejected")
    if chosen.strip() == rejected.strip():
        raise BadRow(EQUAL, SAME)


def _require_words(answer: str, side: str) -> None:
    if not answer.strip():
        raise BadRow(f"the answer of `{side}` is empty", EMPTY)


def _tokenise(
    texts: Iterable[_Rendered],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    vocabulary: int | None,
    found: PairSet,
) -> None:
    """Sort texts into the lists of `found`, text rows behind chats."""
    for is_chat in (True, False):
        kind = [text for text in texts if text.is_chat == is_chat]
        for start in range(0, len(kind), TOGETHER):
            members = kind[start : start + TOGETHER]
            for pair in _encode(members, tokenizer, not is_chat, found.bad):
                beyond = vocabulary and beyond_embedding(pair.every_id, vocabulary, tokenizer)
                if beyond:
                    found.bad.add(BEYOND, pair.where, beyond, "take it out of the data")
                elif pair.longest > max_length:
                    problem = f"has {pair.longest} tokens, and --max-length {max_length} would "
                    found.bad.add(LONG, pair.where, problem + "cut an answer", "raise --max-length")
                else:
                    found.pairs.append(pair)


def _encode(
    texts: Sequence[_Rendered], tokenizer: "PreTrainedTokenizerBase", special: bool, bad: BadRows
) -> Iterator[Pair]:
    """Pairs of tokens; what is none goes to `bad`."""
    batch = tokenizer(
        [text for one in texts for text in (one.chosen, one.rejected)],
        add_special_tokens=special,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids = [np.asarray(row, np.int32) for row in batch["input_ids"]]
    offsets = batch["offset_mapping"]
    if special:
        typed = [begun_twice(texts[n // 2].chosen, row, tokenizer) for n, row in enumerate(ids)]
        ids = [row[twice:] for row, twice in zip(ids, typed, strict=True)]
        offsets = [row[twice:] for row, twice in zip(offsets, typed, strict=True)]
    for number, one in enumerate(texts):
        chosen, rejected = ids[2 * number : 2 * number + 2]
        # a token that reaches over the boundary belongs to both answers
        size = min(_size_of_prompt(offsets[2 * number + side], one.start) for side in (0, 1))
        pair = Pair(one.where, _key(one), chosen[:size], chosen[size:], rejected[size:])
        try:
            _check_pair(pair, rejected[:size], tokenizer)
        except BadRow as error:
            bad.add(error.kind, one.where, str(error))
        else:
            yield pair


def _size_of_prompt(offsets: Sequence[tuple[int, int]], start: int) -> int:
    return next((n for n, (_, end) in enumerate(offsets) if end > start), len(offsets))


def _check_pair(pair: Pair, other_prompt: np.ndarray, tokenizer: "PreTrainedTokenizerBase") -> None:
    if begins_twice(pair.prompt, tokenizer):
        raise BadRow(f"begins with {tokenizer.bos_token} twice", DOUBLED)
    if not np.array_equal(pair.prompt, other_prompt):
        raise BadRow("the prompt has other tokens before `chosen` than before `rejected`")
    if not len(pair.chosen) or not len(pair.rejected):
        raise BadRow("an answer has no token", EMPTY)
    if np.array_equal(pair.chosen, pair.rejected):
        raise BadRow(EQUAL, SAME)


def _key(text: _Rendered) -> int:
    """64 bits of the prompt."""
    digest = hashlib.sha256(text.chosen[: text.start].encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")
