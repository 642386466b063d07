"""What the training stages share: the student, its teacher, the data, and how a result is kept."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambactl import console
from mambactl.checkpoint.adapters import adapt
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_model, load_tokenizer, open_checkpoint
from mambactl.checkpoint.provenance import header_digest, lineage
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.run_folder import OtherFolder, RunFolder
from mambactl.checkpoint.save import refuse_existing, save_model
from mambactl.checkpoint.teacher import teacher_of
from mambactl.checkpoint.vocabulary import require_same_tokens
from mambactl.data.bad_rows import BadRows
from mambactl.data.checks import screened
from mambactl.data.format import Example, encode_rows
from mambactl.data.mixture import mixed, names, shares
from mambactl.data.pack import Row, pack
from mambactl.data.recall_documents import recall_documents, recall_tokens, require_recall_length
from mambactl.data.sources import Document, count_rows, load_rows
from mambactl.errors import ResourceError, UsageError
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import MixedRowsConfig, SpreadConfig, TrainConfig
from mambactl.ranks import is_main, place, sharded
from mambactl.report.plots import draw
from mambactl.train.consolidate import consolidated
from mambactl.train.ledger import PhaseReport

# of a parameter that trains: weight, gradient and both moments in fp32
TRAINED_BYTES = 16


@dataclass(frozen=True)
class Job:
    """One training run: `dtype` is what matrices multiply in, weights that train are fp32."""

    stage: str
    config: TrainConfig
    source: str
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, stage: str, config: TrainConfig, source: str) -> "Job":
        """Place a run; raises UsageError for a type that cannot be trained in, or short rows."""
        device, dtype = place(config)
        if dtype == torch.float16:
            raise UsageError("float16 gradients underflow", "use --dtype bfloat16 or float32")
        job = cls(stage, config, source, device, dtype)
        if job.recall_share:
            require_recall_length(config.max_length)
        return job

    @property
    def amp(self) -> torch.dtype | None:
        """The mixed-precision type, None for plain fp32."""
        return None if self.dtype == torch.float32 else self.dtype

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed: options, and what they name by content."""
        given = self.config.teacher
        return {
            "stage": self.stage,
            **self.config.model_dump(mode="json", exclude=self.config.place),
            "source": _name(self.source),
            "source_sha256": header_digest(resolve(self.source).path),
            "teacher": given and _name(given),
            "teacher_sha256": given and header_digest(resolve(given).path),
            "data": [_name(spec) for spec in names(self.config.data)],
            "data_sha256": [_file_digest(spec) for spec in names(self.config.data)],
            "data_shares": shares(self.config.data),
            **self._held_out_identity(),
            # a state that is split cannot be read whole, nor the other way round
            **({"sharded": True} if sharded() else {}),
        }

    def _held_out_identity(self) -> dict[str, Any]:
        specs = getattr(self.config, "eval_data", None)
        if specs is None:
            return {}
        cache = getattr(self.config, "teacher_cache", None)
        return {
            "teacher_cache_sha256": cache and header_digest(Path(cache).expanduser()),
            "eval_data": [_name(spec) for spec in specs],
            "eval_data_sha256": [_file_digest(spec) for spec in specs],
        }

    def folder(self, out: Path | None, resume: bool, force: bool) -> RunFolder:
        """The working folder of this run; raises OutputError where it may not be used."""
        if out is None:
            raise UsageError(f"{self.stage} needs a place for its result", "give -o OUT")
        if not is_main():
            return OtherFolder(Path(out), {})
        refuse_existing(Path(out), force)
        folder = RunFolder(Path(out), self.identity)
        folder.check(resume, force)
        return folder

    def student(self, dtype: torch.dtype | None = torch.float32) -> HybridForCausalLM:
        """The model that trains; None keeps the type it is stored in."""
        model = load_model(self.source, self.device, dtype)
        if self.config.grad_checkpointing:
            model.activation_checkpointing_enable()
        return model

    def teacher(self, foreign: bool = False) -> HybridForCausalLM:
        """The frozen teacher; raises ModelError when its vocabulary is another one.

        With `foreign` it may be code of its own, which has logits but none of our layers.
        """
        spec = self.teacher_spec()
        self.require_vocabulary_of(spec, foreign)
        trusted = foreign and self.config.trust_remote_code
        return load_model(spec, self.device, self.dtype, trusted).requires_grad_(False)

    def require_vocabulary_of(self, teacher: str, foreign: bool = False) -> None:
        """Raise ModelError unless teacher and student share every token."""
        require_same_tokens(
            self.source,
            teacher,
            "teacher",
            "give a --teacher of the same family",
            trust_remote_code=foreign and self.config.trust_remote_code,
        )

    def teacher_spec(self) -> str:
        """The teacher that is asked for, else the model the lineage started from."""
        return teacher_of(self.source, self.config.teacher, "--teacher")

    def tokenizer(self) -> Any:
        """The tokenizer the student carries."""
        return load_tokenizer(self.source)

    @property
    def budget(self) -> int:
        """The most tokens that the run can see."""
        return self.examples * self.config.max_length

    @property
    def examples(self) -> int:
        """Rows that the run takes, counted again when it comes back to one."""
        return self.config.max_steps * self.global_batch

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.config.processes if isinstance(self.config, SpreadConfig) else 1

    @property
    def global_batch(self) -> int:
        """Rows of one optimiser step, of all processes."""
        return self.config.batch_size * self.config.grad_accum * self.processes

    @property
    def recall_share(self) -> float:
        """Share of the tokens that generated recall documents are."""
        return self.config.recall_share if isinstance(self.config, MixedRowsConfig) else 0.0

    @property
    def recall_budget(self) -> int:
        """The most tokens of recall documents that the run can see."""
        return round(self.recall_share * self.budget)

    def bad_rows(self) -> BadRows:
        """Where rows are noted that nothing can be learned from; `settle` it before training."""
        return BadRows(self.config.skip_bad_rows)

    def documents(self, bad: BadRows | None = None) -> list[Document]:
        """The rows of `data`, checked; malformed ones go to `bad`, or are settled at once."""
        limits: dict[str, Any] = {"used_rows": self.examples}
        if self.config.packing:
            limits = {"used_tokens": self.budget}
        noted = self.bad_rows() if bad is None else bad
        limits["bad"] = noted
        specs = names(self.config.data)
        documents = load_rows(specs, self.config.max_samples, **limits)
        if bad is None:
            noted.settle()
        return documents

    def count_documents(self) -> int | None:
        """Check the data's files and count rows; None where a set lies on the hub."""
        shares(self.config.data)
        return count_rows(names(self.config.data), self.config.max_samples)

    def examples_of(
        self, documents: Sequence[Document], tokenizer: Any, assistant_only: bool, bad: BadRows
    ) -> list[Example]:
        """Documents as tokens, those that the run can see; bad rows are noted."""
        config = self.config
        longest = config.max_length if assistant_only else None

        def encoded(members: Sequence[Document], max_tokens: int | None) -> list[Example]:
            return encode_rows(
                members,
                tokenizer,
                assistant_only,
                max_tokens,
                config.seed,
                keep=lambda row, example: screened(row, example, tokenizer, bad, longest),
                bad=bad,
            )

        if config.packing:
            budget = self.budget - self.recall_budget
            return mixed(config.data, documents, encoded, budget)
        return mixed(config.data, documents, encoded, None, config.max_length)

    def rows(self, tokenizer: Any, assistant_only: bool = False) -> list[Row]:
        """Packed rows, as many as the run can see: text, and recall documents among it.

        Raises UsageError for rows that nothing can be learned from, unless they are to be skipped.
        """
        config, bad = self.config, self.bad_rows()
        shares(config.data)
        documents = self.documents(bad=bad)
        examples = self.examples_of(documents, tokenizer, assistant_only, bad)
        bad.settle()
        recalled = self._recall_examples(tokenizer, examples)
        rows = pack([*examples, *recalled], config.max_length, config.packing)
        real = sum(int(row.valid.sum()) for row in rows)
        share = sum(len(example.input_ids) for example in recalled) / real
        generated = f" and {len(recalled)} for recall ({share:.2%} of the tokens)"
        console.log(
            f"data: {len(examples)} of {len(documents)} documents"
            f"{generated if self.recall_share else ''} in {len(rows)} rows, {real:,} tokens"
        )
        if cut := sum(len(example.input_ids) > config.max_length for example in examples):
            console.log(
                f"{cut} of them are longer than --max-length {config.max_length} and are "
                + ("continued in other rows" if config.packing else "cut there")
            )
        return rows

    def _recall_examples(self, tokenizer: Any, text: Sequence[Example]) -> list[Example]:
        """Generated documents that are `recall_share` of the tokens once `text` is there too."""
        longest = None if self.config.packing else self.config.max_length
        tokens = sum(len(example.input_ids[:longest]) for example in text)
        asked, config = recall_tokens(self.recall_share, tokens), self.config
        documents = recall_documents(tokenizer, asked, config.max_length, config.seed)
        return [document.example for document in documents]

    def held_out_rows(self, tokenizer: Any, assistant_only: bool = False) -> list[Row]:
        """Packed rows of `eval_data`, about `eval_tokens` of them and the same every time.

        Bad rows are left out and reported; with `assistant_only` also chats without a whole answer.
        """
        config = self.config
        if not config.eval_data:
            return []
        if shared := sorted(
            {_name(s) for s in names(config.data)} & {_name(s) for s in config.eval_data}
        ):
            raise UsageError(
                f"{', '.join(shared)} is training data and held out", "give other --eval-data"
            )
        bad, longest = BadRows(skip=True), config.max_length if assistant_only else None
        documents = load_rows(config.eval_data, used_tokens=2 * config.eval_tokens, bad=bad)
        examples = encode_rows(
            documents,
            tokenizer,
            assistant_only,
            2 * config.eval_tokens,
            config.seed,
            keep=lambda row, example: screened(row, example, tokenizer, bad, longest),
            bad=bad,
        )
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

    def save(
        self,
        model: HybridForCausalLM,
        folder: RunFolder,
        teacher: str | None,
        metrics: Mapping[str, Any],
    ) -> None:
        """Write the result in the source's type and let it appear under its name.

        Every process must call it; the main one writes.
        """
        model = consolidated(model)
        if model is None:
            return
        stored = getattr(torch, describe(self.source)["dtype"])
        with open_checkpoint(self.source) as reader:
            record = lineage(
                self.stage,
                reader.lineage,
                reader.path,
                teacher,
                self.config.model_dump(mode="json"),
                self.config.seed,
                metrics,
            )
            # trainers write special tokens and switches into the configuration of the model
            model.config = adapt(reader).config
            model.config.dtype = stored
            save_model(model.to(stored), folder.staged, reader.files, record, force=True)
        folder.publish()


