"""`push`: a checkpoint to the hub, private unless it is to be public, with a card that says all.

A folder is sent as it lies, a single file as the folder it stands for.
"""

from pathlib import Path

from mambactl import console
from mambactl.checkpoint.hub_files import PublicFiles, public_files
from mambactl.checkpoint.hub_refusals import url_of
from mambactl.checkpoint.hub_upload import (
    Content,
    inherited_from,
    require_hub,
    require_name,
    upload,
)
from mambactl.checkpoint.resolve import resolve
from mambactl.files import CARD
from mambactl.options.pushing import PushConfig
from mambactl.report.hub_card import hub_card
from mambactl.stage_result import StageResult


def run(config: PushConfig, source: str) -> StageResult:
    """List the files, then send those that the repository does not hold yet."""
    require_name(config.repo)
    if not config.dry_run:
        require_hub()
    found = resolve(source)
    with public_files(found, config.repo) as files:
        contents = _contents(files, config, found.path)
        _list(config, contents)
        metrics = {
            "url": url_of(config.repo),
            "public": config.public,
            "files": {name: _size(content) for name, content in contents.items()},
        }
        if config.dry_run:
            console.log("a dry run: nothing is sent")
            return StageResult(None, metrics, metrics["url"])
        message = f"Upload of {files.lineage['stage']} by mambactl"
        sent = upload(config.repo, contents, config.public, message)
    if not sent.files and not sent.removed:
        console.log(f"{config.repo} holds all of it already: nothing is sent")
    metrics |= {"sent": list(sent.files), "removed": list(sent.removed), "bytes": sent.size}
    return StageResult(None, metrics, metrics["url"])


def _contents(files: PublicFiles, config: PushConfig, checkpoint: Path) -> dict[str, Content]:
    """All that is to be on the hub, by name; a dry run asks nobody for the licence of the base."""
    base = None if config.dry_run else files.base
    name = config.repo.partition("/")[2]
    card = hub_card(files, name, checkpoint, inherited_from(base))
    return {**files.texts, CARD: card.encode(), **files.weights}


def _list(config: PushConfig, contents: dict[str, Content]) -> None:
    sizes = {name: _size(content) for name, content in contents.items()}
    rows = [(name, f"{size:,}") for name, size in sorted(sizes.items())]
    rows.append((f"{len(sizes)} files", f"{sum(sizes.values()):,}"))
    kind = "public" if config.public else "private"
    console.table(f"{config.repo} ({kind})", ("file", "bytes"), rows)


def _size(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)
