"""The README.md of an exported folder."""

from mambactl.export.exported_form import Form, Origin

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
    if target in _LOADING:
        lines += ["", "```python", _LOADING[target], "```"]
    lines += ["", "The history of the weights is in `mambactl.json`."]
    return "\n".join(lines) + "\n"
