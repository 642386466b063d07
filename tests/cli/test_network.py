"""Traffic on the network: nothing for local models, and nothing to the hub when offline."""

import socket

import pytest
from huggingface_hub import constants

from mambactl.checkpoint.resolve import hub_reachable
from mambactl.errors import ModelError


@pytest.fixture
def connections(monkeypatch) -> list[object]:
    """Addresses that were asked for, none of which answers."""
    asked: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def test_local_models_need_no_network(cli, connections, monkeypatch, tiny_llama_dir) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert cli("convert", str(tiny_llama_dir), "-o", "s.st", "--device", "cpu").code == 0
    few = ("--max-new-tokens", "2", "--device", "cpu")
    assert cli("generate", "s.st", "-p", "the", *few).code == 0
    assert cli("inspect", "s.st").code == 0
    assert connections == []
    # the same would be seen
    assert not hub_reachable() and connections != []


def test_offline_asks_no_hub(connections, monkeypatch) -> None:
    from mambactl.checkpoint import resolve

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="not in the local hub cache"):
        resolve.resolve("nobody/nothing-at-all")
    assert connections == []
