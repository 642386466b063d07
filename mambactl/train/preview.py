"""What a training run would see of its data: counts, and one example with its mask."""

from typing import Any

from rich.text import Text

from mambactl import console
from mambactl.data.format import Example
from mambactl.data.mixture import names
from mambactl.data.pack import pack
from mambactl.data.sources import is_on_hub
from mambactl.errors import UsageError
from mambactl.train.job import Job

# tokens of an example that are shown
SHOWN = 600
# around what is learned, where there is no colour
OPEN, CLOSE = "⟦", "⟧"


def preview(job: Job, assistant_only: bool) -> dict[str, Any]:
    """Counts of documents, rows, tokens, learned tokens and bad rows; shows the first example.

    Nothing is counted where a set lies on the hub, which is not asked: values are None.
    """
    config = job.config
    if any(is_on_hub(spec) for spec in names(config.data)):
        job.count_documents()
        unknown = ("documents", "used_documents", "rows", "tokens", "learned_tokens", "bad_rows")
        return dict.fromkeys(unknown)
    tokenizer, bad = job.tokenizer(), job.bad_rows()
    documents = job.documents(bad=bad)
    examples = job.examples_of(documents, tokenizer, assistant_only, bad)
    if bad.found:
        what = "would be left out" if config.skip_bad_rows else "would stop the run"
        console.warn(f"{bad.report()} {what}")
    rows = _rows(job, examples)
    if rows:
        show(examples[0], tokenizer)
    return {
        "documents": len(documents),
        "used_documents": len(examples),
        "rows": len(rows),
        "tokens": sum(int(row.valid.sum()) for row in rows),
        "learned_tokens": sum(int(row.loss_mask.sum()) for row in rows),
        "bad_rows": bad.counts,
    }


def _rows(job: Job, examples: list[Example]) -> list[Any]:
    try:
        return pack(examples, job.config.max_length, job.config.packing)
    except UsageError:
        # what is bad about all of them has been said
        return []


def show(example: Example, tokenizer: Any) -> None:
    """Print an example; what is learned stands between brackets, and in green on a terminal."""
    console.log(f"one example, {OPEN}what is learned{CLOSE}:")
    console.show(marked(example, tokenizer))


def marked(example: Example, tokenizer: Any) -> Text:
    """The text of an example, every learned span between brackets; a begin token never is one."""
    ids, mask = (column[:SHOWN] for column in example)
    mask = mask.copy()
    # nothing predicts the first token
    mask[:1] = False
    text, start = Text(), 0
    for end in [*(mask[1:] != mask[:-1]).nonzero()[0] + 1, len(ids)]:
        piece = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        learned = bool(mask[start])
        text.append(f"{OPEN}{piece}{CLOSE}" if learned else piece, "bold green" if learned else "")
        start = end
    if len(example.input_ids) > SHOWN:
        text.append(" ...")
    return text
