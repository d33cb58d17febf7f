"""The gateway's own HTTPS, with real handshakes: cookies and headers of it, and certificates that are renewed."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography import x509

from services.core import errors
from services.gateway import https
from services.gateway.config import GatewaySettings
from tests.certificates import Authority

pytest_plugins = ["tests.contract.gateway_fixtures"]


def settings(cert: Path | None, key: Path | None) -> GatewaySettings:
    return GatewaySettings(gateway_cert_file=cert, gateway_key_file=key)


async def shown(url: str, authority: Authority) -> str:
    """Common name of the certificate that a new connection gets."""
    host, _, port = url.removeprefix("https://").rpartition(":")
    trusting = ssl.create_default_context(cafile=str(authority.file))
    _, writer = await asyncio.open_connection(host, int(port), ssl=trusting)
    found = x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    writer.close()
    return str(found.subject.rfc4514_string()).removeprefix("CN=")


async def test_https_its_cookie_and_a_renewed_certificate(
    gateways: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.sign("first")
    gateway = await gateways(gateway_cert_file=cert, gateway_key_file=key)
    assert gateway.url.startswith("https://")
    trusting = ssl.create_default_context(cafile=str(authority.file))
    async with httpx2.AsyncClient(base_url=gateway.url, verify=trusting, timeout=20) as browser:
        page = await browser.get("/console/login")
        assert page.status_code == 200 and "; secure;" in page.headers["set-cookie"].lower() + ";"
        assert page.headers["strict-transport-security"].startswith("max-age=")
        mine = gateway.url.removeprefix("https://")
        foreign = await browser.get("/v1/models", headers={"origin": f"http://{mine}"})
        assert foreign.status_code == 403 and "strict-transport-security" in foreign.headers
    with pytest.raises(httpx2.RequestError):
        async with httpx2.AsyncClient(timeout=5) as plain:
            await plain.get(gateway.url.replace("https", "http"))

    assert await shown(gateway.url, authority) == "first"
    other_cert, other_key = authority.sign("second")
    shutil.copy(other_key, key)
    assert await shown(gateway.url, authority) == "first", "half of it is there"
    shutil.copy(other_cert, cert)
    assert await shown(gateway.url, authority) == "second"
    cert.unlink()
    assert await shown(gateway.url, authority) == "second", "it is away for a moment"

    monkeypatch.setenv("CODEGRAFT_GATEWAY_CERT_FILE", str(other_cert))
    monkeypatch.setenv("CODEGRAFT_GATEWAY_KEY_FILE", str(other_key))
    monkeypatch.setenv("CODEGRAFT_LISTEN", gateway.url.removeprefix("https://"))
    probe = [sys.executable, "-m", "services.gateway.probe"]
    asked = await asyncio.to_thread(subprocess.run, probe, capture_output=True, text=True, check=False)
    assert (asked.returncode, asked.stderr.strip()) == (1, f"{mine} answers 503"), "inference has no health here"


async def test_plain_http_promises_nothing_for_https(gateways: Any) -> None:
    gateway = await gateways()
    assert "strict-transport-security" not in (await gateway.http.get("/console/login")).headers


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    authority = Authority(tmp_path)
    (cert, key), (_, other) = authority.sign("one"), authority.sign("two")
    assert https.context(settings(None, None)) is None
    for files, field in (
        ((cert, None), "CODEGRAFT_GATEWAY_KEY_FILE"),
        ((None, key), "CODEGRAFT_GATEWAY_CERT_FILE"),
        ((cert, other), "CODEGRAFT_GATEWAY_CERT_FILE"),
        ((key, key), "CODEGRAFT_GATEWAY_CERT_FILE"),
    ):
        with pytest.raises(errors.InvalidArgument) as refused:
            https.context(settings(*files))
        assert refused.value.field == field and refused.value.hint
