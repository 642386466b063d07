"""The rows that a run trains on and those it is measured on: reading, mixing, packing."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

import numpy as np

from mambactl import console
from mambactl.checkpoint.vocabulary import model_config, stored_end_tokens
from mambactl.data.bad_rows import BadRows
from mambactl.data.chat_template import prints_date, unused_templates
from mambactl.data.checks import Endings, screened
from mambactl.data.doubts import Doubts
from mambactl.data.encoding import Example
from mambactl.data.format import Rules, encode_rows
from mambactl.data.mixture import mixed, names, shares
from mambactl.data.pack import Row, pack
from mambactl.data.recall_documents import recall_documents, recall_tokens
from mambactl.data.row_forms import asked_of, document_of
from mambactl.data.sources import Document, Form, count_rows, load_rows
from mambactl.errors import UsageError
from mambactl.files import canonical
from mambactl.generation.decoding import warn_beyond_positions
from mambactl.options.row_options import RowsConfig, TextRowsConfig
from mambactl.options.training import HeldOutConfig
from mambactl.present import of_kind
from mambactl.train.job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def training_rows(
    job: Job, tokenizer: "PreTrainedTokenizerBase", assistant_only: bool = False
) -> list[Row]:
    """Packed rows, as many as the run can see: text, and recall documents among it.

    Raises UsageError for rows that nothing can be learned from, unless they are to be skipped.
    """
    config, bad = job.config, BadRows(job.config.skip_bad_rows)
    shares(config.data)
    documents = read_documents(job, bad)
    checks = Checks.of(job, tokenizer, bad)
    examples = encode_documents(job, documents, tokenizer, assistant_only, checks)
    bad.settle()
    checks.tell(job, tokenizer)
    recalled = _recall_examples(job, tokenizer, examples)
    rows = pack([*examples, *recalled], config.max_length, config.packing)
    _warn_beyond_positions(job, [*examples, *recalled])
    real = sum(int(row.valid.sum()) for row in rows)
    share = sum(len(example.input_ids) for example in recalled) / real
    generated = f" and {len(recalled)} for recall ({share:.2%} of the tokens)"
    console.log(
        f"data: {len(examples)} of {len(documents)} documents"
        f"{generated if job.recall_share else ''} in {len(rows)} rows, {real:,} tokens"
    )
    if cut := sum(len(example.input_ids) > config.max_length for example in examples):
        console.log(
            f"longer than --max-length {config.max_length}: {cut} of them, "
            + ("continued in other rows" if config.packing else "cut there")
        )
    return rows


def held_out_rows(
    job: Job, tokenizer: "PreTrainedTokenizerBase", assistant_only: bool = False
) -> list[Row]:
    """Packed rows of `eval_data`, about `eval_tokens` of them and the same every time.

    Bad rows are left out and reported; with `assistant_only` also chats without a whole answer.
    Raises UsageError where no other row is there.
    """
    config = of_kind(HeldOutConfig, job.config)
    if not config.eval_data:
        return []
    require_held_out(config)
    bad, budget = BadRows(skip=True), 2 * config.eval_tokens
    documents = load_rows(config.eval_data, used_tokens=budget, bad=bad)
    checks = Checks.of(job, tokenizer, bad)
    examples = _encode(job, documents, tokenizer, assistant_only, budget, checks)
    bad.require_others("--eval-data", len(examples))
    bad.settle()
    rows = pack(examples, config.max_length)
    chosen, tokens = [], 0
    for index in np.random.default_rng(config.seed).permutation(len(rows)):
        if tokens >= config.eval_tokens:
            break
        chosen.append(rows[index])
        tokens += int(rows[index].valid.sum())
    console.log(f"held out: {tokens:,} tokens in {len(chosen)} rows")
    return chosen


def require_held_out(config: HeldOutConfig) -> None:
    """Raise UsageError for `eval_data` that the run trains on."""
    if shared := sorted(
        {canonical(s) for s in names(config.data)} & {canonical(s) for s in config.eval_data}
    ):
        raise UsageError(
            f"{', '.join(shared)} is training data and held out", "give other --eval-data"
        )


def read_documents(job: Job, bad: BadRows) -> list[Document]:
    """The documents of `data` that the run can see, checked; malformed rows are noted in `bad`."""
    config = job.config
    limit = {"used_tokens": job.budget} if config.packing else {"used_rows": job.examples}
    return load_rows(names(config.data), config.max_samples, bad=bad, form=_form(config), **limit)


def count_documents(job: Job) -> int | None:
    """Check the data's files and count rows; None where a set lies on the hub."""
    shares(job.config.data)
    return count_rows(names(job.config.data), job.config.max_samples, _form(job.config))