def plan_training(
    job: Job,
    with_teacher: bool = True,
    foreign: bool = False,
    counts: bool = True,
) -> dict[str, Any]:
    """What a run would do, from headers and files; nothing is written, no hub set is read.

    Without `counts` documents are left to the caller.
    """
    found = describe(job.source)
    teacher = job.teacher_spec() if with_teacher else None
    if teacher is not None:
        job.require_vocabulary_of(teacher, foreign)
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
        "documents": job.count_documents() if counts else None,
        "tokens_at_most": job.budget,
        "recall_tokens_at_most": job.recall_budget,
        "estimated_bytes": _estimate(found["parameters"], job.dtype, with_teacher),
    }


def require_whole_weights(needed: bool) -> None:
    """Raise UsageError where adapters or held-out measurements meet weights that are split."""
    if needed and sharded():
        raise UsageError(
            "--lora, --eval-data and --eval-share need whole weights on every GPU",
            "add --no-shard, or evaluate what was trained: mambactl eval",
        )


def report_phases(reports: Sequence[PhaseReport], folder: RunFolder) -> dict[str, Any]:
    """Show how every phase went as a table; returns the same as metrics.

    Warns of a phase whose losses, in the folder's metrics, are higher at its end.
    """
    console.table(
        "training",
        ("phase", "steps", "first loss", "last loss", "tokens", "seconds", "held-out KL"),
        [
            (r.name, r.steps, f"{r.first_loss:.4f}", f"{r.last_loss:.4f}", f"{r.tokens:,}",
             f"{r.seconds:.1f}", "" if r.kl is None else f"{r.kl:.4f}")
            for r in reports
        ],
    )  # fmt: skip
    lines = folder.read_log() if is_main() else []
    for report in reports:
        losses = [x["loss"] for x in lines if x["phase"] == report.name and "loss" in x]
        # single batches vary too much, those of preferences above all
        few = max(5, len(losses) // 10)
        if len(losses) < 2 * few:
            continue
        first, last = np.mean(losses[:few]), np.mean(losses[-few:])
        if last > first:
            flag = "--align-lr" if report.name == "align" else "--lr"
            console.warn(
                f"the last {few} losses of {report.name} are {last:.4f} on average, the first "
                f"{few} were {first:.4f}: lower {flag}"
            )
    return {
        r.name: {k: v for k, v in asdict(r).items() if k != "name" and v is not None}
        for r in reports
    }


def draw_ledger(folder: RunFolder, asked: bool) -> None:
    """Plot what the run measured beside its metrics; a missing library is said if it was asked."""
    if not is_main():
        return
    try:
        draw({folder.out.name: folder.metrics}, folder.plot)
    except (ResourceError, UsageError) as error:
        if asked:
            console.log(f"no plot: {error} ({error.hint})")


def _name(spec: str) -> str:
    """One spelling of a path; other names are themselves."""
    path = os.path.expanduser(spec)
    # unlike Path.exists, this takes any text
    return os.path.realpath(path) if os.path.exists(path) else spec


def _file_digest(spec: str) -> str | None:
    """sha256 of a file; None for a set on the hub and for what reading the data will refuse."""
    try:
        with open(spec, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        return None


def _estimate(parameters: int, dtype: torch.dtype, with_teacher: bool) -> int:
    """Bytes of student weights, gradients and both Adam moments in fp32, and of the teacher."""
    return parameters * (TRAINED_BYTES + (dtype.itemsize if with_teacher else 0))
