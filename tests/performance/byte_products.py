"""Time and error of the products of an MLP, in bf16 and with weights of 8 bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambactl import console
from mambactl.errors import CheckError
from mambactl.kernels.byte_matrix import Kind, Matrix, quantise
from mambactl.kernels.decode.operations import DecodeOps
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.kernels.decode.triton.ops import TritonOps
from mambactl.metrics import tenths, tight_percent
from mambactl.speed.limits import Numbers
from mambactl.speed.shapes import SHAPES, STD
from tests.performance.graphs import capture, median_seconds

DISTINCT_BYTES = 240e6
EPS = 1e-5
# of the largest value of an output that is rounded to bf16
MOST_ERROR = 2**-6


class _Case:
    """One product with several weights, its inputs and room for its results."""

    def __init__(
        self, name: str, rows: int, weights: Sequence[Matrix], ops: DecodeOps, device: torch.device
    ):
        self.name, self.weights, self.ops = name, weights, ops
        N, K = weights[0].shape
        g = torch.Generator(device).manual_seed(rows)

        def draw(width: int) -> Tensor:
            values = torch.randn(rows, width, generator=g, device=device)
            return values.to(torch.bfloat16)

        width = K if name == "swiglu" else N
        self.x, self.hidden, self.gain = draw(K), draw(width), draw(width)[0].abs()
        self.squares = self.hidden.float().square().sum(1, keepdim=True)
        self.out = draw(N // 2)
        pieces = ops.square_pieces(rows, width)
        self.written = torch.zeros(rows, pieces, device=device)

    def run(self, weight: Matrix, ops: DecodeOps | None = None) -> Tensor:
        """One product; the results of an output projection without the stream it is added to."""
        ops = ops or self.ops
        if self.name == "swiglu":
            ops.swiglu(self.x, self.squares, EPS, weight, self.out)
            return self.out.clone()
        stream = torch.zeros_like(self.hidden)
        squares = self.written if ops is self.ops else torch.zeros_like(self.written)
        ops.add_residual(self.x, weight, None, stream, self.gain, self.hidden, squares)
        return stream

    def all(self) -> None:
        """Every weight once, as a graph has it."""
        for weight in self.weights:
            if self.name == "swiglu":
                self.ops.swiglu(self.x, self.squares, EPS, weight, self.out)
            else:
                self.ops.add_residual(
                    self.x, weight, None, self.hidden, self.gain, self.hidden, self.written
                )

    def error(self) -> float:
        """Largest difference to the reference in fp32, over its largest value."""
        expected = self.run(self.weights[0], ReferenceOps()).double()
        return (
            (self.run(self.weights[0]).double() - expected).abs().max() / expected.abs().max()
        ).item()


def products(
    name: str, rows: Sequence[int], bandwidth: float, weights: Kind, device: torch.device
) -> list[Numbers]:
    """Microseconds of both halves of an MLP, and their share of what bandwidth allows.

    Raises CheckError for a wrong result.
    """
    config = SHAPES[name]()
    if not config.has_mlp:
        return []
    width, inner = config.hidden_size, config.intermediate_size
    ops, found = TritonOps(device=device), []
    for product, shape in (("swiglu", (2 * inner, width)), ("add_residual", (width, inner))):
        count = max(1, round(DISTINCT_BYTES / shape[0] / shape[1]))
        dense = [_weight(shape, seed, device) for seed in range(count)]
        stored = [quantise(weight, weights) for weight in dense]
        for M in rows:
            cases = [_Case(product, M, each, ops, device) for each in (dense, stored)]
            seconds = median_seconds([capture(case.all) for case in cases])
            floor = shape[0] * shape[1] / bandwidth
            found.append(
                {
                    "model": name,
                    "product": product,
                    "shape": list(shape),
                    "rows": M,
                    "bf16_us": 1e6 * seconds[0] / count,
                    "bytes_us": 1e6 * seconds[1] / count,
                    "bytes_share": floor * count / seconds[1],
                    "bytes_error": cases[1].error(),
                }
            )
    show(name, found)
    wrong = [each for each in found if not each["bytes_error"] <= MOST_ERROR]
    if wrong:
        worst = max(wrong, key=lambda each: each["bytes_error"])
        where = f"{worst['product']} of {worst['rows']} rows"
        raise CheckError(f"{where} is off by {worst['bytes_error']:.1e} of its largest value")
    return found


def _weight(shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return (STD * torch.randn(shape, generator=g, device=device)).to(torch.bfloat16)


def show(name: str, found: Sequence[Numbers]) -> None:
    """Print a table of products."""
    rows = [
        (
            f"{each['product']} {each['shape'][0]:,} x {each['shape'][1]:,}",
            each["rows"],
            tenths(each["bf16_us"]),
            tenths(each["bytes_us"]),
            tight_percent(each["bytes_share"]),
            f"{each['bytes_error']:.1e}",
        )
        for each in found
    ]
    columns = ("", "rows", "bf16 us", "8 bits us", "of the byte limit", "error")
    console.table(f"products of {name}", columns, rows)
