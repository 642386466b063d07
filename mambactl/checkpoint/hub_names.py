"""Names that a model has on the hub: ids, and the aliases of this program for some of them."""

import re

from mambactl.checkpoint.local_names import is_local

ALIASES = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "zephyr-7b": "HuggingFaceH4/zephyr-7b-beta",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "mamba-130m": "state-spaces/mamba-130m",
    "mamba-2.8b": "state-spaces/mamba-2.8b",
    "mamba2-130m": "state-spaces/mamba2-130m",
    "mamba2-2.7b": "state-spaces/mamba2-2.7b",
}
# the alias whose weights need no hub
EMBEDDED = "smollm2-135m"

# owner/name@revision
HUB_ID = re.compile(r"^([\w.-]+/[\w.-]+)(?:@([\w./-]+))?$")


def hub_name(spec: str | None) -> str | None:
    """The hub id that an alias or an id with a revision stands for; None for anything else."""
    if not spec or is_local(spec):
        return None
    if spec in ALIASES:
        return ALIASES[spec]
    match = HUB_ID.match(spec)
    return match and match.group(1)
