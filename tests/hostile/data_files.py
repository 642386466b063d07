"""Damaged data, recipes, results and run records, and the command lines that read them."""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from hostile.checkpoints import CPU, TRAIN
from hostile.mutations import damage_bytes, damage_entry, damage_json
from hostile.runner import CommandLine
from hostile.starting_points import RESUMED
from hostile.yaml_texts import RECIPES, TASKS

SFT = ("sft", "model", "--data", "FILE", "-o", "out", *TRAIN)
DISTILL = ("distill", "model", "--data", "FILE", "-o", "out", *TRAIN, "--stages", "align")
DPO = ("dpo", "model", "--data", "FILE", "-o", "out", *TRAIN)
CONVERT = ("convert", "llama", "--calibrate", "FILE", "--max-length", "32", "-o", "out", *CPU)
KEEP = ("teacher-cache", "llama", "--data", "FILE", "-o", "out", "--max-steps", "1", *CPU)
ANSWER = ("generate", "model", "--dataset", "FILE", "--max-samples", "2", "--max-new-tokens", "2",
          "--keep-unfinished", "-o", "out.jsonl", *CPU)  # fmt: skip
EVAL = ("eval", "model", "--max-length", "32", *CPU)
PROMPTS = ("generate", "model", "--prompts", "FILE", "--max-new-tokens", "2", *CPU)
SPECULATE = ("spec-decode", "--draft", "ngram", "--target", "model", "--prompts", "FILE",
             "--max-new-tokens", "2", *CPU)  # fmt: skip
# rows of text are read by every stage; a dry run reads them as well
ON_TEXT = (SFT, (*SFT, "--dry-run"), (*SFT, "--skip-bad-rows"), DISTILL, KEEP, ANSWER, CONVERT,
           (*EVAL, "--data", "FILE"))  # fmt: skip
ON_LONG_TEXT = ((*EVAL, "--long-context-data", "FILE", "--position-length", "128"),)
ON_CHATS = (SFT, (*SFT, "--dry-run"), (*SFT, "--skip-bad-rows"), ANSWER, PROMPTS)
ON_PAIRS = (DPO, (*DPO, "--dry-run"), (*DPO, "--skip-bad-rows"), (*EVAL, "--preferences", "FILE"))
ON_PROMPTS = (PROMPTS, SPECULATE, (*EVAL, "--generation-agreement", "FILE"))
ON_CACHE = (
    ("distill", "model", "--data", "text.jsonl", "--teacher-cache", "cache", "--stages", "logits",
     "-o", "out", *TRAIN),
)  # fmt: skip
REPORT = ("report", "kept", "kept.st.results", "kept.st.metrics.jsonl", "-o", "out.html")
ON_RESULTS = (REPORT, REPORT, ("plot", "kept", "kept.st.metrics.jsonl", "-o", "out.png"),
              ("eval", "kept", "--data", "text.jsonl", "--max-length", "32", *CPU))  # fmt: skip
ON_BENCH = (("table", "FILE"), ("report", "FILE", "-o", "out.html"),
            ("table", "FILE", "--into", "out.md"))  # fmt: skip
ON_RECIPES = (("recipe", "show", "FILE"), ("recipe", "run", "FILE", "--dry-run", "-o", "out"),
              ("recipe", "run", "FILE", "--dry-run"), ("convert", "llama", "--recipe", "FILE",
               "--dry-run", "-o", "out"))  # fmt: skip
# sections are processes of their own
RUN = (("recipe", "run", "FILE", "-o", "out", "--to", "convert"),)
ON_TASKS = (
    ("eval", "model", "--tasks", "own_task", "--task-dir", "tasks", "--limit", "2", *CPU),
    ("eval", "model", "--tasks", "tasks/choices.jsonl", "--limit", "2", *CPU),
    ("eval", "model", "--tasks", "own_task", "--task-dir", "tasks", "--dry-run", *CPU),
)
KEPT = ("model/results", "model/README.md", "kept/results", "kept/README.md")

Damage = Callable[[Path, Random], str]


