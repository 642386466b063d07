"""`mambactl doctor`: versions, devices, live kernels, and the line that adds the missing ones."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from mambactl.decode.backend import why_not
from mambactl.kernels.dispatch import backends
from mambactl.options.reading import DoctorConfig
from mambactl.stage_result import StageResult, Table
from mambactl.version import __version__

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "safetensors", "typer")
OPTIONAL = {
    "peft": ("sft --lora", 'pip install "mambactl[lora]"'),
    "lm-eval": ("eval --tasks with harness names", 'pip install "mambactl[eval]"'),
    "matplotlib": (
        "plot, and the picture beside a distilled model",
        'pip install "mambactl[plots]"',
    ),
}


def run(options: DoctorConfig) -> StageResult:
    """Look at the machine, the kernels and the packages."""
    devices, kernels = _devices(), _kernels()
    packages = {"mambactl": __version__}
    packages |= {name: _version(name) or "missing" for name in PACKAGES}
    optional = {name: _version(name) for name in OPTIONAL}
    about = [("python", sys.version.split()[0]), ("platform", platform.platform())]
    about += [*packages.items(), *devices.items()]
    extras = [(name, *_state(name, found)) for name, found in optional.items()]
    live = [(name, "live" if reason is None else f"off: {reason}") for name, reason in kernels]
    found = {"packages": packages, "optional": optional, "devices": devices, "kernels": kernels}
    return StageResult(
        None,
        found,
        blocks=(
            Table("machine", ("what", "value"), about),
            Table("kernels", ("backend", "state"), live),
            Table("optional packages", ("package", "version", "for"), extras),
        ),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _state(name: str, found: str | None) -> tuple[str, str]:
    purpose, line = OPTIONAL[name]
    return (found, purpose) if found else ("missing", f"{purpose}: {line}")


def _devices() -> dict[str, str]:
    found = {"cpu threads": str(torch.get_num_threads())}
    if not torch.cuda.is_available():
        return {**found, "cuda": f"not available (torch built for {torch.version.cuda or 'cpu'})"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
        )
    return found


def _kernels() -> list[tuple[str, str | None]]:
    """Implementations with the reason why each is off (None when it is live)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [("reference (PyTorch)", None)]
    found += [(f"prefill, training: {name}", why) for name, why in backends(device).items()]
    return [*found, ("decode: triton, CUDA graphs", why_not(device))]
