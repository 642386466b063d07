"""Pairs of a better and a worse answer to one prompt: read by set, checked, and tokenised.

The answer starts where the rendering of the prompt with the generation prompt ends, and ends with
its end token. Nothing is cut: a pair that is longer than a row is a bad one.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mambactl.data.bad_rows import DOUBLED, EMPTY, LONG, MALFORMED, REFUSED, SAME, BadRows
from mambactl.data.chat_template import ChatRenderer, TemplateStopped
from mambactl.data.checks import begins_twice
from mambactl.data.encoding import Example
from mambactl.data.format import TOGETHER
from mambactl.data.row_files import is_on_hub, read_rows
from mambactl.data.sources import POOL, BadRow, preference_row, round_robin, set_names
from mambactl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt", "chosen", "rejected")
EXPECTED = "`prompt`, `chosen` and `rejected` (text, or lists of role and content)"
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

    def _example(self, answer: np.ndarray) -> Example:
        mask = np.zeros(len(self.prompt) + len(answer), bool)
        mask[len(self.prompt) :] = True
        return Example(np.concatenate([self.prompt, answer]), mask)


@dataclass
class PairSet:
    """What one data set gave: its pairs, and the rows that are none."""

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


def load_pairs(
    specs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    chat: bool = True,
    skip_bad_rows: bool = False,
    max_samples: int | None = None,
    used: int | None = None,
) -> dict[str, PairSet]:
    """Every data set of `specs` by its short name, rows taken from them round-robin.

    Rows hold `chosen` and `rejected` and perhaps `prompt`, as messages or as text. Without a prompt
    it is what both answers start with. Text becomes turns of a chat, and stays text without a chat
    template, without a prompt, and if `chat` is off. A set on the hub is read until it gave `POOL`
    times the rows that are `used`. Raises UsageError that names the rows that are bad, or longer
    than `max_length` tokens, unless `skip_bad_rows`, and where no pair is left.
    """
    if not specs:
        raise UsageError("no data given", f"pass --data FILE with {EXPECTED} per row")
    names = set_names(specs)
    found = {name: PairSet() for name in names}
    rendered: dict[str, list[_Rendered]] = {name: [] for name in names}
    sources = [_rows(n, spec, used, found[n].bad) for n, spec in zip(names, specs, strict=True)]
    with ChatRenderer(tokenizer) as renderer:
        for name, where, row in islice(round_robin(sources), max_samples):
            bad = found[name].bad
            try:
                rendered[name].append(_render(where, row, renderer, chat))
            except BadRow as error:
                cure = _expected() if error.kind == MALFORMED else "correct the data"
                bad.add(error.kind, where, str(error), cure)
            except TemplateStopped as error:
                raise error.at(where) from None
            except UsageError as error:
                bad.add(REFUSED, where, str(error), error.hint or "correct the data")
    for name, texts in rendered.items():
        _tokenise(texts, tokenizer, max_length, found[name])
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


def _rows(name: str, spec: str, used: int | None, bad: BadRows) -> Iterator[tuple[str, str, Any]]:
    most = POOL * used if used is not None and is_on_hub(spec) else None
    empty = True
    for number, row in islice(read_rows(spec, bad), most):
        empty = False
        yield name, f"{spec}, row {number}", row
    if empty and not bad.found:
        raise UsageError(f"{spec} is empty", "give a data set with at least one row")


def _render(where: str, row: Any, renderer: ChatRenderer, chat: bool) -> _Rendered:
    """Check a row and put it into text; raises BadRow or UsageError without saying where."""
    tokenizer = renderer.tokenizer
    if _is_text(row) and (
        not chat or row.get("prompt") is None or not getattr(tokenizer, "chat_template", None)
    ):
        return _render_text(where, row, tokenizer)
    pair = preference_row(row)
    _check_turns(pair)
    prompt = renderer.render(pair["prompt"], prompt=True)
    # a model never has to write what the template adds behind the end token
    chosen, rejected = (
        renderer.render(pair["prompt"] + pair[side]).rstrip() for side in COLUMNS[1:]
    )
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        raise BadRow("the chat template rewrites the prompt, so the answer cannot be located")
    return _Rendered(where, len(prompt), chosen, rejected, is_chat=True)


def _is_text(row: Any) -> bool:
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        return False
    return all(isinstance(row.get(name), str | None) for name in COLUMNS)


def _render_text(
    where: str, row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> _Rendered:
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
    found: PairSet,
) -> None:
    """Sort texts into the lists of `found`, text rows behind chats."""
    for is_chat in (True, False):
        kind = [text for text in texts if text.is_chat == is_chat]
        for start in range(0, len(kind), TOGETHER):
            members = kind[start : start + TOGETHER]
            for pair in _encode(members, tokenizer, not is_chat, found.bad):
                if pair.longest > max_length:
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


def _expected() -> str:
    return f"expected {EXPECTED}"
