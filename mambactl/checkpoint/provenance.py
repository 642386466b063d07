"""Provenance of a checkpoint: its stage, ancestors, options and library versions."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from mambactl.checkpoint.ownership import (
    inputs_of,
    own_lineage,
    require_apart,
    require_replaceable,
)
from mambactl.checkpoint.publishing import WorkFolder, settle
from mambactl.commands import Command
from mambactl.errors import ModelError, OutputError
from mambactl.files import CONFIG, GGUF_SUFFIX, LINEAGE, SINGLE_FILE_SUFFIXES, side_file
from mambactl.foreign import AGAIN, reason
from mambactl.json_values import AnyObject, JsonObject
from mambactl.lineage import stage_record
from mambactl.options import StageConfig
from mambactl.ranks import is_main

_HEAD_BYTES = 1 << 20
_SAMPLE_BYTES, _SAMPLES = 1 << 16, 64
# in the record of a synthetic model, which has no parent: the name of its shape
SHAPE = "shape"
_OTHERWISE = "--force replaces it, -o writes elsewhere"


def lineage(
    stage: str,
    parent: AnyObject | None,
    parent_path: str | Path | None,
    teacher: str | None,
    options: AnyObject,
    seed: int,
    metrics: AnyObject,
    content: Path | None = None,
) -> JsonObject:
    """The content of mambactl.json; `parent` is the lineage of the checkpoint at `parent_path`.

    `source` is the model the chain started from, `ancestors` the stages since, oldest first.
    `content` is where the parent lies on this disk, for one that is known by a name.
    """
    path = None if parent_path is None else str(parent_path)
    link = {"path": path, "sha256": header_digest(content) if content else _digest_if_local(path)}
    return stage_record(stage, parent, link, teacher, options, seed, metrics)


def header_digest(path: Path) -> str:
    """sha256 over the config and, of every weight file, size, header and samples of the tensors.

    The header of a safetensors file lists names, types and shapes; of others the first MiB counts.
    At most 4 MiB of samples per file, evenly spread and with both ends: files up to that size count
    whole, and training or merging changes far more than lies between two samples.
    """
    digest = hashlib.sha256()
    for file in _identifying_files(path):
        try:
            _digest_file(digest, file)
        except OSError as error:
            raise ModelError(f"{file} cannot be read ({reason(error)})", AGAIN) from error
    return digest.hexdigest()


def _digest_file(digest: "hashlib._Hash", file: Path) -> None:
    total = file.stat().st_size
    digest.update(f"{file.name} {total} ".encode())
    with file.open("rb") as content:
        size = _HEAD_BYTES
        if file.suffix in SINGLE_FILE_SUFFIXES:
            size = min(int.from_bytes(content.read(8), "little"), 100 * _HEAD_BYTES)
        digest.update(content.read(size))
        start, last = content.tell(), max(content.tell(), total - _SAMPLE_BYTES)
        spread = min(_SAMPLES - 1, -(-(last - start) // _SAMPLE_BYTES))
        for index in range(spread + 1):
            content.seek(start + (last - start) * index // max(1, spread))
            digest.update(content.read(_SAMPLE_BYTES))


def _identifying_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    weights = [*path.glob("*.safetensors"), *path.glob("*.bin")]
    files = [*path.glob(CONFIG), *path.glob(LINEAGE), *weights]
    # a pipe or device of such a name would be read for ever
    return sorted(file for file in files if os.path.isfile(file))


def _digest_if_local(path: str | None) -> str | None:
    return header_digest(Path(path)) if path and Path(path).exists() else None


def made_before(
    out: Path,
    command: Command,
    config: StageConfig,
    source: str,
    *,
    resume: bool,
    force: bool,
    others: Iterable[tuple[str, str]] = (),
    dry_run: bool = False,
) -> JsonObject | None:
    """The lineage of `out` if it is what this command would make; None where it is to be made.

    First what a stopped command left is finished, and with `resume` a result that is complete but
    was not published yet is published; a `dry_run` does neither. Raises OutputError for an output
    that is there without `resume`, or was made differently, or that holds an input: MODEL, what
    options name, or one of `others`, each given by its option and text.
    """
    models = [("MODEL", source)] if command.reads_model else []
    require_apart(out, [*models, *inputs_of(config), *others])
    writes = is_main() and not dry_run
    if writes:
        settle(out)
    work = WorkFolder(out, {})
    if dry_run:
        _require_usable(work, resume, force)
    if force:
        return None
    complete = resume and work.complete
    if not complete and (not os.path.lexists(work.out) or (resume and work.goes_on)):
        return None
    if not resume:
        hint = "--resume accepts it as done, --force replaces it, -o writes elsewhere"
        raise OutputError(f"{out} exists", hint)
    where = work.path if complete else out
    found = _made(work, command) if complete else _lineage_of(out, command)
    if changed := _changes(found or {}, command, config, source):
        message = f"{where} was made differently: {'; '.join(changed)}"
        raise OutputError(message, _OTHERWISE)
    if complete and writes:
        with work.held():
            # nobody else did so meanwhile
            if work.complete:
                work.publish()
    return found


def _require_usable(work: WorkFolder, resume: bool, force: bool) -> None:
    """Raise OutputError for what the command itself would not replace, or not go on from."""
    work.require_free()
    if force:
        require_replaceable(work.out, force)
    elif not resume:
        work.refuse_begun()


def _changes(found: AnyObject, command: Command, config: StageConfig, source: str) -> list[str]:
    """Differences between what was made and what the command would make now."""
    from mambactl.checkpoint.resolve import resolve
    from mambactl.checkpoint.run_folder import differences
    from mambactl.checkpoint.vocabulary import model_config

    # a lineage may have been written by anybody
    options, parent = (
        value if isinstance(value, dict) else {}
        for value in (found.get("recipe"), found.get("parent"))
    )
    recorded = config.recorded(options)
    made = {
        "stage": found.get("stage"),
        "parent": parent.get("sha256"),
        **{key: value for key, value in recorded.items() if key not in config.placement_options},
    }
    completed = config.completed(source, model_config)
    asked = {
        "stage": command.name,
        "parent": header_digest(resolve(source).path) if command.reads_model else None,
        **({} if command.reads_model else {SHAPE: source}),
        **completed.model_dump(mode="json", exclude=set(config.placement_options)),
    }
    defaults = type(config).model_fields.keys() - config.model_fields_set
    return differences(made, asked, defaults=defaults)


def _is_beside(command: Command, out: Path) -> bool:
    """True if the lineage of what a command writes lies beside it."""
    return command.writes == "rows" or out.suffix == GGUF_SUFFIX


def _made(work: WorkFolder, command: Command) -> JsonObject | None:
    """The lineage of a result that is complete but not published."""
    from mambactl.checkpoint.safetensors_reader import read_lineage

    if _is_beside(command, work.out):
        return own_lineage(work.path / LINEAGE)
    return read_lineage(work.result)


def _lineage_of(out: Path, command: Command) -> JsonObject | None:
    from mambactl.checkpoint.load import load_lineage

    if _is_beside(command, out):
        return own_lineage(side_file(out, LINEAGE))
    try:
        return load_lineage(str(out))
    except ModelError as error:
        raise OutputError(f"{out} is not what this command makes: {error}", _OTHERWISE) from error
