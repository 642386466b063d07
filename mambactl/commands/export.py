"""`export`: a checkpoint in the form of another program, streamed tensor by tensor.

Memory holds a layer's tensors at most; only the comparison afterwards loads models as a whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mambactl import console
from mambactl.checkpoint.container import Shape, TensorFile
from mambactl.checkpoint.load import open_strict
from mambactl.checkpoint.ownership import require_replaceable
from mambactl.checkpoint.provenance import lineage
from mambactl.checkpoint.publishing import WorkFolder
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.save import TensorWriter
from mambactl.errors import UsageError
from mambactl.export.ahead import made_ahead
from mambactl.export.exported_form import Form, Origin
from mambactl.export.folder_texts import export_card, portable_tokenizer
from mambactl.export.round_trip import Difference, compare, require_loader
from mambactl.export.targets import TARGETS, Target
from mambactl.files import CARD, SINGLE_FILE_SUFFIXES, Source
from mambactl.options.exporting import ExportConfig
from mambactl.stage_result import StageResult


def run(
    config: ExportConfig, source: str, out: Path, *, resume: bool = False, force: bool = False
) -> StageResult:
    """Write the model at `out`; there is nothing to resume, and what is done the CLI handles."""
    _check_name(config, out)
    found = resolve(source)
    with _open(config, source, found) as work:
        require_replaceable(out, force, work.target.side)
        writer = TensorWriter(out, force, work.open_file, work.target.side)
        metrics = work.metrics
        writer.verify = work.verify
        with writer:
            shapes = work.shapes
            writer.plan(shapes)
            with console.progress("export", len(shapes)) as task:
                for name, parts in made_ahead(work.form.tensors(work.origin, shapes)):
                    writer.write(name, *parts)
                    task.advance()
            writer.lineage = work.lineage()
    if work.form.note:
        console.log(work.form.note)
    if work.difference is not None:
        metrics |= {"difference": asdict(work.difference)}
        console.log(_said(work.difference))
    return StageResult(str(out), metrics)


def plan(config: ExportConfig, source: str) -> dict[str, object]:
    """Resolve and check everything, write nothing."""
    with _open(config, source, resolve(source)) as work:
        count = sum(torch.Size(shape).numel() for shape, _ in work.shapes.values())
        return work.metrics | {"tensors": len(work.shapes), "parameters": count}


@dataclass
class _Work:
    """One open source, the form that it takes and what was found of the result."""

    config: ExportConfig
    source: Source
    origin: Origin
    target: Target
    form: Form
    difference: Difference | None = None

    @property
    def metrics(self) -> dict[str, object]:
        """Metrics that are known before anything is written."""
        return {"to": self.config.to, "architecture": self.form.architecture, "dtype": self.dtype}

    @property
    def dtype(self) -> str:
        """Type of most weights that are written."""
        if self.config.dtype != "auto":
            return self.config.dtype
        stored = self.origin.described("model.embed_tokens.weight").dtype
        return str(stored).removeprefix("torch.")

    @property
    def shapes(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and type of every tensor that is handed to the file."""
        asked = None
        if self.config.dtype != "auto" and not self.target.converts:
            asked = getattr(torch, self.dtype)
        return self.form.shapes(self.origin, asked)

    @property
    def rounded_to(self) -> str | None:
        """The type that weights are rounded to, None where none changes."""
        kinds = {
            str(tensor.dtype).removeprefix("torch.")
            for tensor in map(self.origin.described, self.origin.names)
            if tensor.ndim > 1
        }
        return None if self.dtype == "float32" or kinds == {self.dtype} else self.dtype

    def open_file(self, work: WorkFolder) -> TensorFile:
        """File to write in the working folder."""
        texts = portable_tokenizer(self.origin.reader) | self.form.files
        texts[CARD] = export_card(self.config.to, self.form, self.origin)
        return self.target.open_file(work, self.form, self.config, self.dtype, texts)

    def verify(self, result: Path) -> None:
        """Compare the result with the original; CheckError where they differ."""
        if self.config.check:
            console.log("comparing logits and text with the original")
            self.difference = compare(
                self.origin,
                self.source,
                lambda: self.target.load(result, self.origin.config),
                self.rounded_to,
            )

    def lineage(self) -> dict[str, object]:
        """Lineage of the export."""
        local = Path(self.source.spec).expanduser().exists()
        return lineage(
            "export",
            self.origin.reader.lineage,
            self.source.path if local else self.source.spec,
            None,
            self.config.model_dump(mode="json"),
            self.config.seed,
            self.metrics,
            self.source.path,
        )


@contextmanager
def _open(config: ExportConfig, spec: str, source: Source) -> Iterator[_Work]:
    _check_options(config)
    target = TARGETS[config.to]
    reader, adapted = open_strict(source)
    with reader:
        origin = Origin(spec, reader, adapted)
        form = target.make(origin, config)
        if config.check and form.since:
            require_loader(form.since)
        yield _Work(config, source, origin, target, form)


def _check_options(config: ExportConfig) -> None:
    """Raise UsageError for options of another form."""
    if config.dtype == "q8_0" and not TARGETS[config.to].converts:
        raise UsageError("q8_0 is a type of GGUF alone", "add --to gguf, or give another --dtype")


def _check_name(config: ExportConfig, out: Path) -> None:
    """Raise UsageError where OUT is named like another kind of file than is written."""
    ending = config.ending
    if ending and out.suffix != ending:
        raise UsageError(f"--to {config.to} writes a {ending} file", f"give -o NAME{ending}")
    if not ending and out.suffix in (*SINGLE_FILE_SUFFIXES, *config.endings.values()):
        raise UsageError(f"--to {config.to} writes a folder", f"drop {out.suffix} of -o {out.name}")


def _said(found: Difference) -> str:
    apart = f"{found.logits:.2g} at most (of {found.scale:.3g}), {found.kl:.2g} nats a token"
    where = f"{found.tokens} tokens of {found.prompts} prompts"
    return f"the same model: on {where} logits differ by {apart}"
