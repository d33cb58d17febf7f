"""TLS of gRPC and NATS with real handshakes: who trusts whom, and certificates that are renewed while all runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from codegraft.ingest.v1 import project_pb2, project_pb2_grpc
from services.cli.local import nats, ports
from services.cli.local.process import Child
from services.client import Access, Addresses, AsyncCodegraft, Codegraft
from services.core import errors, nats_connection
from services.core.config import CoreSettings
from services.core.rpc import tls
from services.core.rpc.client import OPTIONS, channel
from services.core.rpc.interceptors import CallInterceptor
from services.core.rpc.status import from_rpc
from services.core.rpc.tls import ClientFiles
from services.core.runtime import nats_tls
from tests.certificates import Authority


class Projects(project_pb2_grpc.ProjectServiceServicer):
    async def GetProject(self, request: Any, context: Any) -> Any:
        return project_pb2.GetProjectResponse(project=project_pb2.Project(name=request.name))


@contextlib.asynccontextmanager
async def serving(settings: CoreSettings) -> AsyncIterator[Addresses]:
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    project_pb2_grpc.add_ProjectServiceServicer_to_server(Projects(), server)
    credentials = tls.server_credentials(settings)
    assert credentials is not None
    address = f"localhost:{server.add_secure_port('127.0.0.1:0', credentials)}"
    await server.start()
    yield Addresses(address, address, address, address)
    await server.stop(None)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def settings(authority: Authority, subject: str = "server", **more: Any) -> CoreSettings:
    cert, key = authority.sign(subject)
    return CoreSettings(tls_cert_file=cert, tls_key_file=key, **more)


async def ask(addresses: Addresses, files: ClientFiles | None) -> None:
    """One call over a new connection, without retries.

    Raises:
        Unavailable: no connection came about.
    """
    opened = (
        grpc.aio.secure_channel(addresses.ingest, files.credentials(), options=OPTIONS)
        if files
        else grpc.aio.insecure_channel(addresses.ingest, options=OPTIONS)
    )
    async with opened:
        stub = project_pb2_grpc.ProjectServiceStub(opened)
        try:
            await stub.GetProject(project_pb2.GetProjectRequest(name="projects/p"), timeout=10)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None


async def test_who_trusts_the_authority_is_answered_and_nobody_else(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    async with serving(settings(authority)) as addresses:
        await ask(addresses, ClientFiles(authority.file))
        with pytest.raises(errors.Unavailable):
            await ask(addresses, ClientFiles(Authority(tmp_path / "other").file))
        with pytest.raises(errors.Unavailable):
            await ask(addresses, None)
        async with AsyncCodegraft(addresses, access=Access(tls=ClientFiles(authority.file))) as client:
            assert (await client.projects.get("p")).name == "projects/p"
        with Codegraft(addresses, access=Access(tls=ClientFiles(authority.file))) as blocking:
            assert (await asyncio.to_thread(blocking.projects.get, "p")).name == "projects/p"


async def test_mutual_tls_asks_callers_for_a_certificate(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.sign("client")
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "stranger").sign("client")
    async with serving(settings(authority, tls_client_ca_file=authority.file)) as addresses:
        await ask(addresses, ClientFiles(authority.file, cert, key))
        for files in (ClientFiles(authority.file), ClientFiles(authority.file, *stranger)):
            with pytest.raises(errors.Unavailable):
                await ask(addresses, files)
        # How services call each other.
        identity = CoreSettings(tls_ca_file=authority.file, tls_cert_file=cert, tls_key_file=key)
        async with channel(addresses.ingest, identity) as opened:
            stub = project_pb2_grpc.ProjectServiceStub(opened)
            assert (await stub.GetProject(project_pb2.GetProjectRequest(name="projects/p"))).project.name


async def test_a_renewed_certificate_counts_from_the_next_connection_on(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    new = Authority(tmp_path / "new")
    given = settings(authority)
    assert given.tls_cert_file and given.tls_key_file
    async with serving(given) as addresses:
        await ask(addresses, ClientFiles(authority.file))
        cert, key = new.sign("server")
        given.tls_cert_file.write_bytes(cert.read_bytes())
        await ask(addresses, ClientFiles(authority.file))  # half of the renewal: the pair does not fit
        given.tls_key_file.write_bytes(key.read_bytes())
        await ask(addresses, ClientFiles(new.file))
        with pytest.raises(errors.Unavailable):
            await ask(addresses, ClientFiles(authority.file))
        given.tls_cert_file.unlink()
        await ask(addresses, ClientFiles(new.file))


def test_files_that_cannot_be_used_are_named_at_the_start(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.sign("server")
    other = authority.sign("other")
    (tmp_path / "text").write_text("no certificate")
    for given in (
        {"tls_cert_file": cert},
        {"tls_key_file": key},
        {"tls_client_ca_file": authority.file},
        {"tls_cert_file": cert, "tls_key_file": other[1]},
        {"tls_cert_file": tmp_path / "text", "tls_key_file": key},
        {"tls_cert_file": cert, "tls_key_file": key, "tls_client_ca_file": tmp_path / "text"},
    ):
        with pytest.raises(errors.InvalidArgument) as refused:
            tls.server_credentials(CoreSettings(**given))  # type: ignore[arg-type]
        assert refused.value.field == "CODEGRAFT_TLS_CERT_FILE"
    with pytest.raises(ValueError, match="is no file"):
        CoreSettings(tls_ca_file=tmp_path / "nowhere")
    with pytest.raises(errors.InvalidArgument, match="nowhere"):
        ClientFiles(tmp_path / "nowhere").credentials()
    assert tls.server_credentials(CoreSettings()) is None


def test_a_service_listens_with_tls_and_refuses_to_be_open(authority: Authority) -> None:
    cert, key = authority.sign("server")
    process = [sys.executable, str(Path(__file__).with_name("rpc_process.py"))]
    environment = os.environ | {"CODEGRAFT_LISTEN": "0.0.0.0:0"}
    open_door = subprocess.run(process, env=environment, capture_output=True, text=True, timeout=30)
    assert open_door.returncode == 1 and "CODEGRAFT_AUTH" in open_door.stderr

    environment = os.environ | {"CODEGRAFT_TLS_CERT_FILE": str(cert), "CODEGRAFT_TLS_KEY_FILE": str(key)}
    with subprocess.Popen(process, env=environment, stderr=subprocess.PIPE, text=True) as popen:
        assert popen.stderr is not None
        lines = (json.loads(line) for line in popen.stderr if line.startswith("{"))
        address = next(line["address"] for line in lines if line["event"] == "serving")
        with grpc.secure_channel(address, ClientFiles(authority.file).credentials()) as opened:
            assert opened.unary_unary("/test.Slow/Second")(b"", timeout=10) == b"done"
        popen.send_signal(signal.SIGTERM)


# --- NATS -------------------------------------------------------------------------------------------------------


@pytest.fixture
def nats_with_tls(authority: Authority, tmp_path: Path) -> Iterator[str]:
    """The address of a server that asks for TLS and for a certificate."""
    cert, key = authority.sign("nats")
    port = ports.choose(["nats"], {})["nats"]
    (tmp_path / "nats.conf").write_text(
        f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{tmp_path / "js"}" }}\n'
        "authorization { user: u, password: secret-password }\n"
        f'tls {{ cert_file: "{cert}", key_file: "{key}", ca_file: "{authority.file}", verify: true }}\n'
    )
    program = shutil.which("nats-server", path=Path(sys.executable).parent)
    assert program
    child = Child.start(
        "nats", [program, "--config", str(tmp_path / "nats.conf")], log=tmp_path / "log", env={}, cwd=tmp_path
    )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.02)
    yield f"127.0.0.1:{port}"
    child.stop(timedelta(seconds=10))


async def reach(url: str, context: ssl.SSLContext | None, patience: float = 20) -> None:
    connection = await nats_connection.connect(
        url, user="u", password="secret-password", tls=context, patience=timedelta(seconds=patience)
    )
    await connection.close()


def test_a_client_with_half_a_pair_or_nonsense_is_told_which_setting(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC itself would end the process for some of them."""
    ca, (cert, key), (_, other) = authority.file, authority.sign("client"), authority.sign("other")
    (tmp_path / "nonsense").write_text("nonsense")
    for files, variable in (
        (ClientFiles(ca, key=key), "CERT"),
        (ClientFiles(ca, cert=cert), "KEY"),
        (ClientFiles(ca, cert, other), "CERT"),
        (ClientFiles(ca, tmp_path / "nonsense", key), "CERT"),
        (ClientFiles(tmp_path / "nonsense"), "CA"),
        (ClientFiles(tmp_path / "missing"), "CA"),
    ):
        with pytest.raises(errors.InvalidArgument) as told:
            files.credentials()
        assert told.value.field == f"CODEGRAFT_TLS_{variable}_FILE" and told.value.hint
    addresses = Addresses(*["127.0.0.1:1"] * 4)
    monkeypatch.setenv("CODEGRAFT_TLS_CA_FILE", str(ca))
    monkeypatch.setenv("CODEGRAFT_TLS_KEY_FILE", str(key))
    with pytest.raises(errors.InvalidArgument, match="cert file"):
        Codegraft(addresses, access=Access.find(addresses))


