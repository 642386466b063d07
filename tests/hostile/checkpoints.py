"""Damaged checkpoints, and the command lines that read them."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

from hostile.mutations import VALUES, damage_bytes, damage_entry, damage_json
from hostile.runner import CommandLine
from hostile.starting_points import MODELS
from hostile.templates import CODE, TEMPLATES, TOUCH

from mambactl.errors import ExitCode

CPU = ("--device", "cpu")
TRAIN = (*CPU, "--max-steps", "1", "--batch-size", "2", "--max-length", "64", "--warmup", "0")
# command lines by name, with how often each is drawn; MODEL stands for the checkpoint
COMMANDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "inspect": (22, ("inspect", "MODEL")),
    "inspect tensors": (4, ("inspect", "MODEL", "--tensors", "--json")),
    "convert": (12, ("convert", "MODEL", "-o", "out", *CPU)),
    "convert to a file": (6, ("convert", "MODEL", "--ratio", "1", "-o", "out.st", *CPU)),
    "generate": (14, ("generate", "MODEL", "-p", "the river", "--max-new-tokens", "4", *CPU)),
    "answers": (
        5,
        ("generate", "MODEL", "--dataset", "../inputs/data/text.jsonl", "--max-samples", "2",
         "--max-new-tokens", "4", "--keep-unfinished", "-o", "out.jsonl", *CPU),
    ),
    "eval": (9, ("eval", "MODEL", "--data", "../inputs/data/held-out.jsonl", "--max-length", "32",
                 *CPU)),
    "sft": (9, ("sft", "MODEL", "--data", "../inputs/data/chats.jsonl", "-o", "out", *TRAIN)),
    "distill": (6, ("distill", "MODEL", "--data", "../inputs/data/text.jsonl", "-o", "out.st",
                    *TRAIN)),
    "dpo": (4, ("dpo", "MODEL", "--data", "../inputs/data/pairs.jsonl", "-o", "out", *TRAIN)),
    "spec-decode": (6, ("spec-decode", "--draft", "ngram", "--target", "MODEL", "-k", "2",
                        "--max-new-tokens", "4", "--check", *CPU)),
    "bench": (3, ("bench", "MODEL", "--input-len", "8", "--output-len", "2", "--iters", "1", *CPU)),
}  # fmt: skip
# what has a lineage, and what commands need for the others
STUDENTS = ("single file", "ours", "windows", "two mixers")
TEACHER = {"eval": ("--teacher", "MODEL"), "dpo": ("--reference", "self")}
# without attention there is nothing to convert, without a lineage nothing to distil
INSTEAD = {
    "distill": ({"llama", "sharded", "pickled", "gguf", "state-spaces"}, "convert"),
    "convert": ({"state-spaces", "two mixers"}, "generate"),
    "convert to a file": ({"state-spaces", "two mixers"}, "eval"),
}
# where results about a checkpoint are kept
RESULTS = ("model/results", "model/README.md", "model.st.results", "model.gguf.results")


def make_case(draw: Random, inputs: Path, work: Path) -> tuple[CommandLine, str]:
    """Damage a checkpoint in `work`; returns the command line that reads it, and what it is."""
    kind = draw.choice(list(MODELS))
    shutil.copytree(inputs / kind, work, dirs_exist_ok=True)
    model = work / MODELS[kind]
    names, weights = zip(*((name, row[0]) for name, row in COMMANDS.items()), strict=True)
    command = draw.choices(names, weights)[0]
    codes: frozenset[int] = frozenset()
    fitting = [change for change in CHANGES if change.fits(model)]
    change = draw.choices(fitting, [each.weight for each in fitting])[0]
    if change.commands:
        command = draw.choice(change.commands)
    what = change.make(model, draw)
    if change.codes and not command.startswith("inspect"):
        codes = change.codes
    words = words_of(kind, command)
    line = CommandLine(words, writes=("out", *RESULTS), codes=codes)
    return line, f"{kind}: {what}"


def words_of(kind: str, command: str) -> tuple[str, ...]:
    """The words of a command, or of another one where it can do nothing with this kind of model."""
    while command in INSTEAD and kind in INSTEAD[command][0]:
        command = INSTEAD[command][1]
    words = COMMANDS[command][1]
    if kind not in STUDENTS:
        words += TEACHER.get(command, ())
    return tuple(MODELS[kind] if word == "MODEL" else word for word in words)


class Change:
    """A kind of damage to the checkpoint at a path."""

    def __init__(
        self,
        weight: int,
        make: Callable[[Path, Random], str],
        fits: Callable[[Path], bool] = lambda model: True,
        commands: tuple[str, ...] = (),
        codes: frozenset[int] = frozenset(),
    ):
        self.weight, self.make, self.fits = weight, make, fits
        # the only ones that this damage concerns; all where it is empty
        self.commands, self.codes = commands, codes


def _files(model: Path, *suffixes: str) -> list[Path]:
    files = [model] if model.is_file() else sorted(path for path in model.iterdir())
    return [path for path in files if not suffixes or path.suffix in suffixes]


def _bytes(model: Path, draw: Random) -> str:
    path = draw.choice(_files(model))
    content, what = damage_bytes(path.read_bytes(), draw)
    path.write_bytes(content)
    return f"{path.name}: {what}"


def _entry(model: Path, draw: Random) -> str:
    path = draw.choice(_files(model))
    return f"{path.name} is {damage_entry(path, draw)}"


def _json(model: Path, draw: Random) -> str:
    path = draw.choice(_files(model, ".json"))
    text, what = damage_json(path.read_text("utf-8"), draw)
    path.write_text(text, "utf-8")
    return f"{path.name}: {what}"


def read_header(path: Path) -> tuple[str, bytes]:
    """The header of a safetensors file as text, and the data behind it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end].decode("utf-8"), content[end:]


