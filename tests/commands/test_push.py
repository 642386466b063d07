"""`push` against a small hub on this machine: what is sent, what is not, and refusals."""

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from fixtures.hub_server import Hub, Repository
from huggingface_hub import constants

import mambactl
from mambactl.checkpoint import hub_files
from mambactl.checkpoint.container import Container
from mambactl.checkpoint.load import load_model
from mambactl.errors import ExitCode

REPO = "org/student"
BASE = "smollm2-135m"
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SET = "org/chats"


@pytest.fixture(scope="module")
def student(save_student, tmp_path_factory) -> Path:
    """A trained student whose lineage names paths, with kept results, as a single file."""
    from mambactl.checkpoint.load import open_checkpoint
    from mambactl.checkpoint.save import save_model

    place = tmp_path_factory.mktemp("pushed")
    made = save_student(place / "made.st")
    with open_checkpoint(str(made)) as reader:
        record, files = dict(reader.lineage), dict(reader.files)
    private = str(place / "private" / "chat.jsonl")
    settings = json.loads(files["tokenizer_config.json"]) | {"name_or_path": str(place / "teacher")}
    files["tokenizer_config.json"] = json.dumps(settings)
    record |= {
        "stage": "distill",
        "source": BASE,
        "teacher": str(place / "teacher"),
        "recipe": {"data": [private, f"{SET}@train=0.5"]},
        "metrics": {"logits": {"steps": 200, "tokens": 1_234_567, "seconds": 89.6}},
        "ancestors": [{"stage": "convert", "parent": {"path": str(place)}, "recipe": {}}],
    }
    out = save_model(load_model(str(made)), place / "student.st", files, record)
    results = place / "student.st.results"
    results.mkdir()
    kept = {
        "command": f"mambactl eval {out} --data {private}",
        "checkpoint": str(out),
        "teacher": str(place / "teacher"),
        "metrics": {
            "fidelity": {"chat": {"kl": 0.25, "agreement": 0.9}},
            "tasks": {"arc_easy": {"acc": 0.5}},
        },
    }
    (results / "eval-chat.json").write_text(json.dumps(kept))
    return out


@pytest.fixture
def folder(student: Path, tmp_path: Path) -> Path:
    """The same checkpoint as a folder."""
    from mambactl.checkpoint.load import open_strict
    from mambactl.checkpoint.resolve import resolve

    out = tmp_path / "student"
    reader, adapted = open_strict(resolve(str(student)))
    with reader:
        file = Container(out, False, adapted.config, reader.files, reader.lineage)
        names = reader.names()
        file.plan({name: (reader.shape(name), reader.dtype(name)) for name in names})
        for name in names:
            file.write(name, reader.get(name))
        file.close()
    return out


def read_back(hub: Hub, out: Path) -> Path:
    """A folder with the files of the repository."""
    out.mkdir()
    for name, data in hub.repositories[REPO].files.items():
        (out / name).write_bytes(data)
    return out


def front_of(hub: Hub) -> dict:
    return yaml.safe_load(hub.repositories[REPO].files["README.md"].decode().split("---")[1])


def test_a_single_file_becomes_a_private_folder(cli, hub: Hub, student: Path, tmp_path) -> None:
    before = student.read_bytes()
    done = cli("push", str(student), REPO)
    assert (done.code, done.out) == (0, f"{hub.url}/{REPO}\n")
    listed = done.err.partition("sending")[0]
    assert "model.safetensors" in listed and "README.md" in listed and "bytes" in listed
    assert hub.repositories[REPO].private and hub.repositories[REPO].commits == 1
    assert student.read_bytes() == before
    copy = read_back(hub, tmp_path / "copy")
    one, other = (load_model(str(path)).state_dict() for path in (student, copy))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    # no folder of this machine, in no file
    for name, data in hub.repositories[REPO].files.items():
        assert str(student.parent).encode() not in data, name
        assert str(Path.home()).encode() + b"/" not in data, name
    lineage = json.loads((copy / "mambactl.json").read_text())
    assert lineage["recipe"]["data"] == ["chat.jsonl", f"{SET}@train=0.5"]
    assert lineage["teacher"] == "teacher"
    assert json.loads((copy / "tokenizer_config.json").read_text())["name_or_path"] == "teacher"