async def test_nats_is_reached_with_certificates_only(authority: Authority, nats_with_tls: str, tmp_path: Path) -> None:
    cert, key = authority.sign("client")
    good = nats_tls(CoreSettings(nats_ca_file=authority.file, nats_cert_file=cert, nats_key_file=key))
    await reach(f"nats://{nats_with_tls}", good)
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")
    with pytest.raises(errors.StateUnavailable):
        await reach(f"tls://{nats_with_tls}", nats_tls(CoreSettings(nats_ca_file=stranger.file)), patience=2)
    with pytest.raises(errors.InvalidArgument):
        nats_tls(CoreSettings(nats_ca_file=cert, nats_cert_file=cert, nats_key_file=authority.sign("other")[1]))


async def test_no_password_goes_to_a_server_that_offers_no_tls(authority: Authority, tmp_path: Path) -> None:
    """As somebody in between would, who takes the server's offer of TLS away."""
    heard = bytearray()

    async def middle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "version": "2.15.1", "max_payload": 1 << 20, "auth_required": True, "headers": True}
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        while data := await reader.read(4096):
            heard.extend(data)
        writer.close()

    server = await asyncio.start_server(middle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    context = ssl.create_default_context(cafile=str(authority.file))
    with pytest.raises(errors.StateUnavailable, match="offers no TLS"):
        await nats_connection.connect(
            f"nats://127.0.0.1:{port}",
            user="u",
            password="secret-password",
            tls=context,
            patience=timedelta(seconds=10),
        )
    assert b"secret-password" not in heard
    server.close()


def test_the_stack_writes_a_private_configuration(tmp_path: Path) -> None:
    nats._write_config(tmp_path / "nats.conf", tmp_path, "n", 1, {"u": 'p"w'}, {"trainer": "pw"})
    assert (tmp_path / "nats.conf").stat().st_mode & 0o777 == 0o600
