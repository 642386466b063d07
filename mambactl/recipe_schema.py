"""The JSON schema of recipe files, for editors."""

from mambactl.commands import stages
from mambactl.recipe_variants import VARIANT_KEYS


def schema() -> dict[str, object]:
    """Return the JSON schema of recipe files."""
    text = {"type": "string"}
    sections = {}
    for name, command in stages().items():
        body = command.options.model_json_schema()
        body["properties"] |= dict.fromkeys(("model", "out", *command.model_keys), text)
        sections[f"^{name}(@[\\w.-]+)?$"] = body
    varied = {pattern: {"anyOf": [body, {"type": "null"}]} for pattern, body in sections.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mambactl recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["stages"],
        "properties": {
            "name": text,
            "description": text,
            "seed": {"type": "integer", "minimum": 0},
            "stages": {
                "type": "object",
                "additionalProperties": False,
                "minProperties": 1,
                "patternProperties": sections,
            },
            "variants": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": dict.fromkeys(VARIANT_KEYS, text),
                    "patternProperties": varied,
                },
            },
        },
    }