def test_the_same_again_sends_nothing(cli, hub: Hub, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert cli("push", str(folder), REPO).code == 0
    assert hub.writes() == ["repos/create", "/large/", "/commit/"]
    hub.asked.clear()
    again = cli("push", str(folder), REPO, "--json")
    assert again.code == 0 and "nothing is sent" in again.err
    found = json.loads(again.out)
    assert (found["sent"], found["removed"], found["bytes"]) == ([], [], 0)
    assert hub.writes() == [] and hub.repositories[REPO].commits == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_only_what_changed_is_sent_and_old_weights_go(cli, hub: Hub, folder: Path) -> None:
    cli("push", str(folder), REPO)
    held = hub.repositories[REPO].files
    held["model-00001-of-00002.safetensors"] = b"of an earlier push"
    held["notes.md"] = b"of a person"
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"top_k": 3}))
    hub.asked.clear()
    found = json.loads(cli("push", str(folder), REPO, "--json").out)
    assert found["sent"] == ["generation_config.json"]
    assert found["removed"] == ["model-00001-of-00002.safetensors"]
    assert hub.writes() == ["/commit/"]
    assert "notes.md" in held and "model-00001-of-00002.safetensors" not in held


def test_the_card_says_where_from_how_and_how_good(cli, hub: Hub, student: Path) -> None:
    front = {"license": "apache-2.0", "language": ["en"], "tags": ["other"]}
    hub.repositories[BASE_ID] = Repository(False, front=front)
    assert cli("push", str(student), REPO).code == 0
    found = front_of(hub)
    assert (found["base_model"], found["license"]) == (BASE_ID, "apache-2.0")
    assert (found["language"], found["datasets"]) == (["en"], [SET])
    (index,) = found["model-index"]
    values = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert values[("chat", "kl")] == 0.25 and values[("arc_easy", "acc")] == 0.5
    card = hub.repositories[REPO].files["README.md"].decode()
    assert (
        "| distill, logits | 200 | 1,234,567 | 90 | `chat.jsonl`, `org/chats@train=0.5` |" in card
    )
    assert "## Limits" in card and "## Results" in card


def test_what_a_person_wrote_into_the_card_stays(cli, hub: Hub, folder: Path) -> None:
    card = folder / "README.md"
    text = card.read_text().replace("---\n", "---\nlicense: mit\n", 1)
    card.write_text(f"{text}\nThanks to everybody.\n")
    hub.repositories[BASE_ID] = Repository(False, front={"license": "apache-2.0"})
    assert cli("push", str(folder), REPO).code == 0
    assert front_of(hub)["license"] == "mit"
    assert "Thanks to everybody." in hub.repositories[REPO].files["README.md"].decode()


def test_the_example_of_the_card_runs(cli, hub: Hub, folder: Path, tmp_path, capfd) -> None:
    cli("push", str(folder), REPO)
    copy = read_back(hub, tmp_path / "copy")
    code = (copy / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert f'"{REPO}"' in code
    capfd.readouterr()
    exec(compile(code.replace(REPO, str(copy)), "README.md", "exec"), {})
    assert capfd.readouterr().out.strip()


def test_a_dry_run_sends_nothing(cli, hub: Hub, student: Path) -> None:
    done = cli("push", str(student), REPO, "--dry-run")
    assert (done.code, done.out) == (0, f"{hub.url}/{REPO}\n")
    assert "model.safetensors" in done.err and "nothing is sent" in done.err
    assert hub.asked == []


def test_public_is_asked_for(cli, hub: Hub, student: Path) -> None:
    assert cli("push", str(student), REPO, "--public").code == 0
    assert not hub.repositories[REPO].private
    refused = cli("push", str(student), REPO)
    assert refused.code == ExitCode.USAGE and "add --public" in refused.err
    hub.repositories[REPO].private = True
    assert "stays so" in cli("push", str(student), REPO, "--public").err


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("/api/models/", 401, "hf auth login"),
        ("repos/create", 403, "may write for org"),
        ("/commit/", 403, "may write for org"),
        ("/commit/", 409, "somebody else"),
        ("objects/batch", 403, "may write for org"),
        ("/preupload/", 500, "run the same command again"),
        ("/large/", None, "what has arrived is not sent twice"),
        ("/commit/", None, "what has arrived is not sent twice"),
    ],
)
def test_refusals_are_sentences(
    cli, hub: Hub, folder: Path, part: str, status: int | None, said: str
) -> None:
    hub.refusals[part] = status
    done = cli("push", str(folder), REPO)
    assert (done.code, done.out) == (ExitCode.RESOURCE, "")
    assert said in done.err and "Traceback" not in done.err
    assert REPO not in hub.repositories or hub.repositories[REPO].commits == 0
    hub.refusals.clear()
    hub.asked.clear()
    arrived = bool(hub.stored)
    assert cli("push", str(folder), REPO).code == 0
    assert ("/large/" in hub.writes()) != arrived


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing_half_done(
    cli, hub: Hub, student: Path, tmp_path: Path, monkeypatch, number: signal.Signals, shards: int
) -> None:
    place, ended, first = tmp_path / "unpacked", threading.Event(), threading.Lock()
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    # the library uploads several files in threads, which it waits for
    size = student.stat().st_size / shards + 1e4
    monkeypatch.setattr(hub_files, "Container", partial(Container, max_shard_bytes=size))
    found = []

    def stop() -> None:
        if first.acquire(blocking=False):
            found.extend(place.rglob("*.safetensors"))
            os.kill(os.getpid(), number)
        # a large file takes longer than anybody waits
        ended.wait(8)

    hub.events["/large/"] = stop
    started = time.monotonic()
    done = cli("push", str(student), REPO)
    took = time.monotonic() - started
    ended.set()
    assert (done.code, done.out) == (128 + number, "")
    assert f"error: stopped by {number.name}\nhint: run it again" in done.err
    assert "Traceback" not in done.err and took < 6
    assert len(found) == shards and list(place.iterdir()) == []
    assert hub.repositories[REPO].commits == 0
    hub.events.clear()
    assert cli("push", str(student), REPO).code == 0


