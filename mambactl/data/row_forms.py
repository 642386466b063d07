"""The forms of a row: which columns hold the text, the turns, the prompt and the answers.

Every command reads the same names. A column that none of them is stays unread: it is named once
(`Unread`), and a row is refused where such a column would change what is learned.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mambactl import console
from mambactl.data.bad_rows import OTHER
from mambactl.data.turns import (
    ASSISTANT,
    SYSTEM,
    USER,
    BadRow,
    Record,
    Row,
    are_objects,
    is_turns,
    json_name,
    learned_turns,
    require,
    turns_of,
)
from mambactl.foreign import excerpt, json_value, reason
from mambactl.present import present

TEXT, PROMPT, COMPLETION, CHOSEN, REJECTED = "text", "prompt", "completion", "chosen", "rejected"
# of whole chats, of a prompt, of what is added to it, of its answer; the first that is there counts
CHATS = ("messages", "conversations", "conversation")
PROMPTS = (PROMPT, "instruction", "question", "query", "problem", "input")
ADDED_TO, ADDITIONS = ("instruction", "question", "query"), ("input", "context")
ANSWERS = (COMPLETION, "response", "output", "answer", "solution")
SYSTEMS = (SYSTEM, "system_prompt")
TOOLS, FUNCTIONS, HISTORY, TEMPLATE = "tools", "functions", "history", "chat_template_kwargs"
# what rendering is told by the program, and no row may change
RESERVED = frozenset(
    {"messages", "conversation", TOOLS, "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "tokenize", "padding", "truncation", "max_length"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
    | {"sanitize_control_tokens", "strftime_now", "raise_exception"}
)
# of turns that a model answers one by one
TURNS = "turns"
# what would be lost: only text is read
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
LABEL = "label"
# columns that say something about a row and nothing that is in it
REMARKS = (
    *("id", "idx", "index", "uid", "uuid", "prompt_id", "question_id", "source", "dataset"),
    *("category", "type", "task", "subset", "split", "language", "lang", "model", "generator"),
    *("chosen_model", "rejected_model", "license", "url", "metadata", "tags", "hash", "timestamp"),
)

EXPECTED = "`text` (a string) or `messages` (a list of role and content)"
PAIRS = "`prompt`, `chosen` and `rejected` (text, or lists of role and content)"
QUESTIONS = "`prompt`, `messages`, `turns` (strings), `instruction` or `text` per row"
# how rows are read that another command takes: columns, what they are, and the command
OTHERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((CHOSEN, REJECTED), "preference pairs", "mambactl dpo MODEL --data FILE"),
    ((TURNS,), "questions without answers", "mambactl generate MODEL --dataset FILE"),
    ((PROMPT,), "prompts without answers", "mambactl generate MODEL --dataset FILE"),
)


@dataclass
class Reading:
    """A row whose columns are taken one by one; `used` are those that were."""

    row: Row
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, row: object) -> "Reading":
        """Open a row; raises BadRow if it is no object or has media, which no text model sees."""
        if not isinstance(row, dict):
            raise BadRow(f"holds a {json_name(row)}, not an object")
        reading = cls(row)
        for name in MEDIA:
            require(not row.get(name), f"has `{name}`, and only text is read")
        return reading

    def has(self, name: str) -> bool:
        """True if a column is there and not null."""
        return self.row.get(name) is not None

    def first(self, names: Iterable[str]) -> str | None:
        """The first of several columns that is there."""
        return next((name for name in names if self.has(name)), None)

    def take(self, name: str) -> Any:
        """The value of a column, which counts as read."""
        self.used.add(name)
        return self.row.get(name)

    def text(self, name: str) -> str:
        """A column of text; raises BadRow for another type."""
        value = self.take(name)
        require(isinstance(value, str), f"`{name}` is a {json_name(value)}")
        return value

    def said(self, name: str) -> list[Row] | str:
        """The turns in a column, also a single one, or its text."""
        value = self.take(name)
        plain = isinstance(value, str) and not is_turns(value)
        return value if plain else turns_of(value, name, single=True)

    @property
    def columns(self) -> str:
        """The names of all columns, for a message."""
        return excerpt(", ".join(f"`{name}`" for name in self.row)) or "none"

    @property
    def unread(self) -> list[str]:
        """Columns that hold something and were not read."""
        return [name for name, value in self.row.items() if value and name not in self.used]

    def system(self, turns: Sequence[Row]) -> list[Row]:
        """The turns behind the system message that stands in a column of its own."""
        name = self.first(SYSTEMS)
        if name is None:
            return list(turns)
        text = self.text(name)
        if not text.strip() or (turns and turns[0] == {"role": SYSTEM, "content": text}):
            return list(turns)
        require(
            not turns or turns[0].get("role") != SYSTEM,
            f"has `{name}`, and another system message among its turns",
        )
        return [{"role": SYSTEM, "content": text}, *turns]

    def history(self) -> list[Row]:
        """Earlier questions and answers, pairs of text, as turns."""
        if not self.row.get(HISTORY):
            return []
        value = self.take(HISTORY)
        if is_turns(value) and not all(isinstance(pair, list) for pair in value):
            return turns_of(value, HISTORY)
        pairs = isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
            for pair in value
        )
        require(pairs, f"`{HISTORY}` is no list of question and answer")
        return [
            _said(role, text)
            for pair in value
            for role, text in zip((USER, ASSISTANT), pair, strict=True)
        ]

    def question(self) -> list[Row] | None:
        """The prompt in whichever column it stands, as turns; None where there is none."""
        name = self.first(PROMPTS)
        if name is None:
            return None
        if is_turns(self.row[name]):
            return turns_of(self.take(name), name)
        return [*self.history(), _said(USER, self.asked(name))]

    def asked(self, name: str) -> str:
        """The text of a prompt, and of what other columns add to it."""
        texts = [self.text(name)]
        if name in ADDED_TO:
            for other in ADDITIONS:
                if other != name and isinstance(self.row.get(other), str):
                    texts.append(self.take(other))
        return "\n\n".join(text for text in texts if text)

    def extras(self) -> Row:
        """Keywords for the chat template beside the turns: tools, and options of its own."""
        found: Row = {}
        if self.row.get(TOOLS):
            found[TOOLS] = tool_list(self.take(TOOLS))
        elif self.row.get(FUNCTIONS):
            functions = tool_list(self.take(FUNCTIONS), FUNCTIONS)
            found[TOOLS] = [{"type": "function", "function": each} for each in functions]
        if self.row.get(TEMPLATE):
            options = self.take(TEMPLATE)
            require(isinstance(options, dict), f"`{TEMPLATE}` is no object")
            for name in RESERVED & options.keys():
                raise BadRow(f"`{TEMPLATE}` has `{name}`, which is no option of a template")
            found[TEMPLATE] = options
        return found


def _said(role: str, text: str) -> Row:
    return {"role": role, "content": text}


def _turns(said: list[Row] | str, role: str) -> list[Row]:
    return [_said(role, said)] if isinstance(said, str) else said


def tool_list(value: object, column: str = TOOLS) -> list[Row]:
    """The tools of a row, a list or JSON; raises BadRow that says what is wrong with them."""
    try:
        tools = json_value(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRow(f"`{column}` is not JSON ({reason(error)})") from None
    if not are_objects(tools):
        raise BadRow(f"`{column}` is not a list of objects")
    return tools


def document_of(reading: Reading) -> Row:
    """Columns to learn from in a row: `text`; `prompt` and `completion`; or `messages` and more.

    `learned` are the positions of the turns that are, where not all of the assistant's are. Raises
    BadRow.
    """
    chat = reading.first(CHATS)
    if chat is not None and (chat == CHATS[0] or not reading.has(CHOSEN)):
        return _chat(reading, turns_of(reading.take(chat), chat))
    if reading.has(PROMPT) and reading.has(COMPLETION):
        return _completed(reading)
    if reading.has(TEXT):
        return {TEXT: reading.text(TEXT)}
    answer = reading.first(ANSWERS)
    question = None if answer is None else reading.question()
    if answer is None or not question:
        raise _other(reading, EXPECTED)
    _refuse_label(reading)
    return _chat(reading, [*question, *_turns(reading.said(answer), ASSISTANT)])


def asked_of(reading: Reading) -> Row:
    """Columns of a row whose answer is not needed: as `document_of`, or the turns of its question.

    Raises BadRow.
    """
    whole = reading.first((*CHATS, TEXT, *ANSWERS))
    if whole is not None or reading.first((TURNS, *PROMPTS)) is None:
        return document_of(reading)
    turns, _, extras = question_of(reading)
    return {"messages": turns} | extras


def _chat(reading: Reading, turns: Sequence[Row], first: int = 0) -> Row:
    before = len(turns)
    turns = reading.system(turns)
    # all answers of an ordinary chat are learned
    first = 0 if first == 0 else first + len(turns) - before
    learned = learned_turns(turns, first)
    if learned is not None and learned == [
        n for n, t in enumerate(turns) if t["role"] == ASSISTANT
    ]:
        learned = None
    found: Row = {"messages": turns} | reading.extras()
    return found if learned is None else found | {"learned": learned}


def _completed(reading: Reading) -> Row:
    """A prompt with its completion: text as it is, or turns of which the completion is learned."""
    _refuse_label(reading)
    prompt, completion = reading.said(PROMPT), reading.said(COMPLETION)
    if isinstance(prompt, str) and isinstance(completion, str):
        return {PROMPT: prompt, COMPLETION: completion}
    asked = _turns(prompt, USER)
    return _chat(reading, [*asked, *_turns(completion, ASSISTANT)], len(asked))


def _refuse_label(reading: Reading) -> None:
    """Raise BadRow for a labelled answer, which may be one to avoid."""
    # tables hold it as text
    if str(reading.row.get(LABEL)).lower() in ("true", "false"):
        cure = f"keep the rows whose `{LABEL}` is true, without the column"
        raise BadRow(f"has a `{LABEL}`, and its answer may be one to be avoided", OTHER, cure)


def _other(reading: Reading, expected: str) -> BadRow:
    """Error for a row without the columns; the hint names the command for rows of its form."""
    for columns, what, command in OTHERS:
        if all(reading.has(name) for name in columns):
            problem = f"has the columns {reading.columns}"
            return BadRow(problem, OTHER, f"these are {what}: {command}")
    return BadRow(f"has the columns {reading.columns}", cure=f"expected {expected}")


@dataclass(frozen=True)
class Preference:
    """Two answers to a prompt, as turns."""

    prompt: list[Row]
    chosen: list[Row]
    rejected: list[Row]
    extras: Row


@dataclass(frozen=True)
class TextPreference:
    """Two answers to a prompt as text, which may have no prompt."""

    prompt: str | None
    chosen: str
    rejected: str
    extras: Row

    def as_turns(self) -> Preference:
        """A question and its answers."""
        return Preference(
            [_said(USER, self.prompt or "")],
            [_said(ASSISTANT, self.chosen)],
            [_said(ASSISTANT, self.rejected)],
            self.extras,
        )


def preference_of(reading: Reading) -> Preference | TextPreference:
    """The pair of a row; raises BadRow.

    Where the answers are whole conversations (as in ultrafeedback_binarized), or turns without a
    prompt, the turns that both share are the prompt. Text without a prompt stays whole.
    """
    if not (reading.has(CHOSEN) and reading.has(REJECTED)):
        if reading.first(CHATS) or reading.has(TEXT) or reading.first(ANSWERS):
            cure = "these are rows to be learned as they are: mambactl sft MODEL --data FILE"
            raise BadRow(f"has the columns {reading.columns}", OTHER, cure)
        raise BadRow(f"has the columns {reading.columns}", cure=f"expected {PAIRS}")
    chosen, rejected = (reading.said(name) for name in (CHOSEN, REJECTED))
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _texts(reading, chosen, rejected)
    answers = _turns(chosen, ASSISTANT), _turns(rejected, ASSISTANT)
    if _are_whole(answers):
        return _shared(reading, *answers)
    prompt = _prompt(reading)
    if prompt is None:
        raise BadRow(f"has the columns {reading.columns}", cure=f"expected {PAIRS}")
    extras = reading.extras()
    return _unmarked(Preference(reading.system(_turns(prompt, USER)), *answers, extras))


def _texts(reading: Reading, chosen: str, rejected: str) -> Preference | TextPreference:
    """The pair of a row whose answers are text."""
    prompt = _prompt(reading)
    extras = reading.extras()
    if prompt is None:
        _refuse_lost_prompt(reading)
        return TextPreference(None, chosen, rejected, extras)
    if isinstance(prompt, str) and not reading.first(SYSTEMS) and not extras:
        return TextPreference(prompt, chosen, rejected, extras)
    answers = _turns(chosen, ASSISTANT), _turns(rejected, ASSISTANT)
    return _unmarked(Preference(reading.system(_turns(prompt, USER)), *answers, extras))


def _are_whole(sides: Sequence[list[Row]]) -> bool:
    """True if the sides are whole conversations: not all of them begin with an answer."""
    return not all(side[0]["role"] == ASSISTANT for side in sides)


def _prompt(reading: Reading) -> list[Row] | str | None:
    """The prompt in its column, text where it is nothing but that."""
    chat = reading.first(CHATS)
    if reading.first(PROMPTS) is None and chat is not None:
        return turns_of(reading.take(chat), chat)
    history = reading.history()
    question = reading.question()
    name = reading.first(PROMPTS)
    if name is None or history or not isinstance(reading.said(name), str):
        return question
    return present(question)[0]["content"]


def _shared(reading: Reading, chosen: list[Row], rejected: list[Row]) -> Preference:
    require(len(chosen) > 1 and len(rejected) > 1, f"has the columns {reading.columns}")
    pairs = enumerate(zip(chosen[:-1], rejected[:-1], strict=False))
    shared = next((n for n, (a, b) in pairs if a != b), min(len(chosen), len(rejected)) - 1)
    require(shared > 0, "`chosen` and `rejected` start differently")
    # the prompt stands in both answers already
    if (name := reading.first(PROMPTS)) is not None:
        reading.take(name)
    prompt = reading.system(chosen[:shared])
    return _unmarked(Preference(prompt, chosen[shared:], rejected[shared:], reading.extras()))


def _unmarked(pair: Preference) -> Preference:
    """The pair without marks of what is learned; raises BadRow where an answer is not to be."""
    learned_turns(pair.prompt)
    for turns in (pair.chosen, pair.rejected):
        require(learned_turns(turns) is None, "has an answer that is marked not to be learned")
    return pair


def _refuse_lost_prompt(reading: Reading) -> None:
    """Raise BadRow if an unread column may hold a better prompt than the answers' shared words."""
    lost = [
        name
        for name in reading.unread
        if name not in REMARKS and isinstance(reading.row[name], str | list | dict)
    ]
    if lost:
        raise BadRow(
            f"has no `prompt`, and `{lost[0]}` is not read",
            cure=f"call it `prompt`, or leave out `{lost[0]}`",
        )


