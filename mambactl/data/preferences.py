"""Pairs of a better and a worse answer to one prompt: read by set, checked, and tokenised.

The answer starts where the rendering of the prompt with the generation prompt ends, and ends with
its end token. Nothing is cut: what is longer than a row is counted and left out.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from mambactl.data.format import TOGETHER, Example, render_chat
from mambactl.data.load import (
    EXPECTED,
    POOL,
    BadRow,
    in_turn,
    is_on_hub,
    preference_row,
    read_rows,
    set_names,
)
from mambactl.errors import UsageError

COLUMNS = ("prompt", "chosen", "rejected")
# bad rows that one message names
NAMED = 3


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

    def _example(self, answer: np.ndarray) -> Example:
        mask = np.zeros(len(self.prompt) + len(answer), bool)
        mask[len(self.prompt) :] = True
        return Example(np.concatenate([self.prompt, answer]), mask)


@dataclass
class PairSet:
    """What one data set gave: its pairs, and where those lie that are left out."""

    pairs: list[Pair] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Rows of the set by what became of them."""
        return {"pairs": len(self.pairs), "bad": len(self.bad), "too_long": len(self.too_long)}


class _Rendered(NamedTuple):
    """A pair as text; answers are characters from `start` of `chosen` and `rejected` on."""

    where: str
    start: int
    chosen: str
    rejected: str
    is_chat: bool


def load_pairs(
    specs: Sequence[str],
    tokenizer: Any,
    max_length: int,
    *,
    chat: bool = True,
    skip_bad_rows: bool = False,
    max_samples: int | None = None,
    used: int | None = None,
) -> dict[str, PairSet]:
    """Every data set of `specs` by its short name, rows taken from them in turn.

    Rows hold `chosen` and `rejected` and perhaps `prompt`, as messages or as text. Without a prompt
    it is what both answers start with. Text becomes turns of a chat, and stays text without a chat
    template, without a prompt, and if `chat` is off. A set on the hub is read until it gave `POOL`
    times the rows that are `used`. Raises UsageError that names the rows that are bad, unless
    `skip_bad_rows`, and where no pair is left.
    """
    if not specs:
        raise UsageError("no data given", f"pass --data FILE with {EXPECTED['preference']} per row")
    names = set_names(specs)
    found = {name: PairSet() for name in names}
    rendered: dict[str, list[_Rendered]] = {name: [] for name in names}
    sources = [_rows(name, spec, used) for name, spec in zip(names, specs, strict=True)]
    for name, where, row in islice(in_turn(sources), max_samples):
        try:
            rendered[name].append(_render(where, row, tokenizer, chat))
        except (BadRow, UsageError) as error:
            found[name].bad.append(f"{where}: {error}")
    for name, texts in rendered.items():
        _tokenise(texts, tokenizer, max_length, found[name])
    bad = [message for result in found.values() for message in result.bad]
    if bad and not skip_bad_rows:
        more = f" (and {len(bad) - NAMED} more)" if len(bad) > NAMED else ""
        hint = f"mend them, or leave them out with --skip-bad-rows; {_expected()}"
        raise UsageError("; ".join(bad[:NAMED]) + more, hint)
    if not any(result.pairs for result in found.values()):
        long = [where for result in found.values() for where in result.too_long]
        if long:
            message = f"every pair is longer than {max_length} tokens, {long[0]} for one"
            raise UsageError(message, "give a larger --max-length")
        raise UsageError(f"no pair is usable: {bad[0]}" if bad else "the data is empty")
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
            side[name] = PairSet(pairs, found.bad, found.too_long)
        sides.append(side)
    return sides[0], sides[1]


def without_prompts(sets: Mapping[str, PairSet], keys: set[int]) -> tuple[dict[str, PairSet], int]:
    """The sets less the pairs whose prompt is among `keys`, and how many those are."""
    kept = {
        name: PairSet([p for p in found.pairs if p.key not in keys], found.bad, found.too_long)
        for name, found in sets.items()
    }
    return kept, sum(len(sets[name].pairs) - len(kept[name].pairs) for name in sets)


def marked(pair: Pair, tokenizer: Any) -> dict[str, str]:
    """Both documents as the model reads them, the learned answer in [[ ]], and where they lie."""
    prompt = tokenizer.decode(pair.prompt.tolist())
    chosen, rejected = (
        f"{prompt}[[{tokenizer.decode(answer.tolist())}]]"
        for answer in (pair.chosen, pair.rejected)
    )
    return {"where": pair.where, "chosen": chosen, "rejected": rejected}


def _rows(name: str, spec: str, used: int | None) -> Iterator[tuple[str, str, Any]]:
    most = POOL * used if used is not None and is_on_hub(spec) else None
    empty = True
    for number, row in islice(read_rows(spec), most):
        empty = False
        yield name, f"{spec}, row {number}", row
    if empty:
        raise UsageError(f"{spec} is empty", "give a data set with at least one row")


