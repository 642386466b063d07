"""The rows that a run trains on and those it is measured on: reading, mixing, packing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mambactl import console
from mambactl.data.bad_rows import BadRows
from mambactl.data.checks import screened
from mambactl.data.encoding import Example
from mambactl.data.format import encode_rows
from mambactl.data.mixture import mixed, names, shares
from mambactl.data.pack import Row, pack
from mambactl.data.recall_documents import recall_documents, recall_tokens
from mambactl.data.sources import Document, count_rows, load_rows
from mambactl.errors import UsageError
from mambactl.files import canonical
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
    examples = encode_documents(job, documents, tokenizer, assistant_only, bad)
    bad.settle()
    recalled = _recall_examples(job, tokenizer, examples)
    rows = pack([*examples, *recalled], config.max_length, config.packing)
    real = sum(int(row.valid.sum()) for row in rows)
    share = sum(len(example.input_ids) for example in recalled) / real
    generated = f" and {len(recalled)} for recall ({share:.2%} of the tokens)"
    console.log(
        f"data: {len(examples)} of {len(documents)} documents"
        f"{generated if job.recall_share else ''} in {len(rows)} rows, {real:,} tokens"
    )
    if cut := sum(len(example.input_ids) > config.max_length for example in examples):
        console.log(
            f"{cut} of them are longer than --max-length {config.max_length} and are "
            + ("continued in other rows" if config.packing else "cut there")
        )
    return rows


def held_out_rows(
    job: Job, tokenizer: "PreTrainedTokenizerBase", assistant_only: bool = False
) -> list[Row]:
    """Packed rows of `eval_data`, about `eval_tokens` of them and the same every time.

    Bad rows are left out and reported; with `assistant_only` also chats without a whole answer.
    """
    config = job.config
    if not config.eval_data:
        return []
    if shared := sorted(
        {canonical(s) for s in names(config.data)} & {canonical(s) for s in config.eval_data}
    ):
        raise UsageError(
            f"{', '.join(shared)} is training data and held out", "give other --eval-data"
        )
    bad, budget = BadRows(skip=True), 2 * config.eval_tokens
    documents = load_rows(config.eval_data, used_tokens=budget, bad=bad)
    examples = _encode(job, documents, tokenizer, assistant_only, budget, bad)
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


def read_documents(job: Job, bad: BadRows) -> list[Document]:
    """The documents of `data` that the run can see, checked; malformed rows are noted in `bad`."""
    limit = {"used_tokens": job.budget} if job.config.packing else {"used_rows": job.examples}
    return load_rows(names(job.config.data), job.config.max_samples, bad=bad, **limit)


def count_documents(job: Job) -> int | None:
    """Check the data's files and count rows; None where a set lies on the hub."""
    shares(job.config.data)
    return count_rows(names(job.config.data), job.config.max_samples)


def encode_documents(
    job: Job,
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    assistant_only: bool,
    bad: BadRows,
) -> list[Example]:
    """Documents as tokens, those that the run can see; bad rows are noted."""
    config = job.config

    def encoded(members: Sequence[Document], max_tokens: int | None) -> list[Example]:
        return _encode(job, members, tokenizer, assistant_only, max_tokens, bad)

    if config.packing:
        budget = job.budget - job.recall_budget
        return mixed(config.data, documents, encoded, budget)
    return mixed(config.data, documents, encoded, None, config.max_length)


def _encode(
    job: Job,
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    assistant_only: bool,
    max_tokens: int | None,
    bad: BadRows,
) -> list[Example]:
    longest = job.config.max_length if assistant_only else None
    return encode_rows(
        documents,
        tokenizer,
        assistant_only,
        max_tokens,
        job.config.seed,
        keep=lambda row, example: screened(row, example, tokenizer, bad, longest),
        bad=bad,
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
