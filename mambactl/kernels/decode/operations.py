"""Operations of a decode step, as a protocol: a PyTorch reference and Triton kernels provide them.

`kernels.decode.reference` says what each one computes and the shapes of its arguments.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from mambactl.kernels.byte_matrix import Matrix


class AttentionArguments(NamedTuple):
    """Arguments of an attention that runs beside a recurrence, on the same stream.

    q [M, H P] and out [M, H P]; keys and values [B, Hk, S, P]; the others are those of
    `DecodeOps.attention`.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    partial: Tensor
    counter: Tensor
    splits: int
    window: int = 0
    sinks: int = 0
    ring: int = 0

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.q.shape[1] // self.keys.shape[3]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Query heads, KV heads, sinks and ring."""
        return self.heads, self.keys.shape[1], self.sinks, self.ring

    @property
    def rows(self) -> int:
        """Rows (H + 2 Hk) P of its queries, keys and values in a projection."""
        return (self.heads + 2 * self.keys.shape[1]) * self.keys.shape[3]


class DecodeOps(Protocol):
    """One method per operation; every result is written into an argument.

    `on_host`: an operation is done when its method returns, so that a step may ask for a result.
    """

    on_host: bool

    def square_pieces(self, rows: int, width: int) -> int:
        """Columns of `squares` for a pass of that many rows."""
        ...

    def best_pieces(self, rows: int, vocabulary: int) -> int:
        """Columns of `best` for that many rows of the head."""
        ...

    def scratch(
        self, rows: int, batch: int, kv_heads: int, group: int, width: int, splits: int
    ) -> tuple[int, int]:
        """Elements of attention's `partial` and `counter`."""
        ...

    def embed(
        self, tokens: Tensor, table: Tensor, gain: Tensor, hidden: Tensor, scaled: Tensor,
        squares: Tensor, factor: float = 1.0,
    ) -> None:  # fmt: skip
        """Write tokens, times a factor, into the residual stream."""

    def project(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None,
        plain: Tensor, ring: Tensor, start: Tensor, count: Tensor, scale: int, *, T: int,
        offset: int, ring_lo: int, conv: tuple[Tensor, Tensor, Tensor] | None = None,
        rotation: tuple[Tensor, Tensor] | None = None, beside: Sequence[AttentionArguments] = (),
    ) -> None:  # fmt: skip
        """Run the input projection of a recurrent mixer, and of attentions beside it."""

    def project_qkv(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Matrix, bias: Tensor | None,
        cos: Tensor, sin: Tensor, q: Tensor, keys: Tensor, values: Tensor, start: Tensor,
        count: Tensor, scale: int, *, T: int, offset: int, sinks: int = 0, ring: int = 0,
    ) -> None:  # fmt: skip
        """Compute queries, and write keys and values into the cache."""

    def add_residual(
        self, x: Tensor, w: Matrix, bias: Tensor | None, hidden: Tensor, gain: Tensor,
        scaled: Tensor, squares: Tensor, beside: Sequence[tuple[Tensor, Matrix]] = (),
    ) -> None:  # fmt: skip
        """Add an output projection, or the sum of up to three, to the residual stream."""

    def add_normed(
        self, scaled: Tensor, squares: Tensor, eps: float, hidden: Tensor, gain: Tensor | None,
        out_scaled: Tensor, out_squares: Tensor,
    ) -> None:  # fmt: skip
        """Add the norm of another stream to the residual stream."""

    def settle_heads(
        self, parts: Sequence[AttentionArguments], gains: Sequence[tuple[Tensor, Tensor]],
        eps: float, factor: float, rotation: tuple[Tensor, Tensor] | None, start: Tensor,
        count: Tensor, scale: int, *, T: int, offset: int, joint: bool = False,
    ) -> None:  # fmt: skip
        """Norm and rotate the queries and the newest keys of attentions, in place."""

    def swiglu(self, scaled: Tensor, squares: Tensor, eps: float, w: Matrix, out: Tensor) -> None:
        """Compute the first half of an MLP."""

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, start: Tensor, count: Tensor, scale: int,
        out: Tensor, partial: Tensor | None, counter: Tensor | None, *, T: int, offset: int = 0,
        splits: int, window: int = 0, sinks: int = 0, ring: int = 0,
    ) -> None:  # fmt: skip
        """Attend to the cache."""

    def rotate(
        self, mixed: Tensor, cos: Tensor, sin: Tensor, start: Tensor, count: Tensor, scale: int, *,
        T: int, offset: int, groups: int,
    ) -> None:  # fmt: skip
        """Rotate B and C by their positions."""

    def mamba2(
        self, ring: Tensor, mixed: Tensor, z: Tensor, state: Tensor, A: Tensor, D: Tensor,
        dt_bias: Tensor, gain: Tensor | None, eps: float, out: Tensor, start: Tensor,
        count: Tensor, base: Tensor, base_next: Tensor, scale: int, *, T: int, offset: int,
        x_heads: int, b_groups: int, c_groups: int, beside: Sequence[AttentionArguments] = (),
    ) -> None:  # fmt: skip
        """Run the recurrence of Mamba-2, and attentions beside it."""

    def grouped_norm(self, y: Tensor, gain: Tensor, eps: float, groups: int) -> None:
        """RMS-normalise within groups, in place."""

    def mamba1_low(
        self, mixed: Tensor, w: Tensor, low: Tensor, start: Tensor, count: Tensor, scale: int, *,
        T: int, offset: int,
    ) -> None:  # fmt: skip
        """Run x_proj of native Mamba-1."""

    def mamba1(
        self, ring: Tensor, mixed: Tensor | None, low: Tensor | None, z: Tensor, state: Tensor,
        conv_weight: Tensor, conv_bias: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor,
        D: Tensor, out: Tensor, start: Tensor, count: Tensor, base: Tensor, base_next: Tensor,
        scale: int, *, T: int, offset: int, piece: int, repeat: int,
    ) -> None:  # fmt: skip
        """Run the recurrence of Mamba-1."""

    def head_best(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Tensor, best: Tensor, index: Tensor
    ) -> None:
        """Find the best token of every piece of the vocabulary."""

    def head_logits(
        self, scaled: Tensor, squares: Tensor, eps: float, w: Tensor, logits: Tensor
    ) -> None:
        """Compute all logits."""

    def pick(self, best: Tensor, best_index: Tensor, tokens: Tensor) -> None:
        """Choose the best token of every row."""

    def draft_ngram(
        self, history: Tensor, lengths: Tensor, drafts: Tensor, width: int, n_drafted: Tensor,
        *, longest: int = 3,
    ) -> None:  # fmt: skip
        """Draft from earlier occurrences in the text."""

    def filter_rows(
        self, logits: Tensor, settings: Tensor, threshold: Tensor, log_mass: Tensor
    ) -> None:
        """Find what top-k and top-p keep of every row."""

    def draw_rows(
        self, logits: Tensor, settings: Tensor, threshold: Tensor, log_mass: Tensor, keys: Tensor,
        positions: Tensor, seed: Tensor, stream: int, tokens: Tensor, *, offset: int = 0,
    ) -> None:  # fmt: skip
        """Draw one token per row."""

    def verdict_greedy(
        self, best: Tensor, drafts: Tensor, lengths: Tensor | None, accepted: Tensor,
        following: Tensor,
    ) -> None:  # fmt: skip
        """Accept drafts that are the target's best tokens."""

    def verdict_sampled(
        self, logits: Tensor, settings: Tensor, threshold: Tensor, log_mass: Tensor,
        draft_logits: Tensor | None, draft_threshold: Tensor | None,
        draft_log_mass: Tensor | None, drafts: Tensor, lengths: Tensor | None, keys: Tensor,
        positions: Tensor, seed: Tensor, accepted: Tensor, following: Tensor,
    ) -> None:  # fmt: skip
        """Accept drafts so that the target's distribution is kept."""

    def commit(
        self, progress: Tensor, feed: Tensor, history: Tensor, accepted: Tensor,
        following: Tensor, drafted: Tensor | None, eos: Tensor, mailbox: Tensor, k: int, *,
        span: int, limit: int, draft_limit: int,
    ) -> None:  # fmt: skip
        """Move every sequence on and tell the host."""
