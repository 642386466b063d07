"""Which attention a converted model replaced, and how far a new mixer is from the old one."""

from torch import Tensor

from mambactl.models.config import HybridConfig


def misfit(ours: HybridConfig, theirs: HybridConfig) -> str | None:
    """Why a student of the first form cannot be aligned with a teacher of the second, or None."""
    for what, field in (("layers", "num_hidden_layers"), ("hidden units", "hidden_size")):
        if getattr(ours, field) != getattr(theirs, field):
            return (
                f"the teacher has {getattr(theirs, field)} {what}, "
                f"the student {getattr(ours, field)}"
            )
    missing = sorted(set(ours.replaced_layers) - set(theirs.attention_layers))
    return f"the teacher has no attention in the layers {missing}" if missing else None


def relative_error(got: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Sum over valid tokens of the mean squared error over the wanted output's variance.

    got, wanted [B, T, D]; valid [B, T]; fp32 scalar. Choosing rows instead of masking them would
    wait for the device to count them.
    """
    got, wanted, keep = got.float(), wanted.float(), valid[..., None]
    width = wanted.shape[-1]
    count = valid.sum() * width
    mean = wanted.masked_fill(~keep, 0).sum() / count
    variance = (wanted - mean).masked_fill(~keep, 0).square().sum() / count
    return (got - wanted).masked_fill(~keep, 0).square().sum() / (width * variance)