@dataclass(frozen=True)
class Kind:
    """Files of one kind: how often they are drawn, how they are damaged, what reads them."""

    weight: int
    # in the inputs; every file inside of a folder may be damaged
    name: str
    damages: tuple[Damage, ...]
    lines: tuple[tuple[str, ...], ...]
    writes: tuple[str, ...] = ("out", *KEPT)


def make_case(draw: Random, inputs: Path, work: Path) -> tuple[CommandLine, str]:
    """Damage a file in `work`; returns the command line that reads it, and what it is."""
    kind = draw.choices(KINDS, [each.weight for each in KINDS])[0]
    shutil.copytree(inputs / "records", work, dirs_exist_ok=True)
    path = work / kind.name
    if path.is_dir():
        path = draw.choice(sorted(each for each in path.rglob("*") if each.is_file()))
    what = draw.choice(kind.damages)(path, draw)
    words = words_of(kind, draw.choice(kind.lines))
    return CommandLine(words, writes=kind.writes), f"{path.relative_to(work)}: {what}"


def words_of(kind: Kind, words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a command that reads the files of a kind."""
    return tuple(kind.name if word == "FILE" else word for word in words)


def _bytes(path: Path, draw: Random) -> str:
    content, what = damage_bytes(path.read_bytes(), draw)
    path.write_bytes(content)
    return what


def _bytes_at_the_end(path: Path, draw: Random) -> str:
    content, what = damage_bytes(path.read_bytes()[::-1], draw)
    path.write_bytes(content[::-1])
    return f"from the end: {what}"


def _entry(path: Path, draw: Random) -> str:
    return f"is {damage_entry(path, draw)}"


def _json(path: Path, draw: Random) -> str:
    """A value of a JSON file; other files get damaged bytes."""
    try:
        text, what = damage_json(path.read_text("utf-8"), draw)
    except ValueError:
        return _bytes(path, draw)
    path.write_text(text, "utf-8")
    return what


def _row(path: Path, draw: Random, count: int = 1) -> str:
    """Values of some rows of a file of rows."""
    try:
        rows = path.read_text("utf-8").splitlines()
    except ValueError:
        return _bytes(path, draw)
    number = draw.randrange(len(rows))
    what = ""
    for index in range(number, min(len(rows), number + count)):
        try:
            rows[index], what = damage_json(rows[index], draw)
        except ValueError:
            return _bytes(path, draw)
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return f"row {number + 1}: {what}"


def _lines(path: Path, draw: Random) -> str:
    """Lines that are no rows, in place of all or among them."""
    name = draw.choice(list(LINES))
    rows = path.read_bytes().splitlines(keepends=True)
    rows.insert(draw.randrange(len(rows) + 1), LINES[name])
    path.write_bytes(LINES[name] if draw.random() < 0.3 else b"".join(rows))
    return f"a line: {name}"


LINES = {
    "of 70 MiB": b'{"text": "' + b"a " * (35 << 20) + b'"}\n',
    "without an end": b'{"text": "the river',
    "in another order": b'"text": {"the river"}\n',
    "with a mark of byte order": b'\xef\xbb\xbf{"text": "the river"}\n',
    "of NUL": b"\0" * 1000 + b"\n",
    "of Latin-1": '{"text": "h\xe4user"}\n'.encode("latin-1"),
    "of nothing": b"\n\n\n",
    "of old ends": b'{"text": "the river"}\r{"text": "a stone"}\r\n',
    "of other ends": '{"text": "the\u2028river\u0085"}\n'.encode(),
    "of two rows": b'{"text": "the river"}{"text": "the river"}\n',
    "of a list": b'["the river"]\n',
    "of escapes": b'{"text": "\\u001b[31m\\u0007", "\\u001b[2J": 1}\n',
    "of one character 1,000,000 times": b'{"text": "' + b"a" * 1_000_000 + b'"}\n',
    "of one number": b"3\n",
}


def _column(path: Path, draw: Random) -> str:
    """Parquet whose columns have other types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    name = draw.choice(table.column_names)
    rows = len(table)
    columns = {
        "numbers": pa.array(range(rows)),
        "nulls": pa.nulls(rows),
        "bytes": pa.array([b"\xff\xfe"] * rows, pa.binary()),
        "lists": pa.array([["a", None]] * rows),
        "structs": pa.array([{"role": 1, "content": {"a": None}}] * rows),
        "lists of structs": pa.array([[{"role": None, "content": None}]] * rows),
        "maps": pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
        "no numbers": pa.array([float("nan")] * rows),
        "dates beyond time": pa.array([2**62] * rows, pa.int64()).cast(pa.timestamp("us")),
        "decimals": pa.array([10**30] * rows, pa.decimal128(38)),
        "a dictionary": pa.array(["a"] * rows).dictionary_encode(),
        "large text": pa.array(["x" * 100_000] * rows, pa.large_string()),
    }
    kind = draw.choice(list(columns))
    changed = table.set_column(table.column_names.index(name), name, columns[kind])
    if draw.random() < 0.2:
        changed, kind = changed.slice(0, 0), "nothing at all"
    pq.write_table(changed, path)
    return f"the column {name} holds {kind}"


def _bomb(path: Path, draw: Random) -> str:
    """Gzip that is a thousand times larger inside."""
    member = gzip.compress(b"a" * (64 << 20), 9)
    start = gzip.compress(b'{"text": "')
    path.write_bytes(start + member * draw.choice((2, 50)))
    return "gzip of a line without end"


def _packed_row(path: Path, draw: Random) -> str:
    plain = path.with_suffix("")
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    what = _row(plain, draw)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return what


def _yaml(path: Path, draw: Random) -> str:
    import yaml

    text, what = damage_json(json.dumps(yaml.safe_load(path.read_text())), draw)
    path.write_text(text, "utf-8")
    return what


def _text_of(texts: dict[str, str], path: Path, draw: Random) -> str:
    name = draw.choice(list(texts))
    path.write_text(texts[name], "utf-8")
    return f"YAML of {name}"


ROWS = (_row, _row, partial(_row, count=100), _lines, _bytes, _entry)
KINDS = (
    Kind(24, "text.jsonl", ROWS, ON_TEXT),
    Kind(20, "chats.jsonl", ROWS, ON_CHATS),
    Kind(18, "pairs.jsonl", ROWS, ON_PAIRS),
    Kind(10, "packed.jsonl.gz", (_packed_row, _bytes, _bytes_at_the_end, _bomb, _entry), ON_TEXT),
    Kind(10, "text.parquet", (_column, _column, _bytes, _bytes_at_the_end, _entry), ON_TEXT),
    Kind(8, "chats.parquet", (_column, _column, _bytes, _bytes_at_the_end), ON_CHATS[:-1]),
    Kind(8, "pairs.parquet", (_column, _column, _bytes, _bytes_at_the_end), ON_PAIRS),
    Kind(4, "long.jsonl", ROWS, ON_LONG_TEXT),
    Kind(6, "text.txt", (_bytes, _entry, _lines), ON_TEXT),
    Kind(10, "prompts.jsonl", ROWS, ON_PROMPTS),
    Kind(4, "prompts.txt", (_bytes, _entry, _lines), ON_PROMPTS),
    Kind(12, "cache", (_json, _json, _bytes, _entry), ON_CACHE),
    Kind(20, "kept/results", (_json, _json, _json, _bytes, _entry), ON_RESULTS),
    Kind(8, "kept.st.results", (_json, _json, _entry), ON_RESULTS),
    Kind(8, "kept.st.metrics.jsonl", ROWS, ON_RESULTS),
    Kind(12, "bench.json", (_json, _json, _bytes, _entry), ON_BENCH),
    Kind(12, "recipe.yaml", (_yaml, _yaml, _bytes, _entry), ON_RECIPES),
    Kind(12, "recipe.yaml", (partial(_text_of, RECIPES),), (*ON_RECIPES, *RUN)),
    Kind(6, "tasks/own_task.yaml", (_yaml, _bytes, _entry), ON_TASKS),
    Kind(6, "tasks/choices.jsonl", ROWS, ON_TASKS),
    Kind(10, "tasks/own_task.yaml", (partial(_text_of, TASKS),), ON_TASKS),
    *(
        Kind(7, f"{name}.partial", (_json, _row, _bytes, _entry), (line,), (name, *KEPT))
        for name, line in RESUMED.items()
    ),
)
