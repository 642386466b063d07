"""Kernels that are compiled together: none runs, all are ready; without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def add(x, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x + at, tl.load(x + at) + 1)
"""
CODE = """
import threading
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor
from kernel import add
from mambactl.kernels.compiling import compiled_together

class Absent:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Absent())
x, failed = MockTensor(tl.float32), []

def elsewhere():
    try:
        add[1,](x, 64)
    except Exception:
        failed.append(True)

with compiled_together():
    for size in (8, 16, 32):
        add[1,](x, size)
    # another thread launches its kernels, for which there is no device here
    other = threading.Thread(target=elsewhere)
    other.start()
    other.join()
kernels = add.device_caches[0][0].values()
print(sum(type(each).__name__ == "CompiledKernel" for each in kernels), len(failed))
try:
    add[1,](x, 8)
except Exception:
    print("launched")
"""


@pytest.mark.skipif(not hasattr(triton, "AsyncCompileMode"), reason="an earlier Triton")
def test_kernels_are_compiled_and_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    (tmp_path / "kernel.py").write_text(KERNEL)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["3", "1", "launched"], ["4", "1", "launched"])
