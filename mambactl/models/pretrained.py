"""Base class of hybrid models for transformers: initial values, loading, saving and lineage."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.hub import cached_file

from mambactl.files import CARD, LINEAGE
from mambactl.lineage import Origin, origin_of
from mambactl.models.config import HybridConfig
from mambactl.models.mixers.modules import KeepsFloat32
from mambactl.models.mixers.sizes import FLOAT32_PARAMETERS
from mambactl.models.transformers_names import NEW_CACHE, OLD_CACHE

# arguments of from_pretrained that say where on a hub or in its cache a file is
HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
# a checkpoint without such files is as good as any
LENIENT = {
    f"_raise_exceptions_for_{what}": False
    for what in ("gated_repo", "missing_entries", "connection_errors")
}


def _origin(name: str | os.PathLike, given: Mapping[str, Any]) -> Origin | None:
    """Origin recorded in the checkpoint `name`, in a folder or on the hub."""
    given = {key: given[key] for key in HUB_ARGUMENTS if given.get(key) is not None}
    lineage, _ = (cached_file(name, file, **given, **LENIENT) for file in (LINEAGE, CARD))
    return None if lineage is None else origin_of(Path(lineage).parent)


class HybridPreTrainedModel(PreTrainedModel):
    """Base of hybrid models: initialisation, loading and saving."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridBlock"]
    _skip_keys_device_placement = [OLD_CACHE, NEW_CACHE]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = list(FLOAT32_PARAMETERS)

    if TYPE_CHECKING:
        # that of transformers takes what torch's does, and says something else
        def to(  # pyright: ignore[reportIncompatibleVariableOverride]
            self, *args: object, **kwargs: object
        ) -> Self: ...

    # the device of each module of a model that is on several
    hf_device_map: Mapping[str, torch.device]

    # how the checkpoint was made that the weights came from
    origin: Origin | None = None

    def post_init(self) -> None:
        """Finish construction; of the parameters that stay fp32 name those that the model has."""
        present = {name.rpartition(".")[2] for name, _ in self.named_parameters()}
        self._keep_in_fp32_modules_strict = [n for n in FLOAT32_PARAMETERS if n in present]
        super().post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KeepsFloat32):
            for name, value in module.initial_values().items():
                init.copy_(getattr(module, name), value)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Self:
        """A model from a folder or the hub, which remembers how that checkpoint was made."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # with a report of what was loaded where that is asked for
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            model.origin = _origin(pretrained_model_name_or_path, kwargs)
        return loaded

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write a checkpoint folder, with the card and the lineage of what the model came from."""
        if is_main_process and self.origin is not None:
            os.makedirs(save_directory, exist_ok=True)
            self.origin.write(Path(save_directory), "save_pretrained")
        super().save_pretrained(save_directory, is_main_process, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoModel") -> None:
        """Nothing: a checkpoint carries a file that imports this package, not a copy of it."""