def write_header(path: Path, header: str, data: bytes) -> None:
    """Write a safetensors file, whose header may be anything."""
    encoded = header.encode("utf-8")
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def _header(model: Path, draw: Random) -> str:
    path = draw.choice(_files(model, ".safetensors", ".st"))
    header, data = read_header(path)
    text, what = damage_json(header, draw)
    write_header(path, text, data)
    return f"header of {path.name}: {what}"


def _tensor(model: Path, draw: Random) -> str:
    """Wrong offsets, types and shapes of one tensor, and lies about the header's length."""
    path = draw.choice(_files(model, ".safetensors", ".st"))
    header, data = read_header(path)
    tensors = json.loads(header)
    name = draw.choice([key for key in tensors if key != "__metadata__"])
    start, end = tensors[name]["data_offsets"]
    large = 1 << draw.choice((31, 40, 62))
    faults = {
        "dtype": draw.choice(("F64", "I64", "BOOL", "F8_E4M3", "F4", "Q", "", "BF16")),
        "shape": draw.choice(([large], [large, large], [0], [], [-1], [1] * 5000, [3, 5])),
        "data_offsets": draw.choice(
            ([end, start], [start, end + large], [0, 0], [start + 1, end + 1], [start, end, end])
        ),
    }
    field = draw.choice((*faults, "length"))
    if field == "length":
        length = draw.choice((0, 1, len(header) - 1, len(header) + 1, 1 << 32, (1 << 64) - 1))
        path.write_bytes(struct.pack("<Q", length) + header.encode() + data)
        return f"{path.name}: a header of {length} bytes"
    tensors[name][field] = faults[field]
    write_header(path, json.dumps(tensors), data)
    return f"{path.name}: {field} of {name} is {str(faults[field])[:50]}"


def _embedded(model: Path, draw: Random) -> str:
    """A side file inside of the header of a single file."""
    header, data = read_header(model)
    tensors = json.loads(header)
    inside = tensors["__metadata__"]
    key = draw.choice(list(inside))
    try:
        inside[key], what = damage_json(inside[key], draw)
    except ValueError:
        inside[key], what = draw.choice(list(VALUES.values())), "is another text"
    write_header(model, json.dumps(tensors), data)
    return f"{key} in the header: {what}"