def _render(where: str, row: Any, tokenizer: Any, chat: bool) -> _Rendered:
    """Check a row and put it into text; raises BadRow or UsageError without saying where."""
    if _is_text(row) and (
        not chat or row.get("prompt") is None or not getattr(tokenizer, "chat_template", None)
    ):
        return _render_text(where, row, tokenizer)
    pair = preference_row(row)
    _check_turns(pair)
    prompt = render_chat(tokenizer, pair["prompt"], prompt=True)
    # a model never has to write what the template adds behind the end token
    chosen, rejected = (
        render_chat(tokenizer, pair["prompt"] + pair[side]).rstrip() for side in COLUMNS[1:]
    )
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        raise BadRow("the chat template rewrites the prompt, so the answer cannot be located")
    return _Rendered(where, len(prompt), chosen, rejected, is_chat=True)


def _is_text(row: Any) -> bool:
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        return False
    return all(isinstance(row.get(name), str | None) for name in COLUMNS)


def _render_text(where: str, row: dict[str, Any], tokenizer: Any) -> _Rendered:
    """Text as it is, and an end token behind each answer."""
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen is None or rejected is None:
        raise BadRow("an answer is missing")
    prompt = row.get("prompt")
    if prompt is None:
        prompt = _shared_start(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if not prompt:
            raise BadRow("`chosen` and `rejected` start differently, and there is no `prompt`")
    _check_answers(chosen, rejected)
    end = tokenizer.eos_token or ""
    chosen, rejected = (
        prompt + (answer if answer.endswith(end) else answer + end) for answer in (chosen, rejected)
    )
    return _Rendered(where, len(prompt), chosen, rejected, is_chat=False)


def _shared_start(chosen: str, rejected: str) -> str:
    """What both texts start with, up to the end of a word."""
    length = min(len(chosen), len(rejected))
    shared = next((n for n in range(length) if chosen[n] != rejected[n]), length)
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    return chosen[:shared].rstrip()


def _check_turns(pair: dict[str, list[dict[str, Any]]]) -> None:
    if pair["prompt"][-1]["role"] == "assistant":
        raise BadRow("`prompt` ends with an assistant turn, so nobody asks for an answer")
    for side in COLUMNS[1:]:
        for turn in pair[side]:
            if turn["role"] not in ("assistant", "tool"):
                raise BadRow(f"`{side}` holds a turn of the {turn['role']} behind the shared start")
        if not any(turn.get("tool_calls") for turn in pair[side]):
            _require_words(" ".join(turn["content"] for turn in pair[side]), side)
    if pair["chosen"] == pair["rejected"]:
        raise BadRow("`chosen` equals `rejected`")


def _check_answers(chosen: str, rejected: str) -> None:
    _require_words(chosen, "chosen")
    _require_words(rejected, "rejected")
    if chosen.strip() == rejected.strip():
        raise BadRow("`chosen` equals `rejected`")


def _require_words(answer: str, side: str) -> None:
    if not answer.strip():
        raise BadRow(f"the answer of `{side}` is empty")


def _tokenise(texts: Iterable[_Rendered], tokenizer: Any, max_length: int, found: PairSet) -> None:
    """Sort texts into the lists of `found`, text rows behind chats."""
    for is_chat in (True, False):
        kind = [text for text in texts if text.is_chat == is_chat]
        for start in range(0, len(kind), TOGETHER):
            members = kind[start : start + TOGETHER]
            for pair in _encode(members, tokenizer, special=not is_chat):
                if isinstance(pair, str):
                    found.bad.append(pair)
                elif pair.longest > max_length:
                    found.too_long.append(f"{pair.where} ({pair.longest} tokens)")
                else:
                    found.pairs.append(pair)


def _encode(texts: Sequence[_Rendered], tokenizer: Any, special: bool) -> Iterator[Pair | str]:
    """Pairs of tokens, or what is wrong and where."""
    batch = tokenizer(
        [text for one in texts for text in (one.chosen, one.rejected)],
        add_special_tokens=special,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids = [np.asarray(row, np.int32) for row in batch["input_ids"]]
    offsets = batch["offset_mapping"]
    for number, one in enumerate(texts):
        chosen, rejected = ids[2 * number : 2 * number + 2]
        # a token that reaches over the boundary belongs to both answers
        size = min(_size_of_prompt(offsets[2 * number + side], one.start) for side in (0, 1))
        pair = Pair(one.where, _key(one), chosen[:size], chosen[size:], rejected[size:])
        problem = _problem(pair, rejected[:size], tokenizer)
        yield pair if problem is None else f"{one.where}: {problem}"


def _size_of_prompt(offsets: Sequence[tuple[int, int]], start: int) -> int:
    return next((n for n, (_, end) in enumerate(offsets) if end > start), len(offsets))


def _problem(pair: Pair, other_prompt: np.ndarray, tokenizer: Any) -> str | None:
    begin = tokenizer.bos_token_id
    if begin is not None and (pair.prompt[:2] == begin).sum() == 2:
        return f"the text begins with two begin tokens ({tokenizer.bos_token})"
    if not np.array_equal(pair.prompt, other_prompt):
        return "the prompt has other tokens before `chosen` than before `rejected`"
    if not len(pair.chosen) or not len(pair.rejected):
        return "an answer has no token"
    if np.array_equal(pair.chosen, pair.rejected):
        return "`chosen` equals `rejected`"
    return None


def _key(text: _Rendered) -> int:
    """64 bits of the prompt."""
    digest = hashlib.sha256(text.chosen[: text.start].encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def _expected() -> str:
    return f"expected {EXPECTED['preference']}"
