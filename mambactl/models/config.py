"""Configuration of a hybrid decoder: a Llama configuration plus one mixer name per layer."""

from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

MIXERS = ("attention", "mamba2", "mamba1", "mamba2_window")
# mixers with keys, and so with rotary positions
ATTENDING = ("attention", "mamba2_window")
# the settings that a mixer reads
MIXER_SETTINGS = {
    "attention": (),
    "mamba2": ("mamba2",),
    "mamba1": ("mamba1",),
    "mamba2_window": ("mamba2", "mamba2_window"),
}


@dataclass(frozen=True)
class Mamba2Settings:
    """Sizes of a Mamba-2 mixer.

    Rows of in_proj are [z (H P), x (x_heads P), B (b_groups N), C (c_groups N), dt (H)]; x heads
    and B groups are repeated consecutively to H heads after the convolution, which is how
    grouped-query attention maps on it (arXiv 2408.15237). The native form has x_heads = H.
    With `rotary` B and C turn with the position, by the angles of the model's attention, which
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

    @property
    def conv_dim(self) -> int:
        """Channels under the convolution: x, B and C."""
        return self.x_heads * self.head_dim + (self.b_groups + self.c_groups) * self.d_state

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
        return self.d_inner, self.x_dim, self.x_dim, self.d_inner, self.dt_rank


@dataclass(frozen=True)
class WindowSettings:
    """What the attention beside a Mamba-2 mixer sees: the last `window` tokens of a document, the
    token itself among them, and its first `sinks` (StreamingLLM, arXiv 2309.17453).
    """

    window: int
    sinks: int = 4


MixerSettings = Mamba2Settings | Mamba1Settings | WindowSettings


@strict
class HybridConfig(LlamaConfig):
    """A decoder whose layer i mixes tokens with `mixers[i]`: attention, mamba2 or mamba1.

    `mamba2_window` is a mamba2 mixer plus attention to a window (`WindowSettings`). All other
    fields are Llama's. With only attention it is a Llama (or, with a sliding window, a Mistral);
    with only mamba mixers and `has_mlp=False` it is a native Mamba.
    """

    model_type = "mambactl_hybrid"

    mixers: list[str] | None = None
    mamba2: dict | None = None
    mamba1: dict | None = None
    mamba2_window: dict | None = None
    sliding_window: int | None = None
    has_mlp: bool = True

    def __post_init__(self, **kwargs: Any):
        if self.mixers is None:
            self.mixers = ["attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        # the model keeps its own per-layer list; the library's must not contradict it
        self.layer_types = None

    def validate_architecture(self) -> None:
        """Check mixers and settings against each other; raises ValueError."""
        if self.mixers is None:
            return
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(
                f"{len(self.mixers)} mixers for {self.num_hidden_layers} layers in the config"
            )
        for name in set(self.mixers):
            if name not in MIXERS:
                raise ValueError(f"unknown mixer {name!r}; known: {', '.join(MIXERS)}")
            for part in MIXER_SETTINGS[name]:
                if getattr(self, part) is None:
                    raise ValueError(f"the config uses {name} layers but has no `{part}` settings")
        if self.rotates and self.mamba2_settings.d_state != self.head_dim:
            raise ValueError(
                f"rotary mamba2 states have {self.mamba2_settings.d_state} channels, the angles of "
                f"this model {self.head_dim}"
            )

    @property
    def mamba2_settings(self) -> Mamba2Settings:
        """Typed view of `mamba2`."""
        return Mamba2Settings(**self.mamba2)

    @property
    def mamba1_settings(self) -> Mamba1Settings:
        """Typed view of `mamba1`."""
        return Mamba1Settings(**self.mamba1)

    @property
    def mamba2_window_settings(self) -> WindowSettings:
        """Typed view of `mamba2_window`."""
        return WindowSettings(**self.mamba2_window)

    @property
    def rotates(self) -> bool:
        """Whether states of Mamba-2 layers turn with the position."""
        states = any("mamba2" in MIXER_SETTINGS[name] for name in self.mixers)
        return states and self.mamba2_settings.rotary

    @property
    def attends(self) -> bool:
        """Whether any layer has keys, whose positions training has bounded."""
        return self.rotates or any(name in ATTENDING for name in self.mixers)

    def with_mixers(self, mixers: list[str], **settings: MixerSettings):
        """A copy with other mixers; `mamba2=`, `mamba1=` and `mamba2_window=` give settings."""
        fields = {key: value for key, value in self.to_dict().items() if key != "model_type"}
        fields.update(mixers=list(mixers), **{k: asdict(v) for k, v in settings.items()})
        return HybridConfig(**fields)


def mamba2_from_attention(
    config: LlamaConfig, proj_bias: bool, rotary: bool = False
) -> Mamba2Settings:
    """One SSM head per query head with a square state, x and B from KV heads (2408.15237, 2.2)."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return Mamba2Settings(
        n_heads=heads,
        head_dim=config.head_dim,
        d_state=config.head_dim,
        x_heads=kv_heads,
        b_groups=kv_heads,
        c_groups=heads,
        norm_groups=heads,
        norm_eps=config.rms_norm_eps,
        proj_bias=proj_bias,
        rotary=rotary,
    )


def mamba1_from_attention(
    config: LlamaConfig, repeat_width: int, proj_bias: bool
) -> Mamba1Settings:
    """Per-channel decays with 16 states; B and x from KV heads, C from query heads."""
    return Mamba1Settings(
        d_inner=config.num_attention_heads * config.head_dim,
        dt_rank=-(-config.hidden_size // 16),
        x_dim=config.num_key_value_heads * config.head_dim,
        repeat_width=repeat_width,
        proj_bias=proj_bias,
    )
