"""The health check of a container, against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.core.rpc import probe
from tests.certificates import Authority


@pytest.fixture
def server() -> Iterator[str]:
    """Address of one with two services, of which one is not ready."""
    checks = health.HealthServicer()
    checks.set("", health_pb2.HealthCheckResponse.SERVING)
    checks.set("test.Loading", health_pb2.HealthCheckResponse.NOT_SERVING)
    running = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(checks, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}"
    running.stop(None)


def test_of_a_server_and_of_each_service(server: str) -> None:
    assert probe.check(server) == probe.SERVING
    assert probe.check(server, service="test.Loading") == "not_serving"
    assert probe.check(server, service="test.Unheard") == "not_found"


def test_the_exit_status_is_the_answer(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main([server]) == 0
    assert probe.main([server, "--service", "test.Loading"]) == 1
    assert capsys.readouterr().err == f"{server} is not_serving\n"


def test_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(["127.0.0.1:1", "--timeout", "0.5"]) == 1
    assert "unreachable" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "127.0.0.1"])
def test_without_an_address_it_asks_the_container_s_own_service(
    server: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(probe.LISTEN_VARIABLE, f"{host}:{server.rpartition(':')[2]}")
    assert probe.main([]) == 0


def test_tls_as_services_ask_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ends show a certificate; the server's is for localhost, and it is asked at another address."""
    authority = Authority(tmp_path)
    cert, key = authority.sign("service")
    checks = health.HealthServicer()
    checks.set("", health_pb2.HealthCheckResponse.SERVING)
    running = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(checks, running)
    pair = [(key.read_bytes(), cert.read_bytes())]
    credentials = grpc.ssl_server_credentials(pair, authority.file.read_bytes(), require_client_auth=True)
    address = f"127.0.0.2:{running.add_secure_port('127.0.0.2:0', credentials)}"
    running.start()
    try:
        assert probe.main([address, "--timeout", "1"]) == 1, "it does not speak without TLS"
        for name, file in (("CA", authority.file), ("CERT", cert), ("KEY", key)):
            monkeypatch.setenv(f"CODEGRAFT_TLS_{name}_FILE", str(file))
        assert probe.main([address, "--timeout", "1"]) == 1, "nobody has a certificate for that address"
        assert probe.main([address, "--name", "localhost"]) == 0
        monkeypatch.delenv("CODEGRAFT_TLS_CERT_FILE")
        assert probe.main([address, "--name", "localhost", "--timeout", "1"]) == 1, "it asks for a certificate"
        monkeypatch.setenv("CODEGRAFT_TLS_CA_FILE", str(tmp_path / "nothing.pem"))
        assert probe.main([address]) == 1
        assert "nothing.pem cannot be read" in capsys.readouterr().err
    finally:
        running.stop(None)


def test_without_anything_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(probe.LISTEN_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as caught:
        probe.main([])
    assert caught.value.code == 2
