"""What the training stages share: the student, its teacher, the data, and how a result is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mambactl import console
from mambactl.checkpoint.adapters import adapt
from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.checkpoint.provenance import lineage
from mambactl.checkpoint.reader import open_checkpoint
from mambactl.checkpoint.save import refuse_existing, save_model
from mambactl.checkpoint.summary import describe
from mambactl.data.format import encode_rows
from mambactl.data.load import Schema, load_rows
from mambactl.data.pack import Row, pack
from mambactl.errors import ModelError, UsageError
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.recipe import TrainConfig
from mambactl.stages.placement import place
from mambactl.stages.teacher import teacher_of
from mambactl.train.run_folder import RunFolder

# where a run happens is no part of what it is
PLACE = {"device", "trust_remote_code"}


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
        """Place a run; raises UsageError for a type that cannot be trained in."""
        device, dtype = place(config)
        if dtype == torch.float16:
            raise UsageError("float16 gradients underflow", "use --dtype bfloat16 or float32")
        return cls(stage, config, source, device, dtype)

    @property
    def amp(self) -> torch.dtype | None:
        """The mixed-precision type, None for plain fp32."""
        return None if self.dtype == torch.float32 else self.dtype

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed."""
        config = self.config.model_dump(mode="json", exclude=PLACE)
        return {"stage": self.stage, "source": self.source, **config}

    def folder(self, out: Path | None, resume: bool, force: bool) -> RunFolder:
        """The working folder of this run; raises OutputError where it may not be used."""
        if out is None:
            raise UsageError(f"{self.stage} needs a place for its result", "give -o OUT")
        refuse_existing(Path(out), force)
        folder = RunFolder(Path(out), self.identity)
        folder.check(resume, force)
        return folder

    def student(self) -> HybridForCausalLM:
        """The model that trains, in fp32."""
        model = load_model(self.source, self.device, torch.float32)
        if self.config.grad_checkpointing:
            model.activation_checkpointing_enable()
        return model

    def teacher(self, student: HybridForCausalLM) -> HybridForCausalLM:
        """The frozen teacher; raises ModelError when its vocabulary is another one."""
        spec = self.teacher_spec()
        teacher = load_model(spec, self.device, self.dtype)
        sizes = teacher.config.vocab_size, student.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"the teacher {spec} has {sizes[0]} tokens, the student {sizes[1]}",
                "give a --teacher of the same family",
            )
        return teacher.requires_grad_(False)

    def teacher_spec(self) -> str:
        """The teacher that is asked for, else the model the lineage started from."""
        return teacher_of(self.source, self.config.teacher, "--teacher")

    def tokenizer(self) -> Any:
        """The tokenizer the student carries."""
        return load_tokenizer(self.source)

    def documents(self, schema: Schema = "text") -> list[dict[str, Any]]:
        """The rows of `data`, checked."""
        return load_rows(self.config.data, self.config.max_samples, schema)

    def rows(self, tokenizer: Any, assistant_only: bool = False) -> list[Row]:
        """Packed rows, as many as the run can see."""
        config = self.config
        budget = config.max_steps * config.batch_size * config.grad_accum * config.max_length
        documents = self.documents()
        examples = encode_rows(
            documents,
            tokenizer,
            assistant_only,
            max_tokens=budget if config.packing else None,
            seed=config.seed,
        )
        rows = pack(examples, config.max_length, config.packing)
        real = sum(int(row.valid.sum()) for row in rows)
        console.log(
            f"data: {len(examples)} of {len(documents)} documents in {len(rows)} rows, "
            f"{real:,} tokens"
        )
        return rows

    def save(
        self,
        model: HybridForCausalLM,
        folder: RunFolder,
        teacher: str | None,
        metrics: Mapping[str, Any],
    ) -> None:
        """Write the result in the source's type and let it appear under its name."""
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


def plan_training(job: Job, schema: Schema = "text", with_teacher: bool = True) -> dict[str, Any]:
    """What a run would do, from headers and the data's first rows; nothing is written."""
    found = describe(job.source)
    config = job.config
    tokens = config.max_steps * config.batch_size * config.grad_accum * config.max_length
    return {
        "source": found["checkpoint"],
        "teacher": job.teacher_spec() if with_teacher else None,
        "mixers": found["mixers"],
        "parameters": found["parameters"],
        "parts": found["parts"],
        "device": str(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "documents": len(job.documents(schema)),
        "tokens_at_most": tokens,
        "estimated_bytes": _estimate(found["parameters"], job.dtype, with_teacher),
    }


def report_phases(reports: Sequence[Any]) -> dict[str, Any]:
    """Show how every phase went as a table; returns the same as metrics."""
    console.table(
        "training",
        ("phase", "steps", "first loss", "last loss", "tokens", "seconds"),
        [
            (r.name, r.steps, f"{r.first_loss:.4f}", f"{r.last_loss:.4f}", f"{r.tokens:,}",
             f"{r.seconds:.1f}")
            for r in reports
        ],
    )  # fmt: skip
    return {r.name: {k: v for k, v in asdict(r).items() if k != "name"} for r in reports}


def _estimate(parameters: int, dtype: torch.dtype, with_teacher: bool) -> int:
    """Bytes of student weights, gradients and both Adam moments in fp32, and of the teacher."""
    return parameters * (16 + (dtype.itemsize if with_teacher else 0))
