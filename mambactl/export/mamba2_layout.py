"""Mamba-2 mixers with a row for every head and group, as other programs store them.

Ours keep x once for all query heads of a KV head, and B once for all groups that share it. The
convolution is depthwise, so repeating its channels with the rows of the projection changes nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambactl.export.exported_form import Change, Origin, cannot_hold
from mambactl.models.mixers.settings import Mamba2Settings

# the first version of transformers whose Mamba-2 norms each group by itself
GROUPED_SINCE = "5.23"


@dataclass(frozen=True)
class Mamba2Layout:
    """Sizes of the mixers of a model, and how their tensors are spread over heads and groups.

    `copies` of all channels of a head make it wider: they change no mean of squares, so none of a
    norm, and the output projection reads the first of them.
    """

    sizes: Mamba2Settings
    copies: int = 1

    @property
    def groups(self) -> int:
        """Groups of B and C, and of the norm."""
        return self.sizes.norm_groups

    @property
    def since(self) -> str | None:
        """The first version of transformers that computes it, None where all do."""
        return None if self.groups == 1 else GROUPED_SINCE

    @property
    def d_inner(self) -> int:
        """Width of the mixer with all copies."""
        return self.copies * self.sizes.d_inner

    def in_rows(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Weight or bias of in_proj: rows [z, x, B, C, dt] with x, B and C repeated, in parts."""
        s = self.sizes
        z, x, B, C, dt = tensor.split(list(s.in_rows))
        return self.channels(z), *self._spread(x, B, C), dt

    def conv(self, tensor: Tensor) -> Tensor:
        """Weight [Ch, 1, W] or bias [Ch] of the convolution: channels [x, B, C], repeated."""
        return torch.cat(self._spread(*tensor.split(list(self.sizes.in_rows[1:4]))))

    def channels(self, rows: Tensor) -> Tensor:
        """Rows [H P, ...] with the copies of each head behind it."""
        if self.copies == 1:
            return rows
        heads = rows.unflatten(0, (self.sizes.n_heads, 1, -1))
        return heads.repeat_interleave(self.copies, 1).flatten(0, 2)

    def out_columns(self, weight: Tensor) -> Tensor:
        """Weight of out_proj [D, H P], with zeros for all copies but the first."""
        if self.copies == 1:
            return weight
        heads = weight.unflatten(1, (self.sizes.n_heads, 1, -1))
        zeros = torch.zeros_like(heads).repeat_interleave(self.copies - 1, 2)
        return torch.cat([heads, zeros], 2).flatten(1)

    def _spread(self, x: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
        s = self.sizes
        return [
            self.channels(_repeated(x, s.x_heads, s.n_heads)),
            _repeated(B, s.b_groups, self.groups),
            _repeated(C, s.c_groups, self.groups),
        ]


def _repeated(rows: Tensor, parts: int, wanted: int) -> Tensor:
    """Each of `parts` equal parts of the rows, so often that there are `wanted`."""
    if parts == wanted:
        return rows
    return rows.unflatten(0, (parts, -1)).repeat_interleave(wanted // parts, 0).flatten(0, 1)


def mamba2_layout(origin: Origin, form: str) -> Mamba2Layout:
    """The layout of the recurrent layers of a model; ModelError for any that is no plain Mamba-2.

    That is one mixer for the layer, without windows, kept heads or rotation, with groups that the
    norm shares, and the epsilon of the model's other norms.
    """
    config = origin.config
    for layer in config.layers:
        if layer.spec.is_attention:
            continue
        spec, settings = layer.spec, layer.settings
        if spec.kept_heads(config, settings):
            raise cannot_hold(origin, "keeps heads", form)
        if spec.window(settings) is not None:
            raise cannot_hold(origin, "has windows of attention beside its recurrences", form)
        if spec.rotates(settings):
            raise cannot_hold(origin, "has states that rotate with the position", form)
        if not isinstance(settings, Mamba2Settings):
            raise cannot_hold(origin, f"has a {spec.title} in layer {layer.index}", form)
    sizes = _shared(origin, form)
    for what, groups in (("B", sizes.b_groups), ("C", sizes.c_groups)):
        if sizes.norm_groups % groups:
            found = f"has {groups} groups of {what} and {sizes.norm_groups} of the norm"
            raise cannot_hold(origin, found, form)
    if sizes.norm_eps != config.rms_norm_eps:
        found = f"has norms of {sizes.norm_eps:g} and {config.rms_norm_eps:g}"
        raise cannot_hold(origin, found, form)
    return Mamba2Layout(sizes)


def _shared(origin: Origin, form: str) -> Mamba2Settings:
    try:
        return origin.config.section("mamba2")
    except ValueError:
        raise cannot_hold(origin, "has layers of different sizes", form) from None


def spreads(layout: Mamba2Layout) -> dict[str, Change]:
    """Functions for the tensors of a mixer that are stored in another shape, by name."""
    return {
        "in_proj.weight": layout.in_rows,
        "in_proj.bias": layout.in_rows,
        "conv1d.weight": layout.conv,
        "conv1d.bias": layout.conv,
        "norm.weight": layout.channels,
        "out_proj.weight": layout.out_columns,
    }
