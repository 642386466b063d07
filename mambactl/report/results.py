"""Measurements kept beside the checkpoint they are about, with how they were made."""

import errno
import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import torch

from mambactl import console, invocation
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.provenance import header_digest
from mambactl.checkpoint.resolve import resolve
from mambactl.errors import ModelError
from mambactl.files import CARD, RESULTS, SINGLE_FILE_SUFFIXES, cache_dir, replacing
from mambactl.json_values import JsonObject
from mambactl.options import StageConfig
from mambactl.ranks import placement
from mambactl.report.card_results import update_card
from mambactl.requirements import installed
from mambactl.version import __version__

LONGEST_NAME = 120


def machine(device: torch.device) -> JsonObject:
    """Device, versions and date of a speed measurement."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "versions": {
            "torch": torch.__version__,
            "triton": installed("triton"),
            "mambactl": __version__,
        },
        "date": datetime.now(UTC).date().isoformat(),
    }


def save_results(
    stage: str, source: str, name: str, config: StageConfig, metrics: JsonObject
) -> Path | None:
    """Write `results/<stage>-<name>.json` into a checkpoint folder of the user's own, or into
    `FILE.results/` beside a single file, and the results of `eval` into the folder's card.

    Nothing is written (None) for a model given by name, and into a cache. A place that cannot be
    written to is a warning: the numbers have been printed.
    """
    folder = _beside(Path(source).expanduser())
    if folder is None:
        return None
    path = folder / file_name(stage, name)
    try:
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "its folder is a symbolic link")
        folder.mkdir(exist_ok=True)
        write_results(path, stage, source, config, metrics)
        if config.on_card:
            with console.failure_warned(folder.parent / CARD):
                update_card(folder.parent)
    except OSError as error:
        console.warn(f"results are not kept: {path} cannot be written ({error.strerror})")
        return None
    console.log(f"kept in {path}")
    return path


def file_name(stage: str, name: str) -> str:
    """The file for what a stage measured; a name that is cut ends in a digest of the whole."""
    label = re.sub(r"[^\w.+-]+", "-", f"{stage}-{name}").strip("-")
    if len(label) > LONGEST_NAME:
        digest = hashlib.sha256(label.encode()).hexdigest()[:8]
        label = f"{label[: LONGEST_NAME - len(digest) - 1]}-{digest}"
    return f"{label}.json"


def write_results(
    path: Path, stage: str, source: str | None, config: StageConfig, metrics: JsonObject
) -> None:
    """Write one measurement: the numbers, the command, the machine, versions, and the model."""
    device, _ = placement(config)
    content = {
        "stage": stage,
        "checkpoint": source,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "command": invocation.words(),
        **machine(device),
        "model": None if source is None else _about(source),
        "config": config.model_dump(mode="json"),
        "metrics": metrics,
    }
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _about(source: str) -> JsonObject:
    """Identity of the measured model and its cache, from headers."""
    digest = {"digest": header_digest(resolve(source).path)}
    try:
        found = describe(source)
    except ModelError:
        # one that runs code of its own has a layout of its own
        return digest
    return digest | {key: found[key] for key in ("parameters", "bytes", "cache")}


def _beside(checkpoint: Path) -> Path | None:
    """Folder for the results of a checkpoint."""
    if not checkpoint.exists() or _is_cache(checkpoint):
        return None
    if checkpoint.is_dir():
        return checkpoint / RESULTS
    if checkpoint.suffix in SINGLE_FILE_SUFFIXES:
        return checkpoint.with_name(f"{checkpoint.name}.{RESULTS}")
    return None


def _is_cache(path: Path) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (cache_dir().resolve(), Path(HF_HUB_CACHE).resolve())
    return any(path.resolve().is_relative_to(cache) for cache in caches)
