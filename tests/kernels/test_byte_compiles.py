"""Kernels that read weights of 8 bits compile for an H100 and an H200, without a GPU.

The interpreter runs other instructions than the inline assembly that a GPU gets.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CODE = """
import re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mambactl.kernels.decode.triton import linear
from mambactl.kernels.decode.triton.gemv import tiles_for
from mambactl.kernels.sequence import byte_matrix

def build(kernel, types, constants, warps, stages):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    at = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in types if types[n][0] == "*"}
    made = ASTSource(fn=kernel, signature=signature, constexprs=at, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return compile(made, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

weights, rows = sys.argv[1], int(sys.argv[2])
w, half = {"fp8": "*u8", "int8": "*i8"}[weights], "*bf16"
if rows > 16:
    types = {"x": "*fp16", "factor": "*fp32", "w": w, "scale": "*fp32", "before": half, "y": half,
             "M": "i32", "N": "i32"}
    tiles = byte_matrix.tiles_of(rows)
    constants = {"K": 512, "ADD": True, "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth}
    ptx = build(byte_matrix._product_kernel, types, constants, 4, tiles.stages)
else:
    tiles = tiles_for("add_residual", rows)
    types = {name: half for name in ("x", "x1", "x2", "bias", "hidden", "gain", "scaled")}
    types |= {name: w for name in ("w", "w1", "w2")}
    types |= {name: "*fp32" for name in ("s", "s1", "s2", "squares")} | {"M": "i32", "N": "i32"}
    constants = {"K": 4096, "K1": 512, "K2": 0, "BIAS": True, "BM": tiles.rows, "PDL": True,
                 "BN": tiles.columns, "DEPTH": tiles.depth, "SLICES": tiles.slices}
    ptx = build(linear._residual_kernel, types, constants, tiles.warps, tiles.stages)
seen = r"cvt\\.rn\\.f16x2\\.e4m3x2|prmt\\.b32 \\w+, biased|mma\\.sync|wgmma"
print(*sorted(set(re.findall(seen, ptx))))
"""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("weights", ["fp8", "int8"])
@pytest.mark.parametrize(("rows", "product"), [(1, None), (8, "mma.sync"), (100, "wgmma")])
def test_weights_go_from_bytes_to_registers(weights, rows, product, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = [sys.executable, "-c", CODE, weights, str(rows)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert ("cvt.rn.f16x2.e4m3x2" in done.stdout) == (weights == "fp8")
    assert ("biased" in done.stdout) == (weights == "int8")
    assert product is None or product in done.stdout
