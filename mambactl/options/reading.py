"""Options of the commands that show what is there: checkpoints, results and the machine."""

from typing import Annotated

from pydantic import Field

from mambactl.options.fields import CommandConfig, Rows, Shown, Tokens

# the marks between which `table` writes into a document
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"

File = Shown("FILE")


class InspectConfig(CommandConfig):
    """Layers, sizes, cache and lineage of a checkpoint."""

    input_len: Tokens = Field(
        default=1024, description="tokens of a sequence whose cache is counted"
    )
    batch_size: Rows = Field(default=1, description="sequences decoded together")
    k: Annotated[int, Field(ge=0, le=32)] = Field(default=0, description="draft tokens per step")
    tensors: bool = Field(default=False, description="list every tensor")
    lineage: bool = Field(default=False, description="print how it was made")


class TableConfig(CommandConfig):
    """Results of bench as a Markdown table."""

    files: Annotated[list[str], Shown("FILE", positional=True)] = Field(
        description="JSON of bench, or of recipe run"
    )
    into: Annotated[str | None, File] = Field(
        default=None, description=f"replace what is between {BEGIN} and {END}"
    )


class PlotConfig(CommandConfig):
    """Draw the KL over the tokens of training runs."""

    runs: Annotated[list[str], Shown("RUN", positional=True)] = Field(
        description="distilled checkpoint, its .partial, or .jsonl"
    )
    out: Annotated[str, File] = Field(default="metrics.png", description="picture to write (PNG)")


class ReportConfig(CommandConfig):
    """Put measurements on one HTML page."""

    paths: Annotated[list[str], Shown("PATH", positional=True)] = Field(
        description="results .json, metrics.jsonl, folder of results, or checkpoint"
    )
    out: Annotated[str, File] = Field(default="report.html", description="page to write (HTML)")
    title: str | None = Field(default=None, description="heading of the page")


class DoctorConfig(CommandConfig):
    """Versions and devices, and what is missing."""

    deep: bool = Field(default=False, description="load torch and kernels, and say which are live")
