"""Preview of a training run: its plan, and the data that it would see."""

from typing import TYPE_CHECKING

import torch
from rich.text import Text

from mambactl import console
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.vocabulary import model_config
from mambactl.data.bad_rows import BadRows
from mambactl.data.encoding import Example
from mambactl.data.mixture import names
from mambactl.data.pack import Row, pack
from mambactl.data.row_files import is_on_hub
from mambactl.errors import UsageError
from mambactl.json_values import JsonObject
from mambactl.models.mixers.registry import looks_up
from mambactl.options.training import TrainConfig
from mambactl.present import of_kind
from mambactl.train.epochs import with_steps
from mambactl.train.job import Job
from mambactl.train.phases import parts_of, shapes_of
from mambactl.train.rows import Checks, count_documents, encode_documents, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of a parameter that trains: weight, gradient and both moments in fp32
TRAINED_BYTES = 16
# tokens of an example that are shown
SHOWN = 600
# around what is learned, where there is no colour
OPEN, CLOSE = "⟦", "⟧"


def plan_training(
    job: Job,
    with_teacher: bool = True,
    foreign: bool = False,
    counts: bool = True,
) -> JsonObject:
    """Plan of a run, from headers and files; nothing is written, no hub set is read.

    Without `counts` documents are left to the caller.
    """
    found = describe(job.source)
    teacher = job.teacher_spec if with_teacher else None
    if teacher is not None:
        trusted = foreign and job.config.trust_remote_code
        job.require_vocabulary_of(teacher, foreign, padded=not trusted)
    return {
        "source": found["checkpoint"],
        "teacher": teacher,
        "mixers": found["mixers"],
        "parameters": found["parameters"],
        "parts": found["parts"],
        "device": str(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "processes": job.processes,
        "global_batch": job.global_batch,
        "documents": count_documents(job) if counts else None,
        "tokens_at_most": job.budget,
        "recall_tokens_at_most": job.recall_budget,
        "estimated_bytes": _estimate(found["parameters"], job.dtype, with_teacher),
    } | ({"frozen": _frozen(job)} if of_kind(TrainConfig, job.config).freeze_kept else {})


def _frozen(job: Job) -> list[JsonObject]:
    """Queries and keys of kept attention, which stay as they are."""
    model = shapes_of(model_config(job.source))
    return parts_of({name: p for name, p in model.named_parameters() if looks_up(name)})


def preview(job: Job, assistant_only: bool) -> JsonObject:
    """Counts of documents, rows, tokens, learned tokens and bad rows; shows the first example.

    Raises UsageError for rows that would stop the run. Nothing is counted where a set lies on the
    hub, which is not asked: values are None.
    """
    config = job.config
    if any(is_on_hub(spec) for spec in names(config.data)):
        count_documents(job)
        unknown = ("documents", "used_documents", "rows", "tokens", "learned_tokens", "bad_rows")
        return dict.fromkeys(unknown)
    tokenizer, bad = job.tokenizer(), BadRows(config.skip_bad_rows)
    documents = read_documents(job, bad)
    checks = Checks.of(job, tokenizer, bad)
    examples = encode_documents(job, documents, tokenizer, assistant_only, checks)
    checks.tell(job, tokenizer)
    rows = _rows(job, examples)
    if rows:
        with_steps(job, len(rows))
        show(examples[0], tokenizer)
    bad.settle()
    return {
        "documents": len(documents),
        "used_documents": len(examples),
        "rows": len(rows),
        "tokens": sum(int(row.valid.sum()) for row in rows),
        "learned_tokens": sum(int(row.loss_mask.sum()) for row in rows),
        "bad_rows": bad.counts,
    }


def _rows(job: Job, examples: list[Example]) -> list[Row]:
    try:
        return pack(examples, job.config.max_length, job.config.packing)
    except UsageError:
        # what is bad about all of them has been said
        return []


def show(example: Example, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Print an example; what is learned stands between brackets, and in green on a terminal."""
    console.log(f"one example, {OPEN}what is learned{CLOSE}:")
    console.show(marked(example, tokenizer))


def marked(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Text:
    """The text of an example, every learned span between brackets; a begin token never is one."""
    ids, mask = (column[:SHOWN] for column in example)
    mask = mask.copy()
    # nothing predicts the first token
    mask[:1] = False
    text, start = Text(), 0
    for end in [*(mask[1:] != mask[:-1]).nonzero()[0] + 1, len(ids)]:
        piece = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        learned = bool(mask[start])
        text.append(f"{OPEN}{piece}{CLOSE}" if learned else piece, "bold green" if learned else "")
        start = end
    if len(example.input_ids) > SHOWN:
        text.append(" ...")
    return text


def _estimate(parameters: int, dtype: torch.dtype, with_teacher: bool) -> int:
    """Bytes of student weights, gradients and both Adam moments in fp32, and of the teacher."""
    return parameters * (TRAINED_BYTES + (dtype.itemsize if with_teacher else 0))
