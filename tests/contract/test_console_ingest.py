"""The console in front of a real ingest service that checks keys: from an empty project to a fetched source."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from services.core.auth.gate import Gate
from services.core.auth.keyring import BUCKET, Keyring
from services.core.auth.keys import ApiKey
from services.core.runtime import Runtime
from services.gateway.assembly import application, connect
from services.gateway.config import GatewaySettings
from services.gateway.server import serving as gateway_serving
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.ingest.keys import Seed
from tests.contract.console_world import Browser, check
from tests.servers.ingest import KEY, serving
from tests.unit.client.conftest import Fake

SOURCES = "/console/p/acme/sources"


@pytest.fixture
async def operator(tmp_path: Path) -> AsyncIterator[Browser]:
    """An operator's browser, signed in."""
    runtime, root = Runtime.memory(tmp_path / "cache"), ApiKey.new("root").text
    parts = Ingest(runtime, IngestSettings(cache_dir=tmp_path / "cache", ingest_credential_keys=(KEY,)))  # type: ignore[arg-type]
    await parts.keys.seed([Seed(key=root, role="operator")])  # type: ignore[arg-type]
    gate = Gate(Keyring(runtime.state(BUCKET)))
    following = asyncio.create_task(gate.run())
    async with serving(parts, gate) as ingest:
        settings = GatewaySettings(listen="127.0.0.1:0", drain_seconds=1, ingest_address=ingest.addresses.ingest)
        async with (
            connect(settings) as client,
            gateway_serving(settings, application(settings, client)) as url,
            httpx2.AsyncClient(base_url=url, timeout=20, verify=False, headers={"accept": "text/html"}) as http,
        ):
            browser = Browser(http, Fake(), [])
            assert (await browser.sign_in(root)).status_code == 303
            yield browser
    following.cancel()


async def test_from_an_empty_project_to_a_fetched_source(operator: Browser) -> None:
    assert "no-projects" in (await operator.page("/console")).ids
    assert (await operator.send("/console/projects", project_id="acme")).headers["location"] == SOURCES
    answer = await operator.send("/console/projects", project_id="acme")
    assert answer.status_code == 409 and "RESOURCE_EXISTS" in check(answer.text).text
    assert "no-sources" in (await operator.page(SOURCES)).ids

    content = b"print(1)\n" * 300_000
    half, sha256 = len(content) // 2, hashlib.sha256(content).hexdigest()
    way = f"/console/p/acme/uploads/{sha256}"
    headers = {"content-type": "application/octet-stream", "x-csrf-token": operator.csrf, "accept": "application/json"}
    query = {"offset": "0", "size": str(len(content)), "filename": "app.py"}
    broken = await operator.http.put(way, params=query, content=content[:half], headers=headers)
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "UPLOAD_MISMATCH"
    there = (await operator.http.get(way)).json()
    assert there["offset"] == half and not there["complete"], "what arrived is kept"
    query["offset"] = str(half)
    whole = (await operator.http.put(way, params=query, content=content[half:], headers=headers)).json()
    assert whole["complete"] and whole["offset"] == len(content)

    answer = await operator.send(SOURCES, kind="file", upload=whole["name"], path="app.py", source_id="app")
    assert answer.status_code == 303, answer.text
    events = await operator.listen(f"{SOURCES}/-/live", until='"state ready"')
    assert events[-1][0] == "part" and 'id="source-app-files">1<' in events[-1][1]
    page = await operator.page(f"{SOURCES}/app")
    assert {"source-app", "save-source", "sync-app"} <= set(page.ids)
    etag = next(each["value"] for each in page.of("input") if each.get("name") == "etag")
    fields = {"etag": etag, "split": "test", "exclude": "*.min.js"}
    assert (await operator.send(f"{SOURCES}/app", **fields)).status_code == 303
    assert "split test" in (await operator.page(SOURCES)).text
    assert (await operator.send(f"{SOURCES}/app", **fields)).status_code == 409, "by somebody else meanwhile"

    await operator.send("/console/p/acme/credentials", kind="ssh", credential_id="deploy")
    page = await operator.page(SOURCES)
    assert "public-key-deploy" in page.ids and "ssh-ed25519 AAAA" in page.text
    assert (await operator.send(f"{SOURCES}/app/remove")).status_code == 303
    assert "no-sources" in (await operator.page(SOURCES)).ids


async def test_a_key_of_another_project_is_denied_and_a_revoked_one_is_signed_out(operator: Browser) -> None:
    for project in ("acme", "other"):
        await operator.send("/console/projects", project_id=project)
    answer = await operator.send("/console/system/keys", key_id="theirs", role="operator", projects=["other"])
    made = re.search(r'<pre id="secret" tabindex="0">(cg_[^<]+)</pre>', answer.text)
    assert answer.status_code == 200 and made
    session = dict(operator.http.cookies)
    assert (await operator.sign_in(made[1])).status_code == 303
    assert [f"/console/p/{each}/sources" in (await operator.page("/console")).html for each in ("acme", "other")] == [
        False,
        True,
    ]
    for way in ("/console/p/acme", SOURCES, f"{SOURCES}/app"):
        page = await operator.page(way, 403)
        assert "PERMISSION_DENIED" in page.text and "Not allowed" in page.text
    answer = await operator.send(SOURCES, kind="git", url="https://git.example/x.git")
    assert answer.status_code == 403 and "PERMISSION_DENIED" in check(answer.text).text
    theirs = dict(operator.http.cookies)
    for cookies, way in ((session, "/console/system/keys/theirs/revoke"), (theirs, "")):
        operator.http.cookies.clear()
        for name, value in cookies.items():
            operator.http.cookies.set(name, value, path="/console")
        if way:
            operator.csrf = ""
            assert (await operator.send(way)).status_code == 303
    for _ in range(100):
        answer = await operator.http.get("/console/p/other/sources")
        if answer.status_code == 303:
            break
        await asyncio.sleep(0.05)
    assert answer.headers["location"].startswith("/console/login?next=")
