"""Ports: free ones, the same again, and never one that somebody listens on."""

from __future__ import annotations

import socket

import pytest

from services.cli.local import ports
from services.core.errors import ResourceExhausted


def test_chosen_ports_are_free_and_distinct() -> None:
    chosen = ports.choose(["a", "b", "c"], {})
    assert len(set(chosen.values())) == 3
    assert all(port in ports.RANGE and ports.is_free(port) for port in chosen.values())


def test_remembered_ports_are_kept() -> None:
    first = ports.choose(["a", "b"], {})
    assert ports.choose(["a", "b"], first) == first


@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_a_port_with_a_listener_is_not_free(option: int) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, option, 1)
        server.bind((ports.HOST, 0))
        server.listen()
        taken = server.getsockname()[1]
        assert not ports.is_free(taken)
        chosen = ports.choose(["a"], {"a": taken})
    assert chosen["a"] != taken


def test_two_names_never_share_a_remembered_port() -> None:
    port = ports.choose(["a"], {})["a"]
    assert len(set(ports.choose(["a", "b"], {"a": port, "b": port}).values())) == 2


def test_no_free_port_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "is_free", lambda port: False)
    with pytest.raises(ResourceExhausted) as caught:
        ports.choose(["a"], {})
    assert caught.value.hint
