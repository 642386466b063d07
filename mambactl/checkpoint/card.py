"""The README.md that a checkpoint folder carries."""

from collections.abc import Iterator, Mapping

from mambactl.checkpoint.hub_names import hub_name
from mambactl.json_values import AnyObject
from mambactl.metrics import markdown_row
from mambactl.models.config import HybridConfig

BEGIN, END = "<!-- results -->", "<!-- /results -->"
ABOUT, ABOUT_END = "<!-- about -->", "<!-- /about -->"


def between(text: str, begin: str, end: str, inside: str) -> str | None:
    """Replace the text between two marks; None if `text` does not have both."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    return f"{before}{begin}\n{inside}\n{end}{after}" if found and closed else None


def with_results(card: str, block: str) -> str:
    """A card with `block` in place of the results it had, or at its end."""
    return _with_block(card, BEGIN, END, block)


def with_about(card: str, block: str) -> str:
    """A card with `block` in place of what it said of use, training and limits, or at its end."""
    return _with_block(card, ABOUT, ABOUT_END, block)


def _with_block(card: str, begin: str, end: str, block: str) -> str:
    replaced = between(card, begin, end, block)
    return replaced or f"{card.rstrip()}\n\n{begin}\n{block}\n{end}\n"


def model_card(lineage: AnyObject, config: HybridConfig | AnyObject) -> str:
    """Markdown with the Hub's front matter; `config` is a HybridConfig or its dict."""
    from huggingface_hub import ModelCardData

    fields = config if isinstance(config, Mapping) else config.to_dict()
    mixers = fields.get("mixers") or []
    source = lineage.get("source")
    shape = (lineage.get("recipe") or {}).get("shape")
    front = ModelCardData(
        library_name="mambactl",
        pipeline_tag="text-generation",
        tags=["mambactl", "mamba", "hybrid"],
        base_model=hub_name(source),
    )
    stages = [entry["stage"] for entry in (*lineage.get("ancestors", []), lineage)]
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        f"# {_title(source or shape)}: {'hybrid Mamba' if source else 'random weights'}",
        "",
        f"Made by `mambactl {' -> '.join(stages)}` from `{source or shape}`.",
        "",
        *_layer_lines(mixers),
        *_window_lines(config),
        *_metric_lines(lineage.get("metrics", {})),
        "",
        ABOUT,
        about(lineage, config, "."),
        ABOUT_END,
        "",
        "The full history, recipe and versions are in `mambactl.json`.",
    ]
    return "\n".join(lines) + "\n"


def about(lineage: AnyObject, config: HybridConfig | AnyObject, name: str) -> str:
    """Sections Use, Training and Limits of the model card of checkpoint `name`, as Markdown."""
    return "\n".join(["## Use", "", *_use(name), *_training(lineage), "", *_limits(config)])


def _use(name: str) -> list[str]:
    return [
        "```python",
        "import mambactl",
        "",
        f'model = mambactl.load("{name}")',
        'print(mambactl.generate(model, "What is the capital of France?")[0].text)',
        "```",
        "",
        f"`pip install mambactl` first; `mambactl generate {name} -p TEXT` does the same in a "
        "shell, and transformers loads it with `trust_remote_code=True`.",
    ]


def _training(lineage: AnyObject) -> list[str]:
    rows = [row for entry in (*lineage.get("ancestors", []), lineage) for row in _phases(entry)]
    if not rows:
        whose = "those of its source" if lineage.get("source") else "random"
        return ["", "## Training", "", f"No step of training: the weights are {whose}."]
    return [
        *("", "## Training", ""),
        *("| stage | steps | tokens | seconds | data |", "|---|--:|--:|--:|---|"),
        *rows,
    ]


def _phases(entry: AnyObject) -> Iterator[str]:
    """A row for every phase of a stage that trained."""
    stage, data = entry["stage"], (entry.get("recipe") or {}).get("data") or []
    named = ", ".join(f"`{each}`" for each in (data if isinstance(data, list) else [data]))
    for phase, found in (entry.get("metrics") or {}).items():
        if not isinstance(found, Mapping):
            continue
        counts = [found.get(key) for key in ("steps", "tokens", "seconds")]
        if all(isinstance(count, int | float) for count in counts):
            name = stage if phase == stage else f"{stage}, {phase}"
            yield markdown_row([name, *(f"{count:,.0f}" for count in counts), named])


def _limits(config: HybridConfig | AnyObject) -> list[str]:
    fields = config if isinstance(config, Mapping) else config.to_dict()
    mixers = set(fields.get("mixers") or [])
    lines = ["## Limits", ""]
    if mixers - {"attention"}:
        lines += [
            "- A recurrent layer keeps a state of fixed size: what was read long ago is recalled "
            "less exactly than by the attention that it replaces. Measure recall at your own "
            "lengths: `mambactl eval MODEL --recall 256,1024,4096`.",
        ]
    if mixers - {"attention", "mamba2"}:
        lines += ["- Programs other than mambactl do not know all of its kinds of layers."]
    positions = fields.get("max_position_embeddings")
    if positions:
        lines += [f"- Its source was made for at most {positions:,} tokens of context."]
    return [
        *lines,
        "- It knows and gets wrong what its source does: facts in its text need checking, and "
        "nothing was added for safety.",
    ]


def _title(source: str | None) -> str:
    return (source or "model").rstrip("/").split("/")[-1]


def _window_lines(config: HybridConfig | AnyObject) -> list[str]:
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


def _metric_lines(metrics: AnyObject) -> list[str]:
    plain = {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
    if not plain:
        return []
    return ["", "| metric | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in plain.items())]
