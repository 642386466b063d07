"""`mambactl doctor`: versions and devices at once; with `--deep` what torch and kernels say.

Without it nothing heavy is loaded: packages describe themselves, and the driver names its GPUs.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mambactl.errors import UsageError
from mambactl.kernels.switch import FORCED, SWITCH, switch
from mambactl.options.reading import DoctorConfig
from mambactl.ranks import NO_MPS
from mambactl.requirements import EXTRAS, installed, outside
from mambactl.stage_result import StageResult, Table
from mambactl.version import __version__

# of the base install, those whose versions matter most
PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "safetensors", "typer")


class Optional(NamedTuple):
    """Purpose of an optional package, and the command that installs it."""

    purpose: str
    line: str


OPTIONAL = {
    **{extra.package: Optional(extra.purpose, extra.line) for extra in EXTRAS},
    # comes with a torch that is built for CUDA
    "triton": Optional("kernels on a GPU", "pip install triton"),
}
# seconds in which the driver has to answer
PATIENCE = 0.7
QUERY = ("index", "name", "memory.total", "compute_cap", "driver_version")
_MIB_PER_GIB = 1024


def run(options: DoctorConfig) -> StageResult:
    """Look at the machine and the packages, and with `deep` at the kernels."""
    wrong = {each.package: f"needs {each.needed}: {each.line}" for each in outside()}
    packages = {"mambactl": __version__}
    packages |= {name: installed(name) or "missing" for name in (*PACKAGES, *wrong)}
    optional = {name: installed(name) for name in OPTIONAL}
    devices = _devices_of_torch() if options.deep else _devices_of_driver()
    found = {"packages": packages, "outside": wrong, "optional": optional, "devices": devices}
    about = [("python", sys.version.split()[0]), ("platform", platform.platform())]
    about += [
        (name, f"{number}, {wrong[name]}" if name in wrong else number)
        for name, number in packages.items()
    ]
    about += [*devices.items(), *_switches(), *_bytecode()]
    extras = [(name, *_state(name, found)) for name, found in optional.items()]
    blocks: list[str | Table] = [Table("machine", ("what", "value"), about)]
    if options.deep:
        found["kernels"] = kernels = _kernels()
        live = [(name, "live" if reason is None else f"off: {reason}") for name, reason in kernels]
        blocks.append(Table("kernels", ("backend", "state"), live))
    blocks.append(Table("optional packages", ("package", "version", "for"), extras))
    if not options.deep:
        blocks.append("mambactl doctor --deep loads torch and says which kernels are live")
    return StageResult(None, found, blocks=tuple(blocks))


def _switches() -> list[tuple[str, str]]:
    """MAMBACTL_KERNELS where it is set, and what it does here."""
    try:
        value = switch()
    except UsageError as error:
        return [(SWITCH, f"{error}: {error.hint}")]
    needs_gpu = "; on a CPU it changes nothing" if value == FORCED else ""
    return [(SWITCH, value + needs_gpu)] if value else []


def _bytecode() -> list[tuple[str, str]]:
    """Cost and cure where Python may not keep what it compiles of imported packages."""
    if not sys.dont_write_bytecode:
        return []
    cure = "unset PYTHONDONTWRITEBYTECODE, and set PYTHONPYCACHEPREFIX if packages are read-only"
    return [("bytecode", f"not kept, so every command starts seconds later: {cure}")]


def _state(name: str, found: str | None) -> tuple[str, str]:
    about = OPTIONAL[name]
    return (found, about.purpose) if found else ("missing", f"{about.purpose}: {about.line}")


def _devices_of_driver() -> dict[str, str]:
    """Cores of this process, and the GPUs that nvidia-smi names within `PATIENCE`."""
    # only some systems bind a process to cores
    bound = getattr(os, "sched_getaffinity", None)
    cores = len(bound(0)) if bound else os.cpu_count()
    return {"cpu cores": str(cores), **driver_devices()}


def driver_devices(command: Sequence[str] = ("nvidia-smi",)) -> Mapping[str, str]:
    """GPUs that nvidia-smi lists, or the reason why there is no list."""
    if shutil.which(command[0]) is None:
        return {"gpu": "no nvidia-smi here"}
    asked = [*command, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            asked, capture_output=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return {"gpu": f"nvidia-smi did not answer in {PATIENCE} s"}
    except OSError as error:
        return {"gpu": f"nvidia-smi does not start ({error.strerror})"}
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    if done.returncode or any(len(row) != len(QUERY) for row in rows):
        return {"gpu": f"nvidia-smi: {lines[0] if lines else f'exit code {done.returncode}'}"}
    return {
        f"gpu:{index}": f"{name}, {_gib(memory)}, compute capability {capability}, driver {driver}"
        for index, name, memory, capability, driver in rows
    } or {"gpu": "none"}


def _gib(mib: str) -> str:
    return f"{int(mib) / _MIB_PER_GIB:.0f} GiB" if mib.isdecimal() else f"{mib} MiB"


def _devices_of_torch() -> dict[str, str]:
    import torch

    found = {"cpu threads": str(torch.get_num_threads())}
    if torch.backends.mps.is_available():
        found["mps"] = f"not used: {NO_MPS}"
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
    import torch

    from mambactl.decode.backend import why_not
    from mambactl.kernels.dispatch import backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [("reference (PyTorch)", None)]
    found += [(f"prefill, training: {name}", why) for name, why in backends(device).items()]
    return [*found, ("decode: triton, CUDA graphs", why_not(device))]
