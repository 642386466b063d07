"""Command lines with missing, odd, repeated and contradicting words."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from hostile.runner import CommandLine

from mambactl.commands import COMMANDS, Command

# bytes that are no UTF-8, as Python passes them on
NO_TEXT = b"caf\xe9\xff".decode("utf-8", "surrogateescape")
ESCAPES = "\x1b]0;owned\x07\x1b[31mred\u202e"
NAMES = (
    "", " ", "-", "--", ".", "..", "/", "~", "a\nb", ESCAPES, NO_TEXT, "n" * 300, "n" * 5000,
    "d/" * 2500, "missing", "missing.st", "missing.gguf", "org/name", "org/name@", "@", "a@b@c",
    "org/../../name", "hf://x", "http://127.0.0.1:9/x", "model/config.json", "model/", "./model",
    "model@main", "text.jsonl", "pipe", "folder", "$(touch ../code-ran)", "`id`", "%s{0}", "\u2028",
    '{"checkpoint": "model"}', "smollm2-135m@x", "~nobody/x", "model\n", "-x",
)  # fmt: skip
NUMBERS = (
    "nan", "inf", "-inf", "1e-39", "1e-400", "1e400", "-1", "0", "1000000000000", "9" * 5000, "1.5",
    "0x10", "1_000", "\u0663", "", " ", "1e3", "+1", "--", "None", "true", "[1]", NO_TEXT,
)  # fmt: skip
WORDS = (
    "", " ", ",", ",,", "a,b", "1,", "-1,2", "nan", "[", "{", "None", "a\nb", ESCAPES, NO_TEXT,
    "x" * 5000, "../outside", "folder", "pipe", "text.jsonl=0", "text.jsonl=nan", "text.jsonl=1e99",
    "missing=0.5", "=0.5", "0.5", "missing.parquet", "missing:config@split", "1/0", "0/1", "3/2",
    "auto", "[" * 5000, "'", '"', "$HOME", "text.jsonl",
)  # fmt: skip
SETTINGS = (
    "", "=", "a", "=1", "max_steps", "max_steps=", "max_steps=[", "max_steps={", "seed=nan",
    "seed=.inf", "seed=" + "9" * 5000, "unheard_of=1", "data=" + "[" * 5000, "__class__=1",
    "model_config=1", "device=[cpu]", "data=!!python/object/apply:os.system [id]", "dtype=null",
    "seed=2026-01-01", "seed=&a [*a]", "trust_remote_code=maybe", "seed=1\n2", f"device={ESCAPES}",
    f"device={NO_TEXT}", "data={a: 1}", "DATA=text.jsonl", "files=[x]",
)  # fmt: skip
INPUTS = (
    b"", b"\n", b"\n\nmodel\n", b"model\nmodel\n", b"{", b"{}", b"[]", b"{\"checkpoint\": 3}\n",
    b"{\"checkpoint\": \"\"}\n", b"{\"checkpoint\": \"model\"", b"\xff\xfe\n", b"\0\n",
    b"\x1b[31m\n", b"a" * 1_000_000, b"{\"a\":" * 100_000, b"{\"checkpoint\": \"\\ud800\"}\n",
    b"missing\n", b" model \n", b"{\"checkpoint\": " + b"9" * 5000 + b"}\n", b"--help\n", b"-\n",
)  # fmt: skip
OUTPUTS = (
    "", " ", ".", "..", "/", "model", "model/", "model/config.json", "model/inside", "folder",
    "text.jsonl", "text.jsonl/x", "pipe", "/proc/nothing/out", "n" * 300, "out\nx", f"out{ESCAPES}",
    f"out{NO_TEXT}", "-", "--force", "out.st/", "d/" * 2500 + "x", "link", "link/x", "out.gguf",
    "out.partial", "$out", "out{}", "~nobody/out", "/dev/full", "out.st.st", ".st", "out/../out",
)  # fmt: skip
FLAGS = (
    ("--resume", "--force"), ("-q", "-v"), ("--json", "--json"), ("--dry-run", "--resume"),
    ("--dry-run", "--force"), ("--seed", "1", "--seed", "2"), ("--device", "cpu", "--device", "x"),
    ("--", "--help"), ("--unheard-of",), ("--unheard-of=1",), ("-z",), ("--device",), ("--dtype",),
    ("--dtype", "int8"), ("--device", "cuda:99"), ("--device", "mps"), ("--device", ""),
    ("--device", f"cpu{ESCAPES}"), ("--recipe", "missing"), ("--recipe", "text.jsonl"),
    ("--recipe", "folder"), ("--recipe", "pipe"), ("--recipe", ""), ("--recipe", ESCAPES),
    ("--recipe", "n" * 5000), ("--recipe", "quickstart@x"), ("more", "words"), ("--dev", "cpu"),
    ("-o",), ("-o", "a", "-o", "b"), ("--device=cpu=gpu",), ("--version",), ("--json", "--dry-run"),
)  # fmt: skip
# a whole and cheap command line of every command but `serve`, which a signal alone ends, and
# `synthetic`, which fetches a tokenizer
WHOLE: dict[str, tuple[str, ...]] = {
    "convert": ("model", "--device", "cpu"),
    "teacher-cache": ("llama", "--data", "text.jsonl", "--device", "cpu", "--max-steps", "1"),
    "distill": ("model", "--data", "text.jsonl", "--device", "cpu", "--max-steps", "1"),
    "sft": ("model", "--data", "text.jsonl", "--device", "cpu", "--max-steps", "1"),
    "dpo": ("model", "--data", "pairs.jsonl", "--device", "cpu", "--max-steps", "1"),
    "eval": ("model", "--data", "text.jsonl", "--device", "cpu"),
    "spec-decode": ("model", "--draft", "ngram", "--max-new-tokens", "2", "--device", "cpu"),
    "bench": ("model", "--input-len", "4", "--output-len", "2", "--iters", "1", "--device", "cpu"),
    "generate": ("model", "-p", "the river", "--max-new-tokens", "2", "--device", "cpu"),
    "chat": ("model", "--max-new-tokens", "2", "--device", "cpu"),
    "export": ("model", "--no-check", "--device", "cpu"),
    "push": ("model", "org/name", "--dry-run"),
    "inspect": ("model",),
    "table": ("bench.json",),
    "plot": ("kept",),
    "report": ("kept",),
    "doctor": (),
}
# numbers of these are work to do, which is not too much for being much; `nproc` starts processes
LONG = {"max_steps", "epochs", "iters", "warmup", "max_new_tokens", "nproc"}
# a folder that is made wherever it is asked for
ANYWHERE = {"prefix_cache"}
PLACES = ("runs", "out", "metrics.png", "report.html", "model/results", "model/README.md",
          "kept/results", "kept/README.md")  # fmt: skip
Line = tuple[tuple[str, ...], bytes]


def make_case(draw: Random, inputs: Path, work: Path) -> tuple[CommandLine, str]:
    """Files for commands in `work`, and a command line with something odd."""
    shutil.copytree(inputs / "records", work, dirs_exist_ok=True)
    (work / "folder").mkdir()
    (work / "link").symlink_to("nothing")
    os.mkfifo(work / "pipe")
    name = draw.choice(list(ODDITIES))
    words, stdin = ODDITIES[name](draw)
    named = [word for flag, word in zip(words, words[1:], strict=False) if flag == "-o"]
    named += [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    new = [os.path.normpath(word) for word in named if _is_new(word, work)]
    partial = [os.path.normpath(word) + ".partial" for word in named if word]
    return CommandLine(words, stdin, (*PLACES, *new, *partial), fits=False), name


def _is_new(word: str, work: Path) -> bool:
    """True if a word names something in `work` that is not there yet."""
    path = os.path.normpath(work / word)
    return path.startswith(f"{work}/") and not os.path.lexists(path[:200])


def _command(draw: Random, fits: Callable[[Command], bool] = lambda command: True) -> Command:
    ending = [command for command in COMMANDS.values() if command.name in WHOLE]
    return draw.choice([command for command in ending if fits(command)])


def _nothing(draw: Random) -> Line:
    command = _command(draw)
    kept = draw.choice((0, 1))
    return (command.name, *WHOLE[command.name][:kept]), b""


def _unknown(draw: Random) -> Line:
    word = draw.choice((*NAMES, "Convert", "convertt", "--", "-v", "help"))
    return (word, *WHOLE["convert"]), b""


def _model(draw: Random) -> Line:
    command = _command(draw, lambda each: each.name not in ("doctor", "table", "plot", "report"))
    return (command.name, draw.choice(NAMES), *WHOLE[command.name][1:]), b""


def _file(draw: Random) -> Line:
    name = draw.choice(("table", "plot", "report"))
    return (name, draw.choice(NAMES), *draw.choice(((), (draw.choice(NAMES),)))), b""


def _stdin(draw: Random) -> Line:
    command = _command(draw, lambda each: each.reads_model)
    return (command.name, "-", *WHOLE[command.name][1:]), draw.choice(INPUTS)


def _option(draw: Random) -> Line:
    """An odd value of one option."""
    command = _command(draw)
    fields = command.options.model_fields
    names = [name for name in fields if name != "nproc"]
    if not names:
        return (command.name, "--json", "--json=1"), b""
    name = draw.choice(names)
    number = any(kind in str(fields[name].annotation) for kind in ("int", "float"))
    value = draw.choice(NUMBERS if number or draw.random() < 0.2 else WORDS)
    words = (command.name, *WHOLE[command.name], f"--{name.replace('_', '-')}={value}")
    return (*words, *(["--dry-run"] if command.is_stage and name in LONG | ANYWHERE else [])), b""


def _setting(draw: Random) -> Line:
    command = _command(draw, lambda each: each.is_stage)
    return (command.name, *WHOLE[command.name], "--set", draw.choice(SETTINGS)), b""


def _output(draw: Random) -> Line:
    command = _command(draw, lambda each: each.writes != "nothing")
    words = (command.name, *WHOLE[command.name], "-o", draw.choice(OUTPUTS))
    if command.name == "generate":
        words = (*words, "--dataset", "prompts.jsonl", "--keep-unfinished")
    return words, b""


def _flags(draw: Random) -> Line:
    command = _command(draw)
    return (command.name, *WHOLE[command.name], *draw.choice(FLAGS)), b""


def _prompt(draw: Random) -> Line:
    name = draw.choice(("generate", "spec-decode"))
    prompt = draw.choice((*WORDS, "the " * 30_000, "\0", "\u202e\u2066", "<|im_end|>" * 1000, "-"))
    if "\0" in prompt:
        prompt = prompt.replace("\0", "\x01")
    words = (*WHOLE[name], "-p", prompt)
    return (name, *words, *draw.choice(((), ("--no-chat",)))), draw.choice(INPUTS)


def _recipe(draw: Random) -> Line:
    action = draw.choice(("run", "show", "list", "schema", "nonsense", ""))
    name = draw.choice((*NAMES, "recipe.yaml", "quickstart@x", "quickstart@"))
    rest = draw.choice(
        ((), ("--set", draw.choice(SETTINGS)), ("--from", "x"), ("--to", ""), ("-o", ""),
         ("--from", "eval", "--to", "convert"), ("--resume", "--force"), ("--json",), ("more",))
    )  # fmt: skip
    dry = ("--dry-run",) if action == "run" else ()
    return ("recipe", action, name, *rest, *dry), b""


def _two_odd(draw: Random) -> Line:
    first, stdin = _option(draw)
    return (*first, *draw.choice(FLAGS)), stdin


def _temperature(draw: Random) -> Line:
    words = ("--temperature", draw.choice(NUMBERS))
    return ("generate", *WHOLE["generate"], *words), b""


ODDITIES: dict[str, Callable[[Random], Line]] = {
    "nothing": _nothing,
    "an unknown command": _unknown,
    "an odd MODEL": _model,
    "an odd model on stdin": _stdin,
    "an odd file": _file,
    "an odd value": _option,
    "another odd value": _option,
    "an odd setting": _setting,
    "an odd output": _output,
    "odd flags": _flags,
    "an odd prompt": _prompt,
    "an odd recipe": _recipe,
    "an odd value with odd flags": _two_odd,
    "an odd temperature": _temperature,
}
