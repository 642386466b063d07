"""Settings of mixers: the sizes of their modules, as a configuration holds them."""

from dataclasses import dataclass, replace

from mambactl.present import present


@dataclass(frozen=True)
class WindowSettings:
    """Sizes of the attention beside a recurrence: it sees the last `window` tokens of a document,
    the token itself among them, and its first `sinks` (StreamingLLM, arXiv 2309.17453).
    """

    window: int
    sinks: int = 4


@dataclass(frozen=True)
class Mamba1Settings:
    """Sizes of a Mamba-1 mixer, in one of two forms.

    attention form: rows of in_proj are [z, x (x_dim), B (x_dim), C (d_inner), dt (dt_rank)]; x and
    B are cut in pieces of `repeat_width` channels, each repeated to reach d_inner, and B and C are
    read as groups of d_state channels. native form (state-spaces): rows are [x, z]; dt, B and C
    come from x_proj of the convolved x, with one group.
    """

    d_inner: int
    dt_rank: int
    d_state: int = 16
    x_dim: int | None = None
    repeat_width: int = 16
    native: bool = False
    d_conv: int = 4
    conv_bias: bool = True
    proj_bias: bool = False

    @property
    def in_rows(self) -> tuple[int, ...]:
        """Rows of in_proj in order."""
        if self.native:
            return self.d_inner, self.d_inner
        return self.d_inner, self.pair_dim, self.pair_dim, self.d_inner, self.dt_rank

    @property
    def pair_dim(self) -> int:
        """Channels of x and of B in the attention form, which has no other."""
        return present(self.x_dim)

    @property
    def ring_widths(self) -> tuple[int, ...]:
        """Numbers of one token in a decode pass: projections without the gate; in the native form
        x, x after the convolution, and what x_proj makes of it.
        """
        if self.native:
            return self.d_inner, self.d_inner, self.dt_rank + 2 * self.d_state
        return (sum(self.in_rows) - self.d_inner,)


@dataclass(frozen=True)
class Mamba2Settings:
    """Sizes of a Mamba-2 mixer.

    Rows of in_proj are [z (H P), x (x_heads P), B (b_groups N), C (c_groups N), dt (H)]; x heads
    and B groups are repeated consecutively to H heads after the convolution, which is how
    grouped-query attention maps on it (arXiv 2408.15237). The native form has x_heads = H.
    With `rotary` B and C rotate with the position, by the angles of the model's attention, which
    have as many channels as a state (N = P).
    """

    n_heads: int
    head_dim: int
    d_state: int
    x_heads: int
    b_groups: int
    c_groups: int
    norm_groups: int
    norm_eps: float = 1e-5
    d_conv: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    chunk_size: int = 64
    rotary: bool = False

    @property
    def d_inner(self) -> int:
        """Width of the mixer's output before out_proj."""
        return self.n_heads * self.head_dim

    def with_heads_of(self, other: "Mamba2Settings") -> "Mamba2Settings":
        """Settings of the same form with the heads of another mixer."""
        names = ("n_heads", "x_heads", "b_groups", "c_groups", "norm_groups")
        return replace(self, **{name: getattr(other, name) for name in names})

    @property
    def conv_dim(self) -> int:
        """Channels under the convolution: x, B and C."""
        return self.x_heads * self.head_dim + (self.b_groups + self.c_groups) * self.d_state

    @property
    def ring_widths(self) -> tuple[int, int]:
        """Numbers of one token in a decode pass: projections, and x, B, C after the convolution."""
        return self.conv_dim + self.n_heads, self.conv_dim

    @property
    def in_rows(self) -> tuple[int, int, int, int, int]:
        """Rows of z, x, B, C and dt in in_proj."""
        x, b, c = (
            self.x_heads * self.head_dim,
            self.b_groups * self.d_state,
            self.c_groups * self.d_state,
        )
        return self.d_inner, x, b, c, self.n_heads


@dataclass(frozen=True)
class WindowedSettings:
    """Sizes of Mamba-2 and its window, by the names of their sections in a configuration."""

    mamba2: Mamba2Settings
    mamba2_window: WindowSettings


@dataclass(frozen=True)
class KeptHeads:
    """KV heads of a layer that keep full attention, in ascending order."""

    # of numbers, a tuple in the end: JSON has lists only
    heads: tuple | list

    def __post_init__(self) -> None:
        if {type(head) for head in self.heads} - {int}:
            raise ValueError(f"kept_heads {self.heads!r}: a list of KV heads")
        object.__setattr__(self, "heads", tuple(self.heads))


@dataclass(frozen=True)
class MixedSettings(WindowedSettings):
    """Sizes of Mamba-2, its window and the kept heads, by the names of their sections."""

    kept_heads: KeptHeads
