"""Low-rank adapters (LoRA, arXiv 2106.09685) on every projection inside the blocks, with peft."""

import warnings
from typing import TYPE_CHECKING, cast

from torch import nn

from mambactl.errors import ResourceError
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.registry import looks_up
from mambactl.options import AdaptedConfig
from mambactl.present import of_kind
from mambactl.requirements import install_line

if TYPE_CHECKING:
    from peft import PeftMixedModel, PeftModel


def require_peft(config: AdaptedConfig) -> None:
    """Raise ResourceError where adapters are asked for and peft is missing."""
    if config.lora is None:
        return
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError:
        raise ResourceError("--lora needs peft, which is missing", install_line("peft")) from None


def adapted(
    model: HybridForCausalLM, config: AdaptedConfig
) -> "HybridForCausalLM | PeftModel | PeftMixedModel":
    """`model` frozen inside a peft model, with W + alpha / rank B A for the linears of its blocks.

    B starts at 0, so nothing changes at first. Embeddings, head, norms, convolutions and what a
    recurrence has besides its projections stay as they are, and so do queries and keys of kept
    attention if those are frozen. None asked: the model itself.
    """
    if config.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    targets = projections(model, config.freeze_kept)
    # peft would look this up on the hub when it saves
    model.config.name_or_path = model.name_or_path = ""
    settings = LoraConfig(
        r=config.lora,
        # a fraction is as good as a whole number
        lora_alpha=config.lora_alpha or 2 * config.lora,  # pyright: ignore[reportArgumentType]
        target_modules=targets,
        bias="none",
    )
    with warnings.catch_warnings():
        # peft asks by an old name whether activations are recomputed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is dep", FutureWarning)
        return get_peft_model(model, settings)


def projections(model: HybridForCausalLM, freeze_kept: bool = False) -> list[str]:
    """Names of the linear layers of all blocks, except frozen ones."""
    found = model.model.layers.named_modules(prefix="model.layers")
    linears = [name for name, module in found if type(module) is nn.Linear]
    return [name for name in linears if not (freeze_kept and looks_up(name))]


def unadapted(model: HybridForCausalLM, freeze_kept: bool) -> list[str]:
    """Names of the parameters of a plain model that adapters leave as they are."""
    changed = {f"{name}.weight" for name in projections(model, freeze_kept)}
    return [name for name, _ in model.named_parameters() if name not in changed]


def plain(model: nn.Module) -> HybridForCausalLM:
    """The model inside a peft model, or the model itself; adapters act in both."""
    if isinstance(model, HybridForCausalLM):
        return model
    return of_kind(HybridForCausalLM, cast("PeftModel", model).get_base_model())


def merged(model: nn.Module) -> HybridForCausalLM:
    """Plain model with the adapters merged into its weights, in fp32."""
    if isinstance(model, HybridForCausalLM):
        return model
    return cast("PeftModel", model).float().merge_and_unload()
