"""Our own format: nothing to translate."""

from mambactl.checkpoint.reader import Adapted, Reader, build_config, same_names
from mambactl.models.config import HybridConfig


def adapt(reader: Reader) -> Adapted:
    """Config and names as they are in the file."""
    config = build_config(reader, HybridConfig, reader.config)
    return Adapted(config, same_names(reader, config))
