"""Functions of the commands that change no file: what is there is shown, or sent to the hub."""

from mambactl.api.calls import Spec, show
from mambactl.api.signatures import with_options
from mambactl.cli.docs import document
from mambactl.options.pushing import PushConfig
from mambactl.options.reading import (
    DoctorConfig,
    InspectConfig,
    PlotConfig,
    ReportConfig,
    TableConfig,
)
from mambactl.stage_result import StageResult


@with_options("push", PushConfig)
def push(config: PushConfig, model: Spec) -> StageResult:
    """Upload a checkpoint to the hub, with a card, and without paths and names of this machine.

    A file that ends in .st is sent as a folder. A repository that holds everything already gets
    nothing. Nothing on this disk changes.

    Returns the address of the page as `text`; `metrics` name the files with their bytes, and what
    was sent and removed.

    Raises UsageError for a name that the hub does not allow and for a public repository without
    `public`, ModelError for a checkpoint that mambactl did not make, and ResourceError without a
    token or a connection, and for what the hub refuses.

    >>> found = mambactl.push("student.st", repo="org/name", dry_run=True)
    >>> found.text.rpartition("/")[2], "README.md" in found.metrics["files"]
    ('name', True)
    """
    return show("push", config, model)


@with_options("inspect", InspectConfig)
def inspect(config: InspectConfig, model: Spec) -> StageResult:
    """Describe a checkpoint from its headers: layers, sizes, cache and lineage.

    Returns the description as `metrics`; no weight is read. `session` in it is the cache that a
    GPU allocates to decode `batch_size` sequences of `input_len` tokens with `k` drafts a step, in
    bytes by part. Raises ModelError for a checkpoint that is missing, incomplete or not supported.

    >>> found = mambactl.inspect("student.st").metrics
    >>> found["mixers"], found["dtype"]
    (['mamba2', 'attention', 'mamba2', 'attention'], 'float32')
    >>> mambactl.inspect("student.st", batch_size=8, k=4).metrics["session"]["bytes"]["kv"]
    5242880
    """
    return show("inspect", config, model)


@with_options("table", TableConfig)
def table(config: TableConfig) -> StageResult:
    """Make a Markdown table from what `bench --json` printed, or from metrics of `bench` as JSON.

    Returns the table as `text`, or the name of the document that it was put `into`. Raises
    UsageError for a file that cannot be read, is no such result, or has no place for a table.

    >>> import json
    >>> found = mambactl.bench("student.st", input_len=[8], output_len=2, iters=1)
    >>> _ = Path("bench.json").write_text(json.dumps({"metrics": found.metrics}))
    >>> mambactl.table(files=["bench.json"]).text.splitlines()[0].startswith("|")
    True
    """
    return show("table", config)


@with_options("plot", PlotConfig)
def plot(config: PlotConfig) -> StageResult:
    """Draw the KL to the teacher over the tokens trained on, one curve per run, as a PNG.

    Returns the name of the picture as `text`. Raises UsageError for a run without a ledger,
    OutputError for a place that cannot be written and ResourceError without matplotlib.

    >>> tuned = mambactl.distill(
    ...     "student.st", "drawn.st", data=["chat.jsonl"], max_steps=4, batch_size=2, max_length=32
    ... )
    >>> mambactl.plot(runs=[tuned.path], out="curve.png").text
    'curve.png'
    """
    return show("plot", config)


@with_options("report", ReportConfig)
def write_report(config: ReportConfig) -> StageResult:
    """Put measurements that were kept on one HTML page that opens without a network.

    Returns the path of the page as `text`. Raises UsageError where nothing is there to show,
    OutputError for a place that cannot be written and ResourceError without matplotlib.

    >>> found = mambactl.evaluate("student.st", data=["chat.jsonl"], limit=4, max_length=32)
    >>> page = mambactl.write_report(paths=[found.kept], out="page.html")
    >>> Path(page.text).name
    'page.html'
    """
    return show("report", config)


@with_options("doctor", DoctorConfig)
def doctor(config: DoctorConfig) -> StageResult:
    """Look at versions and devices; with `deep` also at kernels, and why some are not live.

    Returns what was found as `metrics`. Without `deep` neither torch nor a kernel is loaded.

    >>> sorted(mambactl.doctor().metrics)
    ['devices', 'optional', 'outside', 'packages']
    >>> mambactl.doctor(deep=True).metrics["kernels"][0]
    ('reference (PyTorch)', None)
    """
    return show("doctor", config)


def read_docs(topic: str | None = None, *, man: bool = False) -> StageResult:
    """Read a document that comes with the package, or the page of a command.

    Returns Markdown as `text`, or roff with `man`; without a topic the list of all. Raises
    UsageError for an unknown topic, and ResourceError for `man` without the extra of that name.

    >>> mambactl.read_docs("convert").text.splitlines()[0]
    '# mambactl convert'
    """
    return StageResult(None, text=document(topic, man))
