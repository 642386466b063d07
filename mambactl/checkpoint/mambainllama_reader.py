"""Checkpoints of MambaInLlama (arXiv 2408.15237), M1 (2504.10449) and Qwerky as ones of our own.

All have `mamba_config.json` beside the config.json of a Llama or Mistral. What a layer is its
tensors say: Mamba-2 has `dt_bias`, Mamba-1 `dt_proj`, whose bias that code adds twice and whose x
and B it shares among groups of 16 channels. Projections of a Mamba-1 mixer are one tensor or five,
those of attention three (`self_attn`) or one (`mha`); where they are one, attention was trained
with the plain base frequency and without a window, whatever config.json says. The base model that
config.json names is not needed.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from mambactl.checkpoint.config_fields import DecoderFields, ReleasedFields, read_fields
from mambactl.checkpoint.reader import NumberType, Reader
from mambactl.errors import ModelError
from mambactl.foreign import read_object
from mambactl.json_values import JsonObject
from mambactl.models.mixers.settings import Mamba1Settings, Mamba2Settings
from mambactl.present import present
from mambactl.registration import TYPE

if TYPE_CHECKING:
    import torch

MAMBA_CONFIG = "mamba_config.json"
GROUP = 16
# the projections that a Mamba-1 mixer has tensors for, in the order of their rows when joined
PARTS = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
# of the norm inside a Mamba-2 mixer, whatever that of the blocks is
EPSILON = 1e-5
_LAYER = re.compile(r"model\.layers\.(\d+)\.(mamba|self_attn|mha)\.(.+)")
_DAMAGED = "fetch it again"


class Piece(NamedTuple):
    """A tensor of ours: rows of one source (`stop` 0: all), or several sources, times a factor."""

    sources: tuple[str, ...]
    start: int = 0
    stop: int = 0
    factor: float = 1.0


class ReleasedReader(Reader):
    """The tensors and the configuration of another reader in our own layout."""

    def __init__(self, inner: Reader):
        super().__init__(inner.path)
        self.inner, self.files, self.lineage = inner, inner.files, inner.lineage
        about = read_object(inner.path / MAMBA_CONFIG)
        self.about = read_fields(ReleasedFields, about, inner.path, MAMBA_CONFIG)
        self.base = read_fields(DecoderFields, inner.config, inner.path)
        self.parts: dict[int, dict[str, str]] = {}
        for name in inner.names():
            if match := _LAYER.fullmatch(name):
                layer = self.parts.setdefault(int(match[1]), {})
                layer[f"{match[2]}.{match[3]}"] = name
        self.recurrent = [i for i, own in self.parts.items() if _has(own, "mamba.")]
        self._check_layers()
        self._pieces = self._translated()

    def names(self) -> list[str]:
        """Tensor names in our own layout."""
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        sources, start, stop, _ = self._pieces[name]
        shapes = [self.inner.shape(source) for source in sources]
        rows = stop - start if stop else sum(shape[0] for shape in shapes)
        return (rows, *shapes[0][1:])

    def number_type(self, name: str) -> NumberType:
        """Number type of one tensor."""
        return self.inner.number_type(self._pieces[name].sources[0])

    def get(self, name: str) -> "torch.Tensor":
        """Read one tensor."""
        sources, start, stop, factor = self._pieces[name]
        tensor = self.inner.get(sources[0])
        if len(sources) > 1:
            import torch

            tensor = torch.cat([tensor, *(self.inner.get(source) for source in sources[1:])])
        if stop:
            tensor = tensor[start:stop]
        return tensor if factor == 1 else tensor * factor

    def close(self) -> None:
        """Release open files."""
        self.inner.close()

    @cached_property
    def config(self) -> JsonObject:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A hybrid's: the base's fields, the mixer of every layer and their sizes."""
        count = len(self.parts)
        found = {
            **self.inner.config,
            "model_type": TYPE,
            "architectures": None,
            "num_hidden_layers": count,
        }
        settings = self._settings()
        name = "mamba2" if isinstance(settings, Mamba2Settings) else "mamba1"
        found["mixers"] = [name if i in self.recurrent else "attention" for i in range(count)]
        found[name] = asdict(settings)
        attention = [own for own in self.parts.values() if not _has(own, "mamba.")]
        biased = {_letter(part) for own in attention for part in own if part.endswith(".bias")}
        found["attention_bias"] = sorted(set("".join(biased))) or False
        if self._joined:
            theta = self.base.rope_theta or (self.base.rope_parameters or {}).get("rope_theta")
            found["rope_parameters"] = {"rope_type": "default", "rope_theta": theta or 10000.0}
            found |= {"rope_scaling": None, "sliding_window": None}
        elif found.get("sliding_window") is not None and self.inner.config["model_type"] == "llama":
            found["sliding_window"] = None
        return found

    @property
    def _joined(self) -> bool:
        return any(_has(own, "mha.") for own in self.parts.values())

    def _check_layers(self) -> None:
        kind = self.inner.config.get("model_type")
        if kind not in ("llama", "mistral", "qwen2"):
            raise ModelError(
                f"{self.path} has {MAMBA_CONFIG} beside a model of the type {kind!r}",
                "the layouts of MambaInLlama, M1 and Qwerky are read, of Llama, Mistral and Qwen2",
            )
        layers, wanted = sorted(self.parts), self.about.n_layer
        if not self.recurrent or layers != list(range(wanted or len(layers))):
            raise ModelError(
                f"{self.path} has mixers in {len(layers)} layers, {len(self.recurrent)} of them "
                f"recurrent; {MAMBA_CONFIG} says {wanted} layers",
                _DAMAGED,
            )
        attention = sorted(set(layers) - set(self.recurrent))
        if self.about.attn_layers is not None and sorted(self.about.attn_layers) != attention:
            raise ModelError(
                f"{self.path} has attention in the layers {attention}, {MAMBA_CONFIG} says "
                f"{self.about.attn_layers}",
                _DAMAGED,
            )

    def _shape_of(self, index: int, part: str, dimensions: int) -> tuple[int, ...]:
        """Shape of a tensor of a layer; ModelError where it is not there or another kind of one."""
        name = self.parts[index].get(part)
        shape = self.inner.shape(name) if name else ()
        if len(shape) != dimensions or 0 in shape:
            raise ModelError(
                f"{self.path}: layer {index} lacks {part} of {dimensions} dimensions", _DAMAGED
            )
        return shape

    def _settings(self) -> Mamba1Settings | Mamba2Settings:
        """Sizes of the recurrent layers, from the tensors of the first."""
        index = min(self.recurrent)
        shared = self._key_rows
        taps = self._shape_of(index, "mamba.conv1d.weight", 3)[-1]
        d_inner = self._shape_of(index, "mamba.out_proj.weight", 2)[1]
        # the released ones have none
        biased = "mamba.in_proj.bias" in self.parts[index]
        if "mamba.dt_bias" not in self.parts[index]:
            return Mamba1Settings(
                d_inner=d_inner,
                dt_rank=self._shape_of(index, "mamba.dt_proj.weight", 2)[1],
                d_state=self._shape_of(index, "mamba.A_log", 2)[1],
                x_dim=shared,
                repeat_width=GROUP,
                d_conv=taps,
                proj_bias=biased,
            )
        heads = self._shape_of(index, "mamba.dt_bias", 1)[0]
        width = d_inner // heads
        if not width or shared % width:
            raise ModelError(
                f"{self.path}: layer {index} has {heads} heads in {d_inner} channels, keys of "
                f"{shared}",
                _DAMAGED,
            )
        return Mamba2Settings(
            n_heads=heads,
            head_dim=width,
            d_state=width,
            x_heads=shared // width,
            b_groups=shared // width,
            c_groups=heads,
            norm_groups=heads,
            norm_eps=EPSILON,
            d_conv=taps,
            proj_bias=biased,
        )

    @property
    def _heads(self) -> int:
        """Number of query heads of the base model."""
        if not self.base.hidden_size or not self.base.num_attention_heads:
            raise ModelError(f"{self.path} names no hidden_size or heads", _DAMAGED)
        return self.base.num_attention_heads

    @property
    def _head_dim(self) -> int:
        heads = self._heads
        return self.base.head_dim or present(self.base.hidden_size) // heads

    @property
    def _key_rows(self) -> int:
        """Rows of keys, and of values."""
        return (self.base.num_key_value_heads or self._heads) * self._head_dim

    def _translated(self) -> dict[str, Piece]:
        pieces: dict[str, Piece] = {}
        for name in self.inner.names():
            match = _LAYER.fullmatch(name)
            if not match:
                pieces[name] = Piece((name,))
                continue
            stem = f"model.layers.{match[1]}"
            own, part = self.parts[int(match[1])], match[3]
            if match[2] == "mha":
                pieces |= self._attention(f"{stem}.self_attn", name, part)
            elif part == f"{PARTS[0]}.weight":
                found = tuple(own.get(f"mamba.{each}.weight", "") for each in PARTS)
                if not all(found):
                    missing = PARTS[found.index("")]
                    raise ModelError(f"{self.path}: {stem} has no mamba.{missing}", _DAMAGED)
                pieces[f"{stem}.mamba.in_proj.weight"] = Piece(found)
            elif part == "dt_proj.bias":
                pieces[name] = Piece((name,), factor=2.0)
            elif part.removesuffix(".weight") not in PARTS:
                pieces[name] = Piece((name,))
        return pieces

    def _attention(self, stem: str, name: str, part: str) -> Mapping[str, Piece]:
        """Tensors of an attention whose queries, keys and values are joined."""
        projection, _, kind = part.rpartition(".")
        if projection != "in_proj":
            return {f"{stem}.{projection.replace('out_proj', 'o_proj')}.{kind}": Piece((name,))}
        queries, shared = self._heads * self._head_dim, self._key_rows
        ends = (queries, queries + shared, queries + 2 * shared)
        if self.inner.shape(name)[:1] != ends[2:]:
            raise ModelError(
                f"{self.path}: {name} has {self.inner.shape(name)[:1]} rows, the heads of "
                f"config.json {ends[2]}",
                _DAMAGED,
            )
        starts = (0, *ends)
        return {
            f"{stem}.{letter}_proj.{kind}": Piece((name,), start, stop)
            for letter, start, stop in zip("qkv", starts, ends, strict=False)
        }


def _has(own: Mapping[str, str], prefix: str) -> bool:
    return any(part.startswith(prefix) for part in own)


def _letter(part: str) -> str:
    """Projections, by letters, whose bias a tensor holds."""
    return "qkv" if part.startswith("mha.in_proj") else part.partition(".")[2][0]
