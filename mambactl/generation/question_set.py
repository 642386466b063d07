"""The prompts that `generate --dataset` answers: read, checked, each once, dealt and batched."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import adapt, load_tokenizer, open_checkpoint
from mambactl.checkpoint.provenance import header_digest
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.run_folder import DAY
from mambactl.data.answers import CATEGORY_TEMPERATURES, OTHER_TEMPERATURE, require_fit
from mambactl.data.bad_rows import LONG, UNFIT, BadRows
from mambactl.data.chat_template import ChatRenderer, TemplateStopped
from mambactl.data.conversations import Conversation, distinct, read_conversations, shard_of
from mambactl.decode.backend import NGRAM, REFERENCE_K
from mambactl.decode.prompts import Prompt, encode_with, render
from mambactl.errors import UsageError
from mambactl.files import SINGLE_FILE_SUFFIXES
from mambactl.generation import decoding
from mambactl.options import GenerateConfig
from mambactl.ranks import placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what only says what is made of finished answers may change until they are written
AFTERWARDS = {"keep_unfinished", "generator"}


# of the identity, what is known once the rows are read
PROMPTS = "prompts_sha256"


class Task(NamedTuple):
    """One sample of one prompt, both by number."""

    prompt: int
    sample: int


@dataclass(frozen=True)
class QuestionSet:
    """Conversations that one process answers; `lengths` are their tokens without the answers."""

    config: GenerateConfig
    source: str
    tokenizer: "PreTrainedTokenizerBase"
    conversations: list[Conversation]
    lengths: list[int]
    counts: dict[str, int]
    # what chat templates take for today
    day: date | None = None

    @classmethod
    def of(cls, config: GenerateConfig, source: str, day: date | None = None) -> "QuestionSet":
        """Read and check everything; raises UsageError that names the rows which are no prompts."""
        config.require_coherent()
        decoding.require_draft(config, source)
        tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        bad = BadRows(config.skip_bad_rows)
        found = read_conversations(config.dataset, config.max_samples, bad)
        rows = len(found) + len(bad.found)
        chosen = distinct(found) if config.format == "jsonl" else found
        index, count = config.part
        mine = [each for each in chosen if shard_of(each, count) == index]
        fitting, lengths = _measure(config, source, tokenizer, mine, bad, day)
        bad.settle()
        counts = {
            "rows": rows,
            "bad_rows": len(bad.found),
            "repeated_prompts": len(found) - len(chosen),
            "other_shards": len(chosen) - len(mine),
            "prompts": len(fitting),
        }
        return cls(config, source, tokenizer, fitting, lengths, counts, day)

    @cached_property
    def identity(self) -> dict[str, object]:
        """Values that must be equal for a run to be resumed."""
        digest = hashlib.sha256(b"".join(each.digest for each in self.conversations))
        asked = asked_identity(self.config, self.source, self.day)
        return {**asked, PROMPTS: digest.hexdigest()}

    @cached_property
    def digest(self) -> str:
        """sha256 of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def k(self) -> int:
        """Draft tokens per step; "auto" follows the clock, and sampled text would follow it."""
        return _k(self.config)

    @property
    def unique(self) -> bool:
        """True if prompts and answers are written once; a judge gets what it asks for."""
        return self.config.format == "jsonl"

    @property
    def keep_unfinished(self) -> bool:
        """True if answers that were cut, or are empty, are written."""
        kept = self.config.keep_unfinished
        return not self.unique if kept is None else kept

    @property
    def generator(self) -> str:
        """The name of the model for judges."""
        if self.config.generator is not None:
            return self.config.generator
        path = Path(self.source)
        return path.stem if path.suffix in (*SINGLE_FILE_SUFFIXES, ".gguf") else path.name

    def temperature(self, prompt: int) -> float:
        """Sampling temperature for the answers to a prompt."""
        if not self.config.category_temperature:
            return self.config.temperature
        category = str(self.conversations[prompt].about.get("category"))
        return CATEGORY_TEMPERATURES.get(category, OTHER_TEMPERATURE)

    def batches(self) -> list[list[Task]]:
        """Tasks batched by temperature and like lengths, the samples of a prompt in turn.

        The longest come first, so that what does not fit in memory fails at the start.
        """
        size, samples = self.config.batch_size, range(self.config.samples_per_prompt)
        order = sorted(
            range(len(self.lengths)),
            key=lambda prompt: (self.temperature(prompt), -self.lengths[prompt]),
        )
        found = []
        for _, alike in groupby(order, self.temperature):
            tasks = [Task(prompt, sample) for prompt in alike for sample in samples]
            found += [tasks[start : start + size] for start in range(0, len(tasks), size)]
        return found

    def plan(self) -> dict[str, object]:
        """Dry run: the model and the work in numbers, with one prompt as the model reads it."""
        device, dtype = placement(self.config)
        target = describe(self.source)
        turns = sum(each.n_answers for each in self.conversations)
        samples, new = self.config.samples_per_prompt, self.config.max_new_tokens
        first = next(iter(self.conversations), None)
        rendered = first and render(as_prompt(first), self.tokenizer, self.config.chat)
        return {
            "source": target["checkpoint"],
            "parameters": target["parameters"],
            "mixers": target["mixers"],
            "draft": self.config.draft,
            "k": self.k,
            **self.counts,
            "answers": len(self.conversations) * samples,
            "turns": turns * samples,
            "batches": len(self.batches()),
            "prompt_tokens": sum(self.lengths),
            "longest_prompt": max(self.lengths, default=0),
            "new_tokens_at_most": turns * samples * new,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "first_row": first and first.where,
            "first_prompt": rendered,
        }