def question_of(reading: Reading) -> tuple[list[Row], list[str], Row]:
    """Turns up to the first answer, later questions, and what the template is told; or BadRow."""
    if reading.has(TURNS):
        turns = reading.take(TURNS)
        texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
        require(texts, "`turns` is not a list of strings")
        require(bool(turns), "has an empty prompt")
        return reading.system([_said(USER, turns[0])]), turns[1:], reading.extras()
    turns = reading.system(_question(reading))
    # what is learned elsewhere means nothing here
    learned_turns(turns)
    return turns, [], reading.extras()


def _question(reading: Reading) -> list[Row]:
    chat = reading.first(CHATS)
    if chat is not None:
        return _turns(reading.said(chat), USER)
    question = reading.question()
    if question is not None:
        return question
    if reading.has(TEXT):
        return [_said(USER, reading.text(TEXT))]
    raise BadRow(f"has no prompt in its columns {reading.columns}", cure=f"expected {QUESTIONS}")


class Unread:
    """Columns that no row of a file was read from, each named once."""

    def __init__(self, say: Callable[[str], None] = console.log, known: Iterable[str] = ()):
        self.say, self.known = say, frozenset(known)
        self.named: dict[str, set[str]] = {}

    def see(self, file: str, reading: Reading) -> None:
        """Name what is new among the unread columns of one row."""
        named = self.named.setdefault(file, set(self.known))
        new = [name for name in reading.unread if name not in named]
        if new:
            named.update(new)
            columns = ", ".join(f"`{name}`" for name in new)
            self.say(f"{file}: not read: {excerpt(columns)}")


def characters_of(row: Record) -> int:
    """Approximate length of a row in characters."""
    if "messages" in row:
        return sum(len(str(turn.get("content") or "")) for turn in row["messages"])
    return sum(len(row[name]) for name in (TEXT, PROMPT, COMPLETION) if name in row)
