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
from huggingface_hub import constants

from mambactl.checkpoint import embedded
from mambactl.checkpoint.hub_names import ALIASES
from mambactl.checkpoint.resolve import _hub, hub_reachable, resolve
from mambactl.errors import ExitCode, ModelError

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
# of repositories that not everybody reads, the token that does
TOKEN = "hf_of_this_test"
CLOSED = {"owner/gated", "owner/private"}
REPOS |= dict.fromkeys(CLOSED, FILES)
# the hub says much of a gated repository to everybody, and refuses its files
NO_ACCESS = {"X-Error-Code": "GatedRepo"}
WRONG_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}


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
        if (repo := "/".join(parts[:2])) in CLOSED and (refused := self.refused(repo)):
            return self.send(refused[0], b"", body, refused[1])
        files = REPOS.get(repo, {})
        name = "/".join(parts[4:])
        if name not in files:
            return self.send(404 if self.path != "/" else 200, b"", body)
        etag = hashlib.sha256(files[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        return self.send(200, files[name], body, headers)

    def describe(self, repo: str) -> None:
        status = {"owner/forbidden": 403, "owner/busy": 429, "owner/broken": 500}.get(repo)
        if status is not None:
            return self.send(status, b"", True)
        if repo == "owner/private" and (refused := self.refused(repo)):
            return self.send(refused[0], b"", True, refused[1])
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

    def refused(self, repo: str) -> tuple[int, dict[str, str]] | None:
        """Status and headers where the token does not open a repository, as the hub gives them."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given == TOKEN:
            return None
        if given not in ("", "hf_of_another_account"):
            return 401, WRONG_TOKEN
        if repo == "owner/gated":
            return 403 if given else 401, NO_ACCESS
        return 404 if given else 401, {"X-Error-Code": "RepoNotFound"}

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
    """The answer of resolve in its own process: the hub library reads its settings at import."""
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


@pytest.fixture
def reading(hub: str, tmp_path: Path, monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """This process asks that hub, with an empty cache and nobody logged in."""
    from huggingface_hub import close_session

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # read when the library is imported
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": hub,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "none"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    _hub.cache_clear()
    close_session()
    yield monkeypatch
    _hub.cache_clear()
    close_session()


def refusal(cli, spec: str) -> str:
    """The output of a command for a model that it may not read."""
    done = cli("inspect", spec)
    assert (done.code, done.out) == (ExitCode.MODEL, "")
    assert "Traceback" not in done.err
    return done.err


@pytest.mark.parametrize(
    ("spec", "token", "said", "hint"),
    [
        ("owner/gated", None, "gated on the hub, and nobody is logged in", "accept its terms on"),
        ("owner/gated", "hf_of_another_account", "the token has no access", "accept its terms on"),
        ("owner/private", None, "no repository owner/private, or it is private", "hf auth login"),
        ("owner/private", "hf_of_another_account", "or it is private", "set HF_TOKEN to"),
        ("owner/private", "hf_wrong", "does not know the token (HTTP 401", "set HF_TOKEN to"),
        ("owner/nothing", None, "the hub has no repository owner/nothing", "check the spelling"),
        ("owner/safe@v9", None, "owner/safe has no revision 'v9'", "owner/safe/tree/main"),
        ("owner/forbidden", TOKEN, "may not read owner/forbidden (HTTP 403", "hf auth login"),
        ("owner/busy", None, "too many requests (HTTP 429", "in some minutes"),
        ("owner/broken", None, "the hub failed on owner/broken (HTTP 500", "command again"),
    ],
)
def test_refusals_of_the_hub_are_sentences(reading, cli, spec, token, said, hint) -> None:
    if token is not None:
        reading.setenv("HF_TOKEN", token)
    sentence, _, rest = refusal(cli, spec).partition("hint: ")
    assert said in sentence and hint in rest
    if spec == "owner/gated":
        assert f"{constants.ENDPOINT}/owner/gated" in rest and "hf auth login" in rest


@pytest.mark.parametrize("spec", sorted(CLOSED))
def test_a_token_opens_what_is_closed(reading, spec: str) -> None:
    reading.setenv("HF_TOKEN", TOKEN)
    assert (resolve(spec).path / "model.safetensors").read_bytes() == b"weights"


def test_offline_says_so_with_what_to_type(reading, cli) -> None:
    reading.setenv("HF_HUB_OFFLINE", "1")
    said = refusal(cli, "owner/safe")
    assert "not in the local hub cache and HF_HUB_OFFLINE is set" in said
    assert "hint: unset HF_HUB_OFFLINE" in said


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
