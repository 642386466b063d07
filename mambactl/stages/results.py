"""Measurements kept beside the checkpoint they are about."""

import json
import os
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mambactl import __version__, console
from mambactl.checkpoint.resolve import cache_dir
from mambactl.recipe import StageConfig

LONGEST_NAME = 120


def machine(device: torch.device) -> dict[str, Any]:
    """What a speed was measured on, with what, and when."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "versions": {"torch": torch.__version__, "triton": triton, "mambactl": __version__},
        "date": datetime.now(UTC).date().isoformat(),
    }


def save_results(
    stage: str, source: str, name: str, config: StageConfig, metrics: dict[str, Any]
) -> Path | None:
    """Write `results/<stage>-<name>.json` into a checkpoint folder of the user's own.

    Nothing is written (None) for a single file, for a model given by name, and into a cache. A
    folder that cannot be written to is a warning: the numbers have been printed.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() or _is_cache(folder):
        return None
    label = re.sub(r"[^\w.+-]+", "-", f"{stage}-{name}").strip("-")[:LONGEST_NAME]
    path = folder / "results" / f"{label}.json"
    content = {
        "stage": stage,
        "checkpoint": source,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "config": config.model_dump(mode="json"),
        "metrics": metrics,
    }
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, path)
    except OSError as error:
        console.warn(f"results are not kept: {path} cannot be written ({error.strerror})")
        return None
    console.log(f"kept in {path}")
    return path


def _is_cache(folder: Path) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (cache_dir().resolve(), Path(HF_HUB_CACHE).resolve())
    return any(folder.resolve().is_relative_to(cache) for cache in caches)