def _form(config: RowsConfig) -> Form:
    return document_of if config.needs_answers else asked_of


def encode_documents(
    job: Job,
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    assistant_only: bool,
    checks: "Checks",
) -> list[Example]:
    """Tokenise the documents that the run can see; faults of rows are noted."""
    config = job.config

    def encoded(members: Sequence[Document], max_tokens: int | None) -> list[Example]:
        return _encode(job, members, tokenizer, assistant_only, max_tokens, checks)

    if config.packing:
        budget = None if job.budget is None else job.budget - (job.recall_budget or 0)
        return mixed(config.data, documents, encoded, budget, epochs=config.epochs)
    return mixed(config.data, documents, encoded, None, config.max_length, config.epochs)


@dataclass(frozen=True)
class Checks:
    """Checks of every row before training, and their findings."""

    bad: BadRows
    doubts: Doubts
    endings: Endings
    vocabulary: int

    @classmethod
    def of(cls, job: Job, tokenizer: "PreTrainedTokenizerBase", bad: BadRows) -> "Checks":
        """Checks with nothing found so far."""
        endings = Endings(stored_end_tokens(job.source, tokenizer))
        return cls(bad, Doubts(), endings, model_config(job.source).vocab_size)

    def tell(self, job: Job, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Warn of everything that was found beside bad rows, and say what templates do not show."""
        if named := unused_templates(tokenizer):
            console.log(f"chat templates that no row is rendered with: {', '.join(named)}")
        if job.day is not None and job.day != date.today() and prints_date(tokenizer):
            console.log(f"chat templates print {job.day.isoformat()}, the day of the run or cache")
        self.doubts.tell()
        self.endings.tell(tokenizer)


def _warn_beyond_positions(job: Job, examples: Sequence[Example]) -> None:
    """Warn of documents beyond the model's positions; packed rows count them per document."""
    longest = max((len(example.input_ids) for example in examples), default=0)
    config = model_config(job.source)
    warn_beyond_positions(config, min(longest, job.config.max_length), "the model")


def _encode(
    job: Job,
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    assistant_only: bool,
    max_tokens: int | None,
    checks: Checks,
) -> list[Example]:
    config = of_kind(TextRowsConfig, job.config)
    longest = config.max_length if assistant_only else None
    rules = Rules(assistant_only, config.append_eos, job.day, checks.vocabulary)

    def keep(row: Document, example: Example) -> Example | None:
        found = screened(row, example, tokenizer, checks.bad, longest)
        if found is not None and assistant_only:
            checks.endings.see(row, found)
        return found

    return encode_rows(
        documents,
        tokenizer,
        max_tokens=max_tokens,
        seed=job.config.seed,
        keep=keep,
        bad=checks.bad,
        rules=rules,
        doubts=checks.doubts,
    )


def _recall_examples(
    job: Job, tokenizer: "PreTrainedTokenizerBase", text: Sequence[Example]
) -> list[Example]:
    """Generated documents that are `recall_share` of the tokens once `text` is there too."""
    longest = None if job.config.packing else job.config.max_length
    tokens = sum(len(example.input_ids[:longest]) for example in text)
    asked, config = recall_tokens(job.recall_share, tokens), job.config
    documents = recall_documents(tokenizer, asked, config.max_length, config.seed)
    return [document.example for document in documents]
