"""The README.md that a checkpoint folder carries."""

from collections.abc import Mapping
from typing import Any

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def between(text: str, begin: str, end: str, inside: str) -> str | None:
    """`text` with what stands between two marks replaced; None where it does not have both."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    return f"{before}{begin}\n{inside}\n{end}{after}" if found and closed else None


def with_results(card: str, block: str) -> str:
    """A card with `block` in place of the results it had, or at its end."""
    replaced = between(card, BEGIN, END, block)
    return replaced or f"{card.rstrip()}\n\n{BEGIN}\n{block}\n{END}\n"


def model_card(lineage: Mapping[str, Any], config: Any) -> str:
    """Markdown with the Hub's front matter; `config` is a HybridConfig or its dict."""
    from huggingface_hub import ModelCardData

    fields = config if isinstance(config, Mapping) else config.to_dict()
    mixers = fields.get("mixers") or []
    source = lineage.get("source")
    front = ModelCardData(
        library_name="mambactl",
        pipeline_tag="text-generation",
        tags=["mambactl", "mamba", "hybrid"],
        base_model=source if source and source.count("/") == 1 else None,
    )
    stages = [entry["stage"] for entry in (*lineage.get("ancestors", []), lineage)]
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        f"# {_title(source)}: hybrid Mamba",
        "",
        f"Made by `mambactl {' -> '.join(stages)}` from `{source}`.",
        "",
        *_layer_lines(mixers),
        *_window_lines(config),
        *_metric_lines(lineage.get("metrics", {})),
        "",
        "```",
        'mambactl generate . -p "What is the capital of France?"',
        "```",
        "",
        "The full history, recipe and versions are in `mambactl.json`.",
    ]
    return "\n".join(lines) + "\n"


def _title(source: str | None) -> str:
    return (source or "model").rstrip("/").split("/")[-1]


def _window_lines(config: Any) -> list[str]:
    """A sentence about each window of attention beside recurrences."""
    if isinstance(config, Mapping):
        return []
    lines = []
    for window in config.windows:
        names = {
            layer.spec.name: layer.spec.title
            for layer in config.layers
            if layer.spec.window(layer.settings) == window
        }
        for name, title in names.items():
            lines += [
                "",
                f"A {name} layer is a {title} to the last {window.window} tokens and the first "
                f"{window.sinks}.",
            ]
    return lines


def _layer_lines(mixers: list[str]) -> list[str]:
    lines = ["| mixer | layers |", "|---|---|"]
    for kind in sorted(set(mixers)):
        layers = [str(index) for index, mixer in enumerate(mixers) if mixer == kind]
        lines.append(f"| {kind} | {', '.join(layers)} |")
    return lines if mixers else []


def _metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    plain = {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
    if not plain:
        return []
    return ["", "| metric | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in plain.items())]
