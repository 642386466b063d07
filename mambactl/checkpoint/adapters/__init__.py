"""Foreign checkpoint formats as this project's model: one small module per format."""

from collections.abc import Callable, Mapping
from typing import Any

from mambactl.checkpoint.adapters import llama, mamba, own
from mambactl.checkpoint.reader import Adapted, Reader, blame
from mambactl.errors import ModelError
from mambactl.files import CONFIG

__all__ = ["SUPPORTED", "Adapted", "adapt", "needs_remote_code"]

SUPPORTED = {
    "mambactl_hybrid": "HybridForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}

_ADAPTERS: dict[str, Callable[[Reader], Adapted]] = {
    "mambactl_hybrid": own.adapt,
    "llama": llama.adapt,
    "mistral": llama.adapt,
    "mamba": mamba.adapt,
    "mamba2": mamba.adapt,
    mamba.STATE_SPACES: mamba.adapt,
}


def adapt(reader: Reader) -> Adapted:
    """Our config and names for an open checkpoint; raises ModelError for other architectures."""
    with blame(reader.path, CONFIG):
        return _adapt(reader)


def _adapt(reader: Reader) -> Adapted:
    config = reader.config
    kind = _kind(config)
    architectures = config.get("architectures") or [SUPPORTED.get(kind)]
    if kind in SUPPORTED and architectures[0] != SUPPORTED[kind]:
        raise _unsupported(reader, architectures[0])
    if kind not in _ADAPTERS:
        raise _unsupported(reader, f"{architectures[0] or 'unnamed'} (model_type {kind!r})")
    if config.get("quantization_config"):
        raise ModelError(
            f"{reader.path} is quantised", "give the unquantised checkpoint, or a GGUF of it"
        )
    return _ADAPTERS[kind](reader)


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether only Python code inside the checkpoint could load it."""
    return bool(config.get("auto_map")) and _kind(config) not in _ADAPTERS


def _kind(config: Mapping[str, Any]) -> str | None:
    if "model_type" not in config and "ssm_cfg" in config:
        return mamba.STATE_SPACES
    return config.get("model_type")


def _unsupported(reader: Reader, what: str) -> ModelError:
    supported = ", ".join([*SUPPORTED.values(), "state-spaces/mamba*"])
    message = f"{reader.path} has the architecture {what}, which is not supported"
    if needs_remote_code(reader.config):
        code = ", ".join(sorted({str(name) for name in reader.config["auto_map"].values()}))
        message += f" and needs code from the checkpoint ({code})"
    return ModelError(message, f"supported: {supported}")