def _not_finite(model: Path, draw: Random) -> str:
    """NaN or infinity in a tensor of fp32."""
    path = draw.choice(_files(model, ".safetensors", ".st"))
    header, data = read_header(path)
    tensors = {key: row for key, row in json.loads(header).items() if key != "__metadata__"}
    name = draw.choice([key for key, row in tensors.items() if row["dtype"] == "F32"])
    start, end = tensors[name]["data_offsets"]
    value = draw.choice((float("nan"), float("inf"), float("-inf")))
    at = start + 4 * draw.randrange((end - start) // 4)
    count = draw.choice((1, (end - at) // 4))
    content = data[:at] + struct.pack("<f", value) * count + data[at + 4 * count :]
    write_header(path, header, content)
    return f"{path.name}: {name} has {value} {count} times"


def _template(model: Path, draw: Random) -> str:
    name = draw.choice(list(TEMPLATES))
    template = TEMPLATES[name]
    if model.is_file():
        header, data = read_header(model)
        tensors = json.loads(header)
        tensors["__metadata__"]["chat_template.jinja"] = template
        write_header(model, json.dumps(tensors), data)
    elif draw.random() < 0.3:
        (model / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads((model / "tokenizer_config.json").read_text())
        config["chat_template"] = template
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        (model / "chat_template.jinja").write_text(template)
    return f"a chat template of {name}"


class _Shell:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (TOUCH,)


def _pickle(model: Path, draw: Random) -> str:
    """A pickle that runs a command, as weights or beside them."""
    import pickle

    import torch

    name = draw.choice(
        ("pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pt", "tokenizer.pkl")
    )
    if draw.random() < 0.5:
        torch.save({"lm_head.weight": _Shell()}, model / name)
    else:
        (model / name).write_bytes(pickle.dumps({"lm_head.weight": _Shell()}))
    if draw.random() < 0.5:
        for path in _files(model, ".safetensors"):
            path.unlink()
    return f"{name} runs a command"


def _code(model: Path, draw: Random) -> str:
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


def _lineage(model: Path, draw: Random) -> str:
    """A lineage that leads elsewhere."""
    field = draw.choice(("teacher", "source", "parent"))
    target = draw.choice(
        ("/etc/passwd", "/dev/zero", "/dev/stdin", "../..", "", ".", "model", "pickled", "a\0b",
         "--help", "-", "x" * 5000, "\x1b[31m", "http://127.0.0.1:9/x", "hf://../x", "org/name",
         "smollm2-135m@../..", 3, None, [], {"path": "/etc/passwd"}, True)
    )  # fmt: skip
    pickled = model.parent / "pickled"
    shutil.copytree(model.parent / "llama", pickled)
    (pickled / "model.safetensors").unlink()
    _pickle(pickled, Random(draw.random()))

    def change(lineage: dict) -> None:
        lineage["trust_remote_code"] = True
        lineage.get("recipe", {})["trust_remote_code"] = True
        lineage[field] = {**lineage[field], "path": target} if field == "parent" else target
        if field != "parent":
            lineage.update(teacher=target, source=target)

    if model.is_file():
        header, data = read_header(model)
        tensors = json.loads(header)
        lineage = json.loads(tensors["__metadata__"]["mambactl.json"])
        change(lineage)
        tensors["__metadata__"]["mambactl.json"] = json.dumps(lineage)
        write_header(model, json.dumps(tensors), data)
    else:
        lineage = json.loads((model / "mambactl.json").read_text())
        change(lineage)
        (model / "mambactl.json").write_text(json.dumps(lineage))
    return f"a lineage whose {field} is {target!r}"[:200]


def _sizes(model: Path, draw: Random) -> str:
    """One number of the configuration that is far too large, too small, or of another type."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    sizes = [key for key, value in config.items() if isinstance(value, int | float)]
    key = draw.choice(sizes)
    config[key] = draw.choice((0, -1, 1, 1 << 20, 1 << 31, 1 << 62, 10**30, 1.5, 1e30, "8", [8]))
    path.write_text(json.dumps(config))
    return f"config.json: {key} is {config[key]!r}"


def _words(model: Path, draw: Random) -> str:
    """A tokenizer with expressions, numbers and names that take for ever or mean nothing."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
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
    path.write_text(json.dumps({**tokenizer, **changes[name]}))
    return f"tokenizer.json: {name}"


def _counts(model: Path, draw: Random) -> str:
    """A number in the header of a GGUF that is far too large."""
    content = bytearray(model.read_bytes())
    at = draw.choice((4, 8, 16, 24, draw.randrange(24, 2000), draw.randrange(24, 2000)))
    width = draw.choice((4, 8))
    value = draw.choice((0, (1 << 8 * width) - 1, 1 << 31, 1 << 20))
    content[at : at + width] = value.to_bytes(width, "little")
    model.write_bytes(content)
    return f"{model.name}: {value} at byte {at}"


def _folder(model: Path) -> bool:
    return model.is_dir()


def _has(suffixes: tuple[str, ...]) -> Callable[[Path], bool]:
    return lambda model: bool(_files(model, *suffixes))


def _has_lineage(model: Path) -> bool:
    return model.suffix == ".st" or (model / "mambactl.json").exists()


CHATS = ("generate", "sft", "answers", "spec-decode")
FOLLOWS_A_TEACHER = ("distill", "eval", "dpo", "inspect", "convert")
CHANGES = (
    Change(18, _bytes),
    Change(10, _entry),
    Change(24, _json, _folder),
    Change(12, _header, _has((".safetensors", ".st"))),
    Change(8, _tensor, _has((".safetensors", ".st"))),
    Change(30, _embedded, lambda model: model.suffix == ".st"),
    Change(
        7, _not_finite, _has((".safetensors", ".st")),
        codes=frozenset({ExitCode.MODEL, ExitCode.CHECK}),
    ),
    Change(8, _template, lambda model: model.suffix != ".gguf", CHATS),
    Change(5, _pickle, _folder),
    Change(5, _code, _folder),
    Change(8, _lineage, _has_lineage, FOLLOWS_A_TEACHER),
    Change(8, _sizes, _folder),
    Change(5, _words, _folder, ("generate", "sft", "eval", "convert")),
    Change(25, _counts, lambda model: model.suffix == ".gguf"),
)  # fmt: skip
