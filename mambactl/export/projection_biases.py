"""Biases of a mixer's projections, in forms that have none.

That of dt is added to `dt_bias`, which is the same; any other must be zero.
"""

from torch import Tensor

from mambactl.export.exported_form import Origin, Step, cannot_hold, renamed

_IN, _OUT = ".mamba.in_proj.bias", ".mamba.out_proj.bias"
_HINT = "`mambactl convert TEACHER --form portable --init reference` makes layers without them"


def is_projection_bias(name: str) -> bool:
    """True if a tensor is the bias of a projection in or out of a recurrent mixer."""
    return name.endswith((_IN, _OUT))


def require_foldable(origin: Origin, form: str) -> None:
    """Raise ModelError where a projection has a bias that is no part of dt's."""
    for name in filter(is_projection_bias, origin.names):
        bias = origin.get(name)
        if name.endswith(_IN) and (dt := name.replace("in_proj.bias", "dt_bias")) in origin.names:
            bias = bias[: -origin.described(dt).numel()]
        if bias.any():
            raise cannot_hold(origin, f"has biases in {name}", form, _HINT)


def dt_bias_step(origin: Origin, source: str, name: str) -> Step:
    """`dt_bias` with the bias of its projection, if there is one."""
    bias = source.replace("dt_bias", "in_proj.bias")
    if bias not in origin.names:
        return renamed(source, name)

    def fold(dt_bias: Tensor, projection: Tensor) -> dict[str, Tensor]:
        return {name: dt_bias + projection[-len(dt_bias) :].to(dt_bias.dtype)}

    return Step((source, bias), fold)
