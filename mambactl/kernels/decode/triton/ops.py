"""The operations of a decode pass on a GPU: picks the kernel by the number of rows."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor, nn

from mambactl.kernels.byte_matrix import Matrix
from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.kernels.decode.triton import (
    decode_attention,
    heads,
    linear,
    linear_many,
    mamba1_step,
    mamba2_beside,
    mamba2_closed,
    mamba2_step,
    ngram,
    rotate,
    tokens,
    verdict,
)
from mambactl.kernels.decode.triton.gemv import SOME_ROWS, Tiles, tiles_for
from mambactl.kernels.launch import INTERPRETED

# rows up to which x_proj takes them one after the other
ONE_BY_ONE = 16
# sequences from which on the closed form of Mamba-2 is faster than walking through the tokens
CLOSED_FORM_FROM = 8


class TritonOps:
    """Decode operations in Triton, with the methods of `kernels.decode.reference.ops.ReferenceOps`.

    `exact` keeps every row bitwise independent of how many rows a pass has (up to 16); without it
    passes of one or two rows, and Mamba-2 layers of many sequences, take faster ways that sum in
    another order.
    """

    on_host = False

    def __init__(
        self, exact: bool = False, device: torch.device | str = "cuda", element_size: int = 2
    ):
        """`element_size`: bytes of a weight, for tiles that fit the device's shared memory."""
        self.exact, self.element_size = exact, element_size
        self.pdl, self.shared_memory = False, 1 << 30
        if not INTERPRETED:
            about = torch.cuda.get_device_properties(device)
            self.pdl = (about.major, about.minor) >= (9, 0)
            self.shared_memory = about.shared_memory_per_block_optin

    @classmethod
    def for_model(cls, model: nn.Module, exact: bool = False) -> "TritonOps":
        """The operations for a model's device and weights."""
        weight = next(model.parameters())
        return cls(exact, weight.device, weight.element_size())

    def _tiles(self, name: str, rows: int) -> Tiles | None:
        """Tiles of the product `name` for so many rows; None where a library computes it."""
        tiles = tiles_for(name, rows, self.exact)
        return tiles and tiles.fitted(self.element_size, self.shared_memory)

    def _tiles_of(self, name: str, rows: int, w: Matrix) -> Tiles | None:
        """Tiles of a product with the weights `w`."""
        tiles = self._tiles(name, rows)
        return tiles and tiles.reading(w)

    def square_pieces(self, rows: int, width: int) -> int:
        """Columns of `squares` for a pass of that many rows."""
        tiles = self._tiles("add_residual", rows)
        return triton.cdiv(width, tiles.columns) if tiles else 1

    def best_pieces(self, rows: int, vocabulary: int) -> int:
        """Columns of `best` for that many rows of the head."""
        tiles = self._tiles("head", rows)
        return triton.cdiv(vocabulary, tiles.columns if tiles else linear_many.BLOCK)

    def scratch(
        self, rows: int, batch: int, kv_heads: int, group: int, width: int, splits: int
    ) -> tuple[int, int]:
        """Elements of attention's `partial` and `counter`."""
        per_head = rows // batch * group
        return (
            *decode_attention.partial_shape(batch, kv_heads, per_head, width, splits),
            *decode_attention.counter_shape(batch, kv_heads, per_head),
        )

    def embed(self, *args: object, **keywords: object) -> None:
        """Write tokens into the residual stream."""
        tokens.embed(*args, **keywords, pdl=self.pdl)

    def add_normed(self, *args: object, **keywords: object) -> None:
        """Add the norm of another stream to the residual stream."""
        tokens.add_normed(*args, **keywords, pdl=self.pdl)

    def settle_heads(self, *args: object, **keywords: object) -> None:
        """Norms and rotation of queries and keys in place."""
        heads.settle_heads(*args, **keywords, pdl=self.pdl)

    def pick(self, *args: object, **keywords: object) -> None:
        """The best token of every row."""
        tokens.pick(*args, **keywords, pdl=self.pdl)

    def project(
        self,
        scaled: Tensor,
        squares: Tensor,
        eps: float,
        w: Matrix,
        *args: object,
        beside: Sequence[AttentionArguments] = (),
        **keywords: object,
    ) -> None:
        """Input projection of a recurrent mixer, and of attentions beside it."""
        tiles = self._tiles_of("project", len(scaled), w)
        widths = [each.keys.shape[3] for each in beside]
        tiles = tiles and tiles.within(*widths)
        self._run("project", tiles, scaled, squares, eps, w, *args, beside=beside, **keywords)

    def project_qkv(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None,
        cos: Tensor, sin: Tensor, q: Tensor, keys: Tensor, values: Tensor, start: Tensor,
        count: Tensor, scale: int, **where: int,
    ) -> None:  # fmt: skip
        """Queries, and keys and values into the cache."""
        rows = len(scaled) if keys.shape[3] % 16 == 0 else SOME_ROWS + 1
        tiles = self._tiles_of("project_qkv", rows, w)
        cache = {"cos": cos, "sin": sin, "q": q, "keys": keys, "values": values}
        self._run(
            "project_qkv", tiles, scaled, squares, eps, w, bias, **cache, start=start, count=count,
            scale=scale, **where,
        )  # fmt: skip

    def add_residual(self, x: Tensor, w: Matrix, *args: object, **keywords: object) -> None:
        """Output projection into the stream, or the sum of up to three."""
        tiles = self._tiles_of("add_residual", len(x), w)
        self._run("add_residual", tiles, x, w, *args, **keywords)

    def swiglu(self, scaled: Tensor, squares: Tensor, eps: float, w: Matrix, out: Tensor) -> None:
        """The first half of an MLP."""
        tiles = self._tiles_of("swiglu", len(scaled), w)
        self._run("swiglu", tiles, scaled, squares, eps, w, out)

    def head_best(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Tensor, best: Tensor, index: Tensor
    ) -> None:
        """Best token of every piece of the vocabulary."""
        found = {"best": best, "best_index": index, "logits": None}
        self._run("head", self._tiles("head", len(scaled)), scaled, squares, eps, w, **found)

    def head_logits(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Tensor, logits: Tensor
    ) -> None:
        """Compute all logits of the head."""
        found = {"best": None, "best_index": None, "logits": logits}
        self._run("head", self._tiles("head", len(scaled)), scaled, squares, eps, w, **found)

    def _run(self, name: str, tiles: Tiles | None, *args: object, **keywords: object) -> None:
        if tiles is None:
            getattr(linear_many, name)(*args, **keywords, pdl=self.pdl)
        else:
            getattr(linear, name)(*args, **keywords, tiles=tiles, pdl=self.pdl)

    def attention(self, *args: object, **keywords: object) -> None:
        """Run the attention of a decode pass."""
        decode_attention.decode_attention(*args, **keywords, pdl=self.pdl)

    def rotate(self, *args: object, **keywords: object) -> None:
        """Rotation of B and C."""
        rotate.rotate(*args, **keywords, pdl=self.pdl)

    def mamba2(
        self,
        ring: Tensor,
        *args: object,
        T: int,
        offset: int,
        beside: Sequence[AttentionArguments] = (),
        **keywords: object,
    ) -> None:
        """Mamba-2 of a segment, and attentions beside it."""
        where = {"T": T, "offset": offset, "pdl": self.pdl}
        closed = (
            not self.exact
            and len(ring) >= CLOSED_FORM_FROM
            and ring.dtype == torch.bfloat16
            and T <= mamba2_closed.MOST_TOKENS
        )
        if beside:
            mamba2_beside.mamba2_beside(
                ring, *args, beside=beside, closed=closed, **keywords, **where
            )
            return
        segment = mamba2_closed.mamba2_closed if closed else mamba2_step.mamba2_segment
        segment(ring, *args, **keywords, **where)

    def grouped_norm(self, *args: object, **keywords: object) -> None:
        """RMSNorm within groups, in place."""
        mamba2_step.grouped_norm(*args, **keywords, pdl=self.pdl)

    def mamba1_low(self, mixed: Tensor, *args: object, T: int, **keywords: object) -> None:
        """x_proj of native Mamba-1."""
        module = mamba1_step if len(mixed) * T <= ONE_BY_ONE else linear_many
        module.mamba1_low(mixed, *args, T=T, **keywords, pdl=self.pdl)

    def mamba1(self, *args: object, **keywords: object) -> None:
        """Mamba-1 of a segment."""
        mamba1_step.mamba1_segment(*args, **keywords, pdl=self.pdl)

    def draft_ngram(self, *args: object, **keywords: object) -> None:
        """Draft from the text itself; see `kernels.decode.reference.ngram.draft_ngram`."""
        ngram.draft_ngram(*args, **keywords, pdl=self.pdl)

    def filter_rows(self, *args: object, **keywords: object) -> None:
        """Find what top-k and top-p keep; see `kernels.decode.reference.verdict.filter_rows`."""
        verdict.filter_rows(*args, **keywords, pdl=self.pdl)

    def draw_rows(self, *args: object, **keywords: object) -> None:
        """Draw one token per row; see `kernels.decode.reference.verdict.draw_rows`."""
        verdict.draw_rows(*args, **keywords, pdl=self.pdl)

    def verdict_greedy(self, *args: object, **keywords: object) -> None:
        """Accept drafts greedily; see `kernels.decode.reference.verdict.verdict_greedy`."""
        verdict.verdict_greedy(*args, **keywords, pdl=self.pdl)

    def verdict_sampled(self, *args: object, **keywords: object) -> None:
        """Accept drafts by sampling; see `kernels.decode.reference.verdict.verdict_sampled`."""
        verdict.verdict_sampled(*args, **keywords, pdl=self.pdl)

    def commit(self, *args: object, **keywords: object) -> None:
        """Commit the accepted tokens; see `kernels.decode.reference.verdict.commit`."""
        verdict.commit(*args, **keywords, pdl=self.pdl)