def test_a_wrong_token(cli, hub: Hub, student: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = cli("push", str(student), REPO)
    assert done.code == ExitCode.RESOURCE and "hf auth login" in done.err
    assert hub.writes() == []


def test_no_token_and_no_network(cli, hub: Hub, student: Path, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    done = cli("push", str(student), REPO)
    assert done.code == ExitCode.RESOURCE
    assert "hf auth login" in done.err and "HF_TOKEN" in done.err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = cli("push", str(student), REPO)
    assert done.code == ExitCode.RESOURCE and "unset HF_HUB_OFFLINE" in done.err
    assert hub.asked == []


@pytest.mark.parametrize("name", ["student", "a/b/c", "org/", "org/a b", "org/-x", "org/x.git"])
def test_wrong_names(cli, hub: Hub, student: Path, name: str) -> None:
    done = cli("push", str(student), name)
    assert done.code == ExitCode.USAGE and "give org/name" in done.err
    assert hub.asked == []


def test_a_folder_called_like_an_alias_is_no_base(cli, hub: Hub, folder: Path) -> None:
    file = folder / "mambactl.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"source": f"/models/{BASE}"}))
    (folder / "README.md").unlink()
    assert cli("push", str(folder), REPO).code == 0
    assert "base_model" not in front_of(hub)


def test_a_header_with_a_path_is_refused(cli, hub: Hub, folder: Path, student: Path) -> None:
    # such a file carries its lineage in the header
    shutil.copyfile(student, folder / "model.safetensors")
    done = cli("push", "-", REPO, stdin=f"{folder}\n")
    assert done.code == ExitCode.MODEL and "names a path" in done.err
    assert hub.writes() == []


def test_an_address_of_no_hub(cli, hub: Hub, student: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://[none")
    done = cli("push", str(student), REPO)
    assert done.code == ExitCode.RESOURCE and "Traceback" not in done.err


def test_models_of_others_are_refused(cli, hub: Hub, tiny_llama_dir: Path, tmp_path) -> None:
    done = cli("push", str(tiny_llama_dir), REPO)
    assert done.code == ExitCode.MODEL and "mambactl did not make it" in done.err
    assert hub.asked == []


def test_an_export_keeps_its_own_example(cli, hub: Hub, tiny_llama_dir: Path) -> None:
    assert cli("export", str(tiny_llama_dir), "-o", "hf", "--no-check").code == 0
    assert cli("push", "hf", REPO).code == 0
    files = hub.repositories[REPO].files
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in files["README.md"].decode()
    assert "modeling_mambactl.py" not in files and "model.safetensors" in files
    assert "config.json" in files


def test_an_export_keeps_its_second_configuration(cli, hub: Hub, tiny_llama_dir: Path) -> None:
    form = ("--form", "portable", "--init", "reference")
    assert cli("convert", str(tiny_llama_dir), *form, "--ratio", "0.5", "-o", "r.st").code == 0
    to = ("--to", "mambainllama", "-o", "released", "--no-check")
    assert cli("export", "r.st", *to).code == 0
    assert cli("push", "released", REPO).code == 0
    content = Path("released", "mamba_config.json").read_bytes()
    assert hub.repositories[REPO].files["mamba_config.json"] == content


def test_python_does_the_same(hub: Hub, student: Path) -> None:
    made = mambactl.push(student, repo=REPO)
    assert made.text == f"{hub.url}/{REPO}"
    assert mambactl.push(str(student), repo=REPO).metrics["sent"] == []
