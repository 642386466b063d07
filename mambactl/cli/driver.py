"""Start of a GPU's driver in a thread, while imports keep Python busy."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

from mambactl.options import StageConfig
from mambactl.ranks import launched

DRIVER = "libcuda.so.1"


def wanted(config: StageConfig) -> bool:
    """True if a command computes in this process, on the first GPU if there is one."""
    alone = config.decodes and not launched()
    return alone and config.device in ("auto", "cuda") and _built_for_gpus()


@contextmanager
def starting(here: bool) -> Iterator[None]:
    """Start the driver while the block runs; behind it, the driver has started or will not."""
    if not here:
        yield
        return
    # as torch would set it, too late: kernels are loaded when they are first used
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    thread = Thread(target=_start, name="driver", daemon=True)
    thread.start()
    yield
    # a process forked later has no copy of what the thread may hold
    thread.join()


def _start() -> None:
    """Make the context in which torch computes; what fails here fails again there, with a reason.

    Calls by ctypes leave Python to other threads, those of torch do not: CUDA Driver API, section
    Primary Context Management.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    # other numbers than 0 are errors
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _built_for_gpus() -> bool:
    """True if the torch that is installed computes on NVIDIA's GPUs; it is not loaded."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return False
    return (Path(found.origin).parent / "lib" / "libtorch_cuda.so").exists()
