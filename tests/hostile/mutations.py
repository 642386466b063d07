"""Damage to files of any kind: to their bytes, to what is at their path, and to JSON."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

# a value's place in JSON: keys and indices from the root
Place = tuple[str | int, ...]

DEPTH = 100_000
# JSON texts, by what they are
VALUES = {
    "5,000 digits": "9" * 5000,
    "minus 5,000 digits": "-" + "9" * 5000,
    "1e400": "1e400",
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "2**63": "9223372036854775808",
    "2**31": "2147483648",
    "10**9": "1000000000",
    "-1": "-1",
    "0": "0",
    "1.5": "1.5",
    "-0.0": "-0.0",
    "1e-320": "1e-320",
    "1e300": "1e300",
    "null": "null",
    "true": "true",
    "{}": "{}",
    "[]": "[]",
    "[[[]]]": "[[[]]]",
    "a list of everything": '[null, 1, "a", {}, [], 1e400, true]',
    "nested lists": "[" * DEPTH + "]" * DEPTH,
    "nested objects": '{"a":' * DEPTH + "1" + "}" * DEPTH,
    "half a character": '"\\ud800"',
    "an empty text": '""',
    "a text of 2 MB": '"' + "long " * 400_000 + '"',
    "NUL": '"\\u0000"',
    "escapes": '"\\u001b]0;owned\\u0007\\u001b[31m\\u202e\\r"',
    "a path upwards": '"../../outside"',
    "an absolute path": '"/etc/passwd"',
    "a device": '"/dev/zero"',
    "a long name": '"' + "n" * 300 + '"',
    "an option": '"--help"',
    "a number as text": '"12"',
    "a format": '"%s{0}{x!r}"',
    "no JSON": "nonsense",
}
_RAW, _KEY = "@RAW@", "@KEY@"


def damage_bytes(content: bytes, draw: Random) -> tuple[bytes, str]:
    """Damage as disks, networks and editors do it."""
    size = len(content)
    at = draw.randrange(size) if size else 0
    # headers matter most, and are small
    if draw.random() < 0.5:
        at = min(at, draw.randrange(2048))
    length = draw.choice((1, 1, 4, 16, 256))
    noise = draw.randbytes(length)
    match draw.choice(("flip", "cut", "insert", "remove", "zero", "repeat", "noise", "ones")):
        case "flip":
            changed = bytearray(content)
            for _ in range(length if size else 0):
                changed[min(size - 1, at + draw.randrange(64))] ^= 1 << draw.randrange(8)
            return bytes(changed), f"{length} bits flipped from byte {at} on"
        case "cut":
            return content[:at], f"cut at byte {at}"
        case "insert":
            return content[:at] + noise + content[at:], f"{length} bytes inserted at {at}"
        case "remove":
            return content[:at] + content[at + length :], f"{length} bytes removed at {at}"
        case "zero":
            return content[:at] + bytes(length) + content[at + length :], f"{length} zeros at {at}"
        case "ones":
            ones = b"\xff" * length
            return content[:at] + ones + content[at + length :], f"{length} bytes 0xff at {at}"
        case "repeat":
            return content[: at + length] + content[at:], f"{length} bytes repeated at {at}"
        case _:
            return content[:at] + noise + content[at + length :], f"{length} bytes of noise at {at}"


def damage_json(text: str, draw: Random) -> tuple[str, str]:
    """JSON with one value, key or pair changed anywhere."""
    tree = json.loads(text)
    name, raw = draw.choice(list(VALUES.items()))
    place = _place(tree, draw)
    where = "/".join(map(str, place)) or "the root"
    if not place:
        return raw, f"{where} is {name}"
    holder = tree
    for key in place[:-1]:
        holder = holder[key]
    key = place[-1]
    kind = draw.choices(("replace", "delete", "repeat", "rename", "add"), (65, 15, 7, 6, 7))[0]
    if kind == "replace" or (isinstance(holder, list) and kind != "delete"):
        holder[key] = _RAW
        return _written(tree, raw), f"{where} is {name}"
    if kind == "delete":
        del holder[key]
        return json.dumps(tree), f"{where} is missing"
    if kind == "rename":
        holder[f"{key}x"] = holder.pop(key)
        return json.dumps(tree), f"{where} has another key"
    new = key if kind == "repeat" else draw.choice(("unheard_of", "__class__", "", "self", "path"))
    holder[_KEY] = _RAW
    changed = _written(tree, raw).replace(f'"{_KEY}"', json.dumps(new))
    return changed, f"{where}: beside it the key {new!r} with {name}"


def _written(tree: Any, raw: str) -> str:
    return json.dumps(tree).replace(f'"{_RAW}"', raw)


def _place(tree: Any, draw: Random) -> Place:
    """A place drawn level by level: a vocabulary must not outweigh all the rest."""
    place: Place = ()
    while isinstance(tree, dict | list) and tree:
        if draw.random() < (0.03 if not place else 0.25):
            break
        key = draw.choice(list(tree)) if isinstance(tree, dict) else draw.randrange(len(tree))
        place, tree = (*place, key), tree[key]
    return place


def damage_entry(path: Path, draw: Random) -> str:
    """Put something else, or nothing, where a file is."""
    kind = draw.choice(list(ENTRIES))
    path.unlink()
    ENTRIES[kind](path)
    return kind


def _hidden(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("x")


ENTRIES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a folder": _hidden,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to a folder": lambda path: path.symlink_to("."),
    "a pipe": lambda path: os.mkfifo(path),
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"\xff"),
    "white space": lambda path: path.write_bytes(b" \n"),
    "a hole of 3 GiB": lambda path: _hole(path),
    "UTF-16": lambda path: path.write_text('{"a": 1}', "utf-16"),
}


def _hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)
