"""Nothing that leaves this machine names its folders, its users or the machine."""

import json

import pytest

from mambactl.checkpoint import local_names
from mambactl.checkpoint.hub_names import hub_name
from mambactl.checkpoint.local_names import is_local, local_paths, without_local_names

LINEAGE = {
    "stage": "distill",
    "source": "/home/alice/models/SmolLM2 of Alice/smol.st",
    "teacher": "C:\\Users\\alice\\teacher",
    "parent": {"path": "/mnt/alice-data/runs/convert", "sha256": "ab" * 32},
    "recipe": {
        "data": ["/home/alice/chat.jsonl=0.7", "runs/alice/code.jsonl", "org/set:main@train=0.3"],
        "eval_data": "file:///srv/alice/held.jsonl",
        "task_dir": "~alice/tasks",
        "mixers_from": "../alice/a.st",
        "note": "from alice@node7:/scratch/alice/x, see https://example.org/a/b and tokens/s",
        "command": "mambactl eval --set=data=/home/alice/y.jsonl -o '/home/alice/o.st' a/b",
        "address": "https://alice:secret@example.org/set.jsonl",
        "lr": 0.001,
        "capture": True,
    },
    "metrics": {"held-out": {"/home/alice/chat.jsonl": {"kl": 0.5}}},
    "ancestors": [{"stage": "convert", "source": "alice/llama", "parent": {"path": "/home/alice"}}],
}


def test_a_lineage_with_paths_everywhere() -> None:
    before = json.dumps(LINEAGE)
    public = without_local_names(LINEAGE)
    assert json.dumps(LINEAGE) == before
    recipe = public["recipe"]
    assert public["source"] == "smol.st"
    assert (public["teacher"], public["parent"]["path"]) == ("teacher", "convert")
    assert recipe["data"] == ["chat.jsonl=0.7", "code.jsonl", "org/set:main@train=0.3"]
    assert (recipe["eval_data"], recipe["task_dir"]) == ("held.jsonl", "tasks")
    assert recipe["mixers_from"] == "a.st"
    assert recipe["note"] == "from x, see https://example.org/a/b and tokens/s"
    assert recipe["command"] == "mambactl eval --set=data=y.jsonl -o 'o.st' a/b"
    assert recipe["address"] == "https://example.org/set.jsonl"
    assert (recipe["lr"], recipe["capture"]) == (0.001, True)
    assert public["metrics"] == {"held-out": {"chat.jsonl": {"kl": 0.5}}}
    # an id of the hub is public, a home folder is called after its user
    ancestor = public["ancestors"][0]
    assert (ancestor["source"], ancestor["parent"]["path"]) == ("alice/llama", "~")
    assert json.dumps(public).count("alice") == 1


def test_known_paths_with_spaces_are_found_inside_of_texts() -> None:
    paths = tuple(local_paths(LINEAGE))
    text = f"Made from `{LINEAGE['source']}`.\n<!-- /results -->\n</think> 3 tokens/s"
    assert without_local_names(text, paths) == (
        "Made from `smol.st`.\n<!-- /results -->\n</think> 3 tokens/s"
    )


def test_this_user_and_host_are_not_named(monkeypatch) -> None:
    monkeypatch.setattr(local_names.socket, "gethostname", lambda: "node7.example.org")
    monkeypatch.setattr(local_names.getpass, "getuser", lambda: "alice")
    local_names._machine_names.cache_clear()
    try:
        said = without_local_names("by alice on node7.example.org (node7), see alice/llama")
    finally:
        local_names._machine_names.cache_clear()
    assert said == "by ... on ... (...), see alice/llama"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"),
        ("org/model", "org/model"),
        ("org/model@v1", "org/model"),
        ("runs/model", None),
        ("/a/model", None),
        ("models/t.st", None),
        ("smol.st", None),
        (None, None),
    ],
)
def test_names_on_the_hub(spec: str | None, name: str | None) -> None:
    assert hub_name(spec) == name


def test_a_folder_that_is_there_is_a_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("org/model")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert is_local("org/model")
