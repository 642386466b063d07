"""The one writer of files that are replaced, and the names it uses."""

from pathlib import Path

import pytest

from mambactl.errors import OutputError
from mambactl.files import canonical, explained, replacing


def test_the_old_content_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as new:
        assert new.parent == tmp_path and new.name.startswith("a.json.")
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_rests_of_a_killed_process_are_replaced_not_followed(tmp_path):
    for name in ("a.json", "a.json.mambactl.partial"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    (tmp_path / "a.json.partial").write_text("somebody's")
    (tmp_path / "precious").write_text("mine")
    with replacing(tmp_path / "a.json") as new:
        new.write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.json": "new",
        "a.json.partial": "somebody's",
        "precious": "mine",
    }
    assert not (tmp_path / "a.json").is_symlink()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [True, False])
def test_a_block_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, error, begun):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as new:
        if begun:
            new.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_that_cannot_take_its_place_is_removed(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(OSError), replacing(tmp_path / "a") as new:
        new.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("place", ["none/a.json", "file/a.json"])
def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path, place):
    (tmp_path / "file").write_text("")
    path = tmp_path / place
    with (
        pytest.raises(OutputError, match=f"cannot write {path}"),
        explained(path, "free some space"),
        replacing(path) as new,
    ):
        new.write_text("new")


def test_a_path_has_one_spelling_and_a_name_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "link").symlink_to("rows.jsonl")
    real = str(Path(tmp_path / "rows.jsonl").resolve())
    assert canonical("rows.jsonl") == canonical("./link") == real
    assert canonical("some/set") == "some/set" and canonical("a" * 5000) == "a" * 5000
