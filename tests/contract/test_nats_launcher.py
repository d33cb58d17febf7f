"""The launcher of the real NATS server: closed, ours, and gone when it is stopped."""

from __future__ import annotations

import socket
import stat
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.cli.local import nats, ports
from services.core.errors import StateUnavailable, Unavailable
from services.core.nats_connection import connect

if TYPE_CHECKING:
    from tests.conftest import NatsServer


async def test_nobody_enters_without_the_password(nats_server: NatsServer) -> None:
    for login in ({}, {"user": nats_server.user, "password": "wrong"}):
        with pytest.raises(StateUnavailable):
            await connect(nats_server.url, **login)
    config = nats_server.folder / "data" / "nats.conf"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600


def test_awkward_passwords_and_folders_work(tmp_path: Path) -> None:
    folder = tmp_path / 'Ü "x" y'
    folder.mkdir()
    port = ports.choose(["nats"], {})["nats"]
    password = 'a"b\\c $HOME # {x} é'
    nats.start(folder / "data", log=folder / "log", port=port, user="u", password=password).stop(nats.GRACE)
    assert ports.is_free(port)


def test_another_server_on_the_port_is_not_taken_for_ours(nats_server: NatsServer, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="nats"):
        nats.start(
            tmp_path / "data",
            log=tmp_path / "log",
            port=nats_server.port,
            user=nats_server.user,
            password=nats_server.password,
            timeout=timedelta(seconds=5),
        )


def test_a_server_of_another_kind_is_named(tmp_path: Path) -> None:
    with socket.create_server((ports.HOST, 0)) as other, pytest.raises(Unavailable):
        nats.start(
            tmp_path / "data",
            log=tmp_path / "log",
            port=other.getsockname()[1],
            user="u",
            password="p",
            timeout=timedelta(seconds=5),
        )
