"""Rows are the same with and without what was kept of them, and nothing kept is believed."""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mambactl.data import format as encoding
from mambactl.data import token_cache
from mambactl.data.bad_rows import BadRows
from mambactl.data.encoding import Example
from mambactl.data.format import Rules, encode_rows
from mambactl.data.sources import load_rows
from mambactl.data.token_cache import Rows, TokenCache, drop_oldest, read_rows_of
from mambactl.errors import ModelError

WORDS = ["the", "old", "king", "saw", "a", "river", "and", "two", "small", "trees", "by", "house"]
ROWS = 40
REFUSES = "{% if messages[0]['content'] == 'tree' %}{{ raise_exception('no trees') }}{% endif %}"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch) -> Path:
    """The folder of entries; files of any size get one."""
    monkeypatch.setenv("MAMBACTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 0)
    return tmp_path / "cache" / token_cache.FOLDER


def text(number: int) -> str:
    return " ".join(WORDS[: 1 + number % len(WORDS)])


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Texts and chats, one behind the other."""
    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        asked = {"role": "user", "content": text(number)}
        told = {"role": "assistant", "content": text(number + 3)}
        rows.append({"messages": [asked, told]} if number % 2 else {"text": text(number)})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tokenised(monkeypatch) -> list[int]:
    """Numbers of rows that the calls of the tokenizer got."""
    calls: list[int] = []
    real = encoding._Encoder.many

    def counting(self: Any, rows: Any) -> list[Example]:
        calls.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(encoding._Encoder, "many", counting)
    return calls


def same(one: list[Example], other: list[Example]) -> bool:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for mine, theirs in zip(a, b, strict=True):
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    return True


def entry_of(kept: Path) -> Path:
    (entry,) = kept.iterdir()
    return entry


@pytest.mark.parametrize("assistant_only", [False, True])
def test_a_file_is_tokenised_once(
    kept, data, tokenised, tiny_tokenizer, monkeypatch, assistant_only
) -> None:
    rows = load_rows([data])
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "LEAST_BYTES", 1 << 40)
        plain = encode_rows(rows, tiny_tokenizer, assistant_only, seed=3)
    assert not kept.exists() and sum(tokenised) == ROWS
    assert same(encode_rows(rows, tiny_tokenizer, assistant_only, seed=3), plain)
    assert sum(tokenised) == 2 * ROWS
    # read again, in another order, and with a budget
    again = encode_rows(load_rows([data]), tiny_tokenizer, assistant_only, seed=3)
    assert same(again, plain) and sum(tokenised) == 2 * ROWS
    other = encode_rows(load_rows([data]), tiny_tokenizer, assistant_only, seed=4, max_tokens=99)
    assert 0 < len(other) < ROWS and sum(tokenised) == 2 * ROWS


def test_only_what_is_missing_is_tokenised(kept, data, tokenised, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "TOGETHER", 4)
    rows = load_rows([data])
    some = len(encode_rows(rows, tiny_tokenizer, max_tokens=60))
    assert some < ROWS // 2
    first = sum(tokenised)
    whole = encode_rows(rows, tiny_tokenizer)
    # what lay in the last call beyond the budget was not handed out
    assert sum(tokenised) - first <= ROWS - some
    assert len(read_rows_of(entry_of(kept), len(tiny_tokenizer)).digests) == len(
        {token_cache.digest_of(row) for row in rows}
    )
    tokenised.clear()
    assert same(encode_rows(rows, tiny_tokenizer), whole) and not sum(tokenised)


def changed_template(tokenizer: Any, monkeypatch: Any) -> None:
    tokenizer.chat_template += " "


def changed_words(tokenizer: Any, monkeypatch: Any) -> None:
    tokenizer.add_tokens(["elephant"])


def changed_encoding(tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(token_cache, "ENCODING", -1)


def changed_library(tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(token_cache, "version", lambda name: "0")


@pytest.mark.parametrize(
    "change", [changed_template, changed_words, changed_encoding, changed_library]
)
def test_what_decides_tokens_makes_another_entry(
    kept, data, tokenised, tiny_tokenizer, monkeypatch, change: Callable[..., None]
) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    encode_rows(load_rows([data]), tokenizer)
    tokenised.clear()
    change(tokenizer, monkeypatch)
    encode_rows(load_rows([data]), tokenizer)
    assert sum(tokenised) == ROWS and len(list(kept.iterdir())) == 2


def test_so_do_the_file_and_what_is_learned(kept, data, tokenised, tiny_tokenizer) -> None:
    encode_rows(load_rows([data]), tiny_tokenizer)
    encode_rows(load_rows([data]), tiny_tokenizer, assistant_only=True)
    with open(data, "a") as file:
        file.write('{"text": "king"}\n')
    encode_rows(load_rows([data]), tiny_tokenizer)
    assert sum(tokenised) == 3 * ROWS + 1 and len(list(kept.iterdir())) == 3


@pytest.mark.parametrize("asks", [False, True])
def test_a_template_that_prints_the_date_counts_for_a_day(
    kept, data, tokenised, tiny_tokenizer, asks: bool
) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    if asks:
        tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    encode_rows(load_rows([data]), tokenizer)
    tokenised.clear()
    encode_rows(load_rows([data]), tokenizer, rules=Rules(day=date(2001, 1, 1)))
    assert bool(sum(tokenised)) is asks
    tokenised.clear()
    encode_rows(load_rows([data]), tokenizer, rules=Rules(day=date(2001, 1, 1)))
    assert not tokenised or not sum(tokenised)


def rewritten(entry: Path, **parts: np.ndarray) -> None:
    """An entry with other parts whose digest is right."""
    rows = Rows(**(load_file(entry) | parts))
    save_file(rows._asdict(), entry, metadata={"sha256": rows.sha256})


def truncate(entry: Path) -> None:
    os.truncate(entry, entry.stat().st_size // 2)


def flip(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[-40] ^= 1
    entry.write_bytes(content)


def empty(entry: Path) -> None:
    entry.write_bytes(b"")


def unknown_tokens(entry: Path) -> None:
    rewritten(entry, ids=np.full_like(load_file(entry)["ids"], 97))


def negative_tokens(entry: Path) -> None:
    rewritten(entry, ids=np.full_like(load_file(entry)["ids"], -1))


def wide_tokens(entry: Path) -> None:
    rewritten(entry, ids=load_file(entry)["ids"].astype(np.int64))


def crossed(entry: Path) -> None:
    starts = load_file(entry)["starts"]
    starts[1:-1] = starts[1:-1][::-1]
    rewritten(entry, starts=starts)


def beyond(entry: Path) -> None:
    starts = load_file(entry)["starts"]
    starts[-1] += 1000
    rewritten(entry, starts=starts)


def short_mask(entry: Path) -> None:
    rewritten(entry, mask=load_file(entry)["mask"][:-3])


def short_digests(entry: Path) -> None:
    rewritten(entry, digests=load_file(entry)["digests"][:, :8].copy())


def other_parts(entry: Path) -> None:
    save_file({"ids": np.zeros(3, np.int32)}, entry)


def writable(entry: Path) -> None:
    entry.chmod(0o666)


def link(entry: Path) -> None:
    entry.rename(entry.with_name("elsewhere"))
    entry.symlink_to("elsewhere")


def gone(entry: Path) -> None:
    entry.unlink()
    entry.symlink_to("nowhere")


def endless(entry: Path) -> None:
    os.truncate(entry, token_cache.MOST_BYTES + 1)


FAULTS = (
    *(gone, endless),
    *(truncate, flip, empty, unknown_tokens, negative_tokens, wide_tokens, crossed, beyond),
    *(short_mask, short_digests, other_parts, writable, link),
)


@pytest.mark.parametrize("damage", FAULTS, ids=lambda each: each.__name__)
def test_an_entry_with_a_fault_is_named_and_made_again(
    kept, data, tokenised, tiny_tokenizer, capfd, damage: Callable[[Path], None]
) -> None:
    whole = encode_rows(load_rows([data]), tiny_tokenizer)
    entry = entry_of(kept)
    damage(entry)
    with pytest.raises(ModelError):
        read_rows_of(entry, len(tiny_tokenizer))
    tokenised.clear()
    assert same(encode_rows(load_rows([data]), tiny_tokenizer), whole)
    assert sum(tokenised) == ROWS
    said = capfd.readouterr().err
    assert "warning: " in said and str(entry) in said and "tokenised again" in said
    assert len(read_rows_of(entry, len(tiny_tokenizer)).ids)
    assert same(encode_rows(load_rows([data]), tiny_tokenizer), whole)
    assert sum(tokenised) == ROWS


def test_a_folder_that_cannot_be_written_is_a_warning(
    kept, data, tiny_tokenizer, capfd, tmp_path
) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert encode_rows(load_rows([data]), tiny_tokenizer)
    assert "is not written" in capfd.readouterr().err


def test_two_processes_share_an_entry(kept, data, tokenised, tiny_tokenizer) -> None:
    rows = load_rows([data])
    examples = encode_rows(rows, tiny_tokenizer, max_tokens=20)
    entry = entry_of(kept)
    one, other = (TokenCache(tiny_tokenizer, False) for _ in range(2))
    for number, cache in enumerate((one, other)):
        assert np.array_equal(cache.find(rows[0]).input_ids, examples[0].input_ids)
        cache.add(rows[-1 - number], examples[0])
    one.publish()
    other.publish()
    # the last one wins; what it does not know is tokenised once more
    assert TokenCache(tiny_tokenizer, False).find(rows[-2]) is not None
    assert list(kept.iterdir()) == [entry]


def test_the_oldest_entries_go_first(tmp_path) -> None:
    for number in range(4):
        path = tmp_path / f"{number}{token_cache.SUFFIX}"
        path.write_bytes(b"x" * 100)
        os.utime(path, (number, number))
    # left by a process that was stopped
    (tmp_path / f"9{token_cache.SUFFIX}.mambactl.partial").write_bytes(b"x" * 50)
    os.utime(tmp_path / f"9{token_cache.SUFFIX}.mambactl.partial", (0, 0))
    (tmp_path / "of somebody else").write_bytes(b"x" * 1000)
    drop_oldest(tmp_path, 250)
    left = sorted(path.name.partition(".")[0] for path in tmp_path.iterdir())
    assert left == ["2", "3", "of somebody else"]


def test_a_row_that_the_template_refuses_is_never_kept(
    kept, tmp_path, tokenised, tiny_tokenizer
) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REFUSES + tokenizer.chat_template
    path = tmp_path / "chats.jsonl"
    chats = [[{"role": "user", "content": word}] for word in ("king", "tree", "river")]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    for _ in range(2):
        bad = BadRows(skip=True)
        assert len(encode_rows(load_rows([str(path)]), tokenizer, bad=bad)) == 2
        assert [each.where for each in bad.found] == [f"{path}, row 2"]
    # together, one by one, and the refused one alone, twice as it is named
    assert tokenised == [3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("bad_row", [None, 150])
def test_chats_are_rendered_by_several_processes(
    kept, tmp_path, tiny_tokenizer, monkeypatch, bad_row: int | None
) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REFUSES + tokenizer.chat_template
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for number in range(200):
            said = "tree" if number == bad_row else text(number)
            turns = [{"role": "user", "content": said}, {"role": "assistant", "content": "a"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    rows = load_rows([str(path)])
    found: list[tuple[list[Example], list[str]]] = []
    for cores in (1, 3):
        monkeypatch.setattr("mambactl.data.renderers.os.cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(token_cache, "LEAST_BYTES", 1 << 40)
        bad = BadRows(skip=True)
        examples = encode_rows(rows, tokenizer, assistant_only=True, bad=bad)
        found.append((examples, [each.where for each in bad.found]))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert len(found[0][1]) == (bad_row is not None)
