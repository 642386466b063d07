"""The texts of an exported folder: its README.md, and a tokenizer that every version opens."""

from mambactl.checkpoint.container import json_text
from mambactl.checkpoint.reader import Reader
from mambactl.export.exported_form import Form, Origin
from mambactl.foreign import json_object

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


def portable_tokenizer(reader: Reader) -> dict[str, str | bytes]:
    """Side files in which the class of the tokenizer is the one that every transformers has."""
    found = dict(reader.files)
    if _TOKENIZER in found and _SETTINGS in found:
        settings = json_object(found[_SETTINGS], reader.path, _SETTINGS)
        found[_SETTINGS] = json_text(settings | {"tokenizer_class": _CLASS})
    return found
