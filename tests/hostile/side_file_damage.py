"""Damage to what is beside a checkpoint's weights: configurations, tokenizer, template, lineage."""

import json
import shutil
from pathlib import Path
from random import Random

from hostile.checkpoint_files import read_side_file, side_files, write_side_file
from hostile.mutations import VALUES, damage_json
from hostile.templates import CODE, TEMPLATES
from hostile.weight_damage import write_running_pickle

# what the maker of the GGUF writes into it
GGUF_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
# what a lineage may name as a model
TARGETS = (
    "/etc/passwd", "/dev/zero", "/dev/stdin", "../..", "", ".", "model", "pickled", "a\0b",
    "--help", "-", "x" * 5000, "\x1b[31m", "http://127.0.0.1:9/x", "hf://../x", "org/name",
    "smollm2-135m@../..", 3, None, [], {"path": "/etc/passwd"}, True,
)  # fmt: skip


def damaged_json(model: Path, draw: Random) -> str:
    """A value of a JSON file, or a text that is no template."""
    name = draw.choice([each for each in side_files(model) if not each.endswith(".md")])
    try:
        text, what = damage_json(read_side_file(model, name), draw)
    except ValueError:
        text, what = draw.choice(list(VALUES.values())), "is another text"
    write_side_file(model, name, text)
    return f"{name}: {what}"


def hostile_template(model: Path, draw: Random) -> str:
    """A chat template that loops, grows or breaks out."""
    if model.suffix == ".gguf":
        return _template_of_gguf(model, draw)
    name = draw.choice(list(TEMPLATES))
    if draw.random() < 0.3 and model.is_dir():
        (model / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads(read_side_file(model, "tokenizer_config.json"))
        text = json.dumps({**config, "chat_template": TEMPLATES[name]})
        write_side_file(model, "tokenizer_config.json", text)
    else:
        write_side_file(model, "chat_template.jinja", TEMPLATES[name])
    return f"a chat template of {name}"


def _template_of_gguf(model: Path, draw: Random) -> str:
    """One of the same length, after which nothing in the file moves."""
    old = GGUF_TEMPLATE.encode()
    fitting = [name for name, text in TEMPLATES.items() if len(text.encode()) <= len(old)]
    name = draw.choice(fitting)
    content = model.read_bytes()
    if content.count(old) != 1:
        raise ValueError(f"{model} has another chat template")
    model.write_bytes(content.replace(old, TEMPLATES[name].encode().ljust(len(old))))
    return f"a chat template of {name}"


def own_code(model: Path, draw: Random) -> str:
    """Files of Python, and configurations that name them."""
    (model / "evil.py").write_text(CODE)
    for name in ("tokenization_evil.py", "__init__.py", "setup.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(CODE)
    both = ["config.json", "tokenizer_config.json"]
    names = draw.choice((both[:1], both[1:], [*both, "generation_config.json"]))
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    model_type = draw.choice(("evil", None))
    for name in names:
        if not (model / name).exists():
            continue
        config = json.loads((model / name).read_text())
        config["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        if "tokenizer" in name:
            config["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
            config["tokenizer_class"] = "EvilTokenizer"
        elif name == "config.json" and model_type:
            config["model_type"] = model_type
        config["trust_remote_code"] = True
        (model / name).write_text(json.dumps(config))
    return f"code of its own, named by {', '.join(names)}"


def misleading_lineage(model: Path, draw: Random) -> str:
    """A lineage that leads elsewhere, and asks for trust."""
    field = draw.choice(("teacher", "source", "parent"))
    target = draw.choice(TARGETS)
    pickled = model.parent / "pickled"
    shutil.copytree(model.parent / "llama", pickled)
    (pickled / "model.safetensors").unlink()
    write_running_pickle(pickled / "pytorch_model.bin", draw)
    lineage = json.loads(read_side_file(model, "mambactl.json"))
    lineage["trust_remote_code"] = True
    lineage.get("recipe", {})["trust_remote_code"] = True
    if field == "parent":
        lineage["parent"] = {**lineage["parent"], "path": target}
    else:
        lineage |= {"teacher": target, "source": target, field: target}
    write_side_file(model, "mambactl.json", json.dumps(lineage))
    return f"a lineage whose {field} is {target!r}"[:200]


def odd_sizes(model: Path, draw: Random) -> str:
    """One number of the configuration that is far too large, too small, or of another type."""
    config = json.loads(read_side_file(model, "config.json"))
    sizes = [key for key, value in config.items() if isinstance(value, int | float)]
    key = draw.choice(sizes)
    config[key] = draw.choice((0, -1, 1, 1 << 20, 1 << 31, 1 << 62, 10**30, 1.5, 1e30, "8", [8]))
    write_side_file(model, "config.json", json.dumps(config))
    return f"config.json: {key} is {config[key]!r}"


def odd_tokenizer(model: Path, draw: Random) -> str:
    """A tokenizer with expressions, numbers and names that take for ever or mean nothing."""
    tokenizer = json.loads(read_side_file(model, "tokenizer.json"))
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$|(.*)*x"}, "behavior": "Isolated",
            "invert": False}  # fmt: skip
    changes: dict[str, dict] = {
        "a slow expression": {"pre_tokenizer": slow},
        "an expression of no syntax": {
            "pre_tokenizer": {**slow, "pattern": {"Regex": "(((("}}
        },
        "a growing normalizer": {
            "normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 10000}
        },
        "doubling normalizers": {
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}] * 40}
        },
        "padding to 10**12": {
            "padding": {"strategy": {"Fixed": 10**12}, "direction": "Right",
                        "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                        "pad_token": "<pad>"}
        },
        "truncation to nothing": {
            "truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst",
                           "stride": 0}
        },
        "no decoder that exists": {"decoder": {"type": "Nonsense"}},
        "tokens beyond 2**32": {"model": {**tokenizer["model"], "vocab": {"the": 2**32 - 1}}},
        "an empty vocabulary": {"model": {**tokenizer["model"], "vocab": {}}},
        "tokens of escapes": {
            "model": {**tokenizer["model"],
                      "vocab": {("\x1b[3" + str(i) + "m\x07" if i > 5 else word): i
                                for word, i in tokenizer["model"]["vocab"].items()}}
        },
    }  # fmt: skip
    name = draw.choice(list(changes))
    write_side_file(model, "tokenizer.json", json.dumps({**tokenizer, **changes[name]}))
    return f"tokenizer.json: {name}"
