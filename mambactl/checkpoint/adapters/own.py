"""Our own format: nothing to translate."""

from mambactl.checkpoint.adapted import Adapted, build_config, same_names
from mambactl.checkpoint.reader import Reader
from mambactl.models.config import HybridConfig


def adapt(reader: Reader) -> Adapted:
    """Config and names as they are in the file."""
    config = build_config(reader, HybridConfig, reader.config)
    return Adapted(config, same_names(reader, config))
