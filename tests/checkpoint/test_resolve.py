"""Names become folders: local paths, aliases, and a hub played by a small local server."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mambactl.checkpoint import embedded
from mambactl.checkpoint.hub_names import ALIASES
from mambactl.checkpoint.resolve import hub_reachable, resolve
from mambactl.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights, pickled",
    "consolidated.safetensors": b"the same weights, renamed",
    "onnx/config.json": b"another format",
    "modeling_odd.py": b"code",
}
PICKLED = {name: FILES[name] for name in ("config.json", "pytorch_model.bin")}
REPOS = {"owner/safe": FILES, "owner/pickled": PICKLED}


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that fetching a model needs; `probes` asked if it is there."""

    probes = 0

    def do_HEAD(self) -> None:
        Hub.probes += self.path == "/"
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.describe("/".join(parts[2:4]))
        files = REPOS.get("/".join(parts[:2]), {})
        name = "/".join(parts[4:])
        if name not in files:
            return self.send(404 if self.path != "/" else 200, b"", body)
        etag = hashlib.sha256(files[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        return self.send(200, files[name], body, headers)

    def describe(self, repo: str) -> None:
        if repo == "owner/gated":
            return self.send(403, b"", True, {"X-Error-Code": "GatedRepo"})
        if repo not in REPOS:
            return self.send(404, b"", True, {"X-Error-Code": "RepoNotFound"})
        if "/revision/" in self.path and not self.path.endswith(("/main", "/v1", COMMIT)):
            return self.send(404, b"", True, {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in self.path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in REPOS[repo].items()
            ]
            return self.send(200, json.dumps(tree).encode(), True)
        siblings = [{"rfilename": name} for name in REPOS[repo]]
        info = {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return self.send(200, json.dumps(info).encode(), True, {"Content-Type": "application/json"})

    def send(self, code: int, data: bytes, body: bool, headers: dict | None = None) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASK = """
import sys
from mambactl.checkpoint.resolve import resolve
from mambactl.errors import ModelError
try:
    # config and weights are two calls
    assert (found := resolve(sys.argv[1])) == resolve(sys.argv[1])
    print(found.path)
except ModelError as error:
    print(f"{error} | {error.hint}")
assert "torch" not in sys.modules
"""


def ask(spec: str, endpoint: str, home: Path, **extra: str) -> str:
    """What resolve says in a process of its own: the hub library reads its settings at import."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        **extra,
    }
    command = [sys.executable, "-c", ASK, spec]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **settings}, check=True
    )
    return done.stdout.strip()


def test_hub_model_is_fetched_once_without_what_is_not_needed(hub: str, tmp_path: Path) -> None:
    Hub.probes = 0
    folder = Path(ask("owner/safe@v1", hub, tmp_path))
    assert Hub.probes == 1
    found = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    wanted = ("config.json", "tokenizer.json", "model.safetensors")
    assert found == {name: FILES[name] for name in wanted}


def test_pickled_weights_come_only_without_safetensors(hub: str, tmp_path: Path) -> None:
    folder = Path(ask("owner/pickled", hub, tmp_path))
    assert (folder / "pytorch_model.bin").read_bytes() == PICKLED["pytorch_model.bin"]
    # and the next time the network may be gone
    assert ask("owner/pickled", "http://127.0.0.1:9", tmp_path) == str(folder)
    assert ask("owner/pickled", hub, tmp_path, HF_HUB_OFFLINE="1") == str(folder)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("owner/gated", "owner/gated is gated on the hub | accept the licence"),
        ("owner/nothing", "the hub has no repository owner/nothing"),
        ("owner/safe@v9", "owner/safe has no revision 'v9'"),
    ],
)
def test_refusals_of_the_hub_are_sentences(spec: str, said: str, hub: str, tmp_path: Path) -> None:
    assert ask(spec, hub, tmp_path).startswith(said)


def test_no_network_and_no_cache_is_a_sentence(tmp_path: Path) -> None:
    answer = ask("owner/safe", "http://127.0.0.1:9", tmp_path)
    assert answer.startswith("owner/safe is not in the local hub cache and the hub cannot be")


def test_a_hub_that_never_answers_costs_two_seconds(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        started = time.monotonic()
        assert not hub_reachable()
        assert time.monotonic() - started < 4


def test_local_kinds_are_told_apart(tmp_path: Path) -> None:
    for name, kind in [("a.st", "file"), ("a.safetensors", "file"), ("a.gguf", "gguf")]:
        (tmp_path / name).touch()
        assert resolve(str(tmp_path / name)).kind == kind
    assert resolve(str(tmp_path)).kind == "folder"
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="unknown file type '.bin'"):
        resolve(str(tmp_path / "pytorch_model.bin"))


def test_a_local_folder_goes_before_an_alias(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama3-8b").mkdir()
    assert resolve("llama3-8b").path == tmp_path / "llama3-8b"


@pytest.mark.parametrize(
    ("spec", "said", "hint"),
    [
        ("", "empty", "folder"),
        ("  ", "empty", "folder"),
        ("./nowhere", "nowhere does not exist", "folder"),
        ("runs/nowhere", "does not exist", "folder"),
        ("t.st", "t.st does not exist", "folder"),
        ("smolm2-135m", "no file, folder or alias named 'smolm2-135m'", "mean smollm2-135m"),
        ("zzz", "no file, folder or alias", "alias"),
    ],
)
def test_unknown_names_are_sentences(spec: str, said: str, hint: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        resolve(spec)
    assert hint in caught.value.hint


def test_unfinished_output_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ModelError, match="only the unfinished out.partial"):
        resolve(str(tmp_path / "out"))


def test_the_embedded_alias_falls_through_to_its_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MAMBACTL_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(embedded, "fetch", lambda: tmp_path / "made")
    assert resolve("smollm2-135m").path == tmp_path / "made"
    with pytest.raises(ModelError, match=ALIASES["smollm2-360m"]):
        resolve("smollm2-360m")