def asked_identity(config: GenerateConfig, source: str, day: date | None) -> dict[str, object]:
    """The identity of a QuestionSet but for its prompts; reads headers of weights alone."""
    draft = None if config.draft == NGRAM else config.draft
    unlike = {*config.placement_options, *AFTERWARDS, *config.since_later}
    return {
        "stage": "generate",
        **config.model_dump(mode="json", exclude=unlike),
        "k": _k(config),
        "source_sha256": header_digest(resolve(source).path),
        "draft_sha256": draft and header_digest(resolve(draft).path),
        **({DAY: day.isoformat()} if day else {}),
    }


def _k(config: GenerateConfig) -> int:
    if config.draft is None:
        return 0
    return REFERENCE_K if config.k == "auto" else config.k


def as_prompt(conversation: Conversation, answers: Sequence[str] = ()) -> Prompt:
    """Prompt that the model reads before its next answer."""
    turns = tuple(conversation.messages(answers))
    return Prompt(turns, tools=conversation.tools, template=conversation.template)


def _measure(
    config: GenerateConfig,
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Conversation],
    bad: BadRows,
    day: date | None,
) -> tuple[list[Conversation], list[int]]:
    """Conversations that fit into the model and the format, and their lengths; others are noted."""
    with open_checkpoint(source) as reader:
        model = adapt(reader).config
    limit = model.max_position_embeddings if model.attends else None
    measured = []
    with ChatRenderer(tokenizer, day) as renderer:
        for each in conversations:
            try:
                require_fit(each, config.format)
                # answers that are not there yet count as empty here, and in full below
                whole = as_prompt(each, [""] * len(each.later))
                measured.append((each, len(encode_with(renderer, whole, config.chat))))
            except TemplateStopped as error:
                raise error.at(each.where) from None
            except UsageError as error:
                bad.add(UNFIT, each.where, str(error), error.hint or "correct the data")
    fitting, lengths = [], []
    for each, length in measured:
        new = each.n_answers * config.max_new_tokens
        if limit is not None and length + new > limit:
            problem = (
                f"needs {length} tokens and up to {new} new ones, more than the {limit} this model "
                "was made for"
            )
            bad.add(LONG, each.where, problem, "lower --max-new-tokens")
            continue
        fitting.append(each)
        lengths.append(length)
    return fitting, lengths
