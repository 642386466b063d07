"""The texts of an exported folder: its README.md, and a tokenizer that every version opens."""

import json
from collections.abc import Mapping

from mambactl.export.exported_form import Form, Origin

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
# reads tokenizer.json as it is; others rebuild it, or are unknown to versions before 5
_CLASS = "PreTrainedTokenizerFast"
_LOADING = {
    "transformers": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")'
    ),
    "mamba-ssm": (
        "from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel\n\n"
        'model = MambaLMHeadModel.from_pretrained(".", device="cuda")'
    ),
}


def export_card(target: str, form: Form, origin: Origin) -> str:
    """Markdown with the Hub's front matter."""
    from huggingface_hub import ModelCardData

    library = target if target in _LOADING else None
    front = ModelCardData(library_name=library, pipeline_tag="text-generation", tags=["mamba"])
    source = (origin.reader.lineage or {}).get("source") or origin.reader.path.name
    name = str(source).rstrip("/").split("/")[-1]
    lines = [
        *("---", front.to_yaml(), "---", ""),
        *(f"# {name}: {form.architecture}", ""),
        f"Written by `mambactl export --to {target}`.",
    ]
    if form.note:
        lines += ["", form.note]
    if target in _LOADING:
        lines += ["", "```python", _LOADING[target], "```"]
    lines += ["", "The history of the weights is in `mambactl.json`."]
    return "\n".join(lines) + "\n"


def portable_tokenizer(files: Mapping[str, str | bytes]) -> dict[str, str | bytes]:
    """Side files in which the class of the tokenizer is the one that every transformers has."""
    found = dict(files)
    if _TOKENIZER in found and isinstance(settings := found.get(_SETTINGS), str):
        found[_SETTINGS] = json.dumps(
            json.loads(settings) | {"tokenizer_class": _CLASS}, indent=2, ensure_ascii=False
        )
    return found
