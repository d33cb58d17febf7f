"""The doctor on real servers with real users: a sound installation, then one broken in each way."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from minio import Minio
from nats.js import api

from services.cli.control import installation
from services.cli.control.installation import Installation
from services.cli.doctor import clock, permissions, services, store, streams
from services.cli.doctor.check import Check, Result
from services.cli.local import nats, ports, s3
from services.cli.local.files import ServiceCredentials
from services.cli.local.permissions import SERVICES
from services.cli.main import main
from services.core.config import CoreSettings
from services.core.events.nats import NatsBus
from services.core.state.nats import NatsState, stream_of
from services.core.store import S3Store
from services.core.version import release
from services.inference import kept
from tests.conftest import AT_ONCE
from tools.inner_subjects import RECORDS

pytestmark = pytest.mark.usefixtures("own_logs")

KNOWN = {name: ServiceCredentials.random(name) for name in SERVICES}
SERVER = Path(__file__).with_name("rpc_process.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """NATS and the object store as `codegraft up` starts them, with every service as a user."""
    folder, chosen = tmp_path_factory.mktemp("doctor"), ports.choose(["nats", "s3"], {})
    servers = [
        nats.start(
            folder / "nats",
            log=folder / "nats.log",
            port=chosen["nats"],
            user="codegraft",
            password="secret",
            services={name: one.nats_password for name, one in KNOWN.items()},
        ),
        s3.start(
            folder / "s3",
            log=folder / "s3.log",
            port=chosen["s3"],
            access_key="A" * 20,
            secret_key="b" * 40,
            services={name: (one.s3_access_key, one.s3_secret_key) for name, one in KNOWN.items()},
        ),
    ]
    settings = CoreSettings(
        nats_url=f"nats://{ports.HOST}:{chosen['nats']}",
        nats_user="codegraft",
        nats_password="secret",  # type: ignore[arg-type]
        s3_endpoint=f"{ports.HOST}:{chosen['s3']}",
        s3_access_key="A" * 20,  # type: ignore[arg-type]
        s3_secret_key="b" * 40,  # type: ignore[arg-type]
    )
    yield Installation(settings, KNOWN, folder)
    for server in servers:
        server.stop(AT_ONCE)


def problems(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.found for check in checks if check.result is not Result.OK}


async def test_a_sound_installation_has_nothing_to_mend(place: Installation) -> None:
    s3_store = S3Store(installation.s3_address(place.settings))
    await s3_store.prepare()
    s3_store.close()
    async with installation.opened(place) as control:
        for name in (*SERVICES, "access"):
            await NatsState(control.nats, name).list()
        await NatsState(control.nats, kept.BUCKET, kept.BOUNDS).list()
        await NatsBus(control.nats, "test")._ensure()
        found = await streams.check(control, 1)
        assert not problems(found) and {stream_of(name) for name in RECORDS} <= {each.name[7:] for each in found}
        assert len(await clock.check_nats(control)) == 1 and not problems(await clock.check_nats(control))
    assert len(await clock.check_store(place)) == 1 and not problems(await clock.check_store(place))
    assert not problems(streams.check_sync(place, ""))
    assert not problems(store.check(place))
    found = await permissions.check(place)
    assert not problems(found) and len(found) == 1 + 2 * len(SERVICES)


async def test_each_wrong_thing_is_found(place: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    async with installation.opened(place) as control:
        await NatsState(control.nats, "scanner").list()
        info = await control.nats.js.stream_info("KV_scanner")
        await control.nats.js.update_stream(info.config.evolve(max_msgs_per_subject=5))
        found = await streams.check(control, 3)
        await control.nats.js.update_stream(info.config)
        assert isinstance(info.config, api.StreamConfig)
    assert "max_msgs_per_subject 5" in problems(found)["stream KV_scanner"]
    assert problems(found)["stream KV_ingest"] == "has 1 of 3 copies"

    # A service that has the operator's rights, and one whose password was changed.
    settings = place.settings
    admin = ServiceCredentials("secret", "A" * 20, "b" * 40, "")
    assert await permissions._try_nats(settings, "codegraft", "secret", [], ["KV_ingest"]) == "may look at KV_ingest"
    with monkeypatch.context() as patch:  # users of a version before the subjects of quotas
        patch.setattr(permissions, "USAGE", "newer.")
        known = KNOWN["trainer"].nats_password
        told = await permissions._try_nats(settings, "trainer", known, ["KV_trainer"], [])
        assert told == "may not exchange what is used on newer.trainer"
    with monkeypatch.context() as patch:  # and of one before all services claimed room in one place
        patch.setattr(permissions, "ROOM", "$KV.access.Newer.")
        patch.setattr(permissions, "_TIMEOUT", 2.0)  # what is refused is not answered
        told = await permissions._try_nats(settings, "trainer", known, ["KV_trainer"], [])
        assert told == "may not claim room for what it stores, on $KV.access.Newer.>"
    others = await permissions.check(Installation(settings, {"inference": admin}))
    assert problems(others)["object store as inference"] == "may write what it only reads"
    assert problems(others)["NATS as inference"].startswith("cannot log in")
    assert "closed NATS" not in problems(others)
    client = Minio(settings.s3_endpoint, access_key="A" * 20, secret_key="b" * 40, secure=False)
    assert not list(client.list_objects("codegraft", prefix="doctor/", recursive=True)), "probes are removed"
    missing = Installation(settings.model_copy(update={"s3_bucket": "nowhere"}))
    assert problems(store.check(missing)) == {"bucket": "there is no nowhere"}


def test_versions_and_clocks_come_with_the_health_of_a_service() -> None:
    environment = {**os.environ, "CODEGRAFT_LISTEN": f"{ports.HOST}:{ports.choose(['it'], {})['it']}"}
    process = subprocess.Popen([sys.executable, str(SERVER)], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any('"event": "serving"' in line for line in process.stderr)
        addresses = {f"{name}_address": environment["CODEGRAFT_LISTEN"] for name in services.NAMES}
        away = f"{ports.HOST}:{ports.choose(['away'], {})['away']}"
        place = Installation(CoreSettings(**{**addresses, "inference_address": away}))  # type: ignore[arg-type]
        told = asyncio.run(services.told(place))
    finally:
        process.kill()
        process.wait()
    assert told["trainer"].version == release() and told["trainer"].time > 1e9 and told["inference"].problem
    assert not problems(clock.check_services(told))
    found = services.check(place, told)
    assert set(problems(found)) == {"inference service"}
    [versions] = services.judge(services.versions(told))
    assert versions.found == f"all services are {release()}"


def test_the_command_on_an_installation_elsewhere(
    place: Installation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the credentials of one service: what it may not see is told, and its own permissions are tried."""
    trainer = KNOWN["trainer"]
    for name, value in {
        "NATS_URL": place.settings.nats_url,
        "NATS_USER": "trainer",
        "NATS_PASSWORD": trainer.nats_password,
        "S3_ENDPOINT": place.settings.s3_endpoint,
        "S3_ACCESS_KEY": trainer.s3_access_key,
        "S3_SECRET_KEY": trainer.s3_secret_key,
        **{f"{name.upper()}_ADDRESS": "127.0.0.1:1" for name in services.NAMES},
    }.items():
        monkeypatch.setenv(f"CODEGRAFT_{name}", value)
    monkeypatch.setattr("services.core.nats_connection.REQUEST_TIMEOUT", 1.0)  # what is refused is not answered
    assert main(["doctor", "--json"]) == 1
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["NATS as trainer"]["result"] == found["object store as trainer"]["result"] == "ok"
    assert found["inference service"]["result"] == "failed" and found["sync of NATS"]["result"] == "warning"
    assert "not to be seen" in found["stream KV_ingest"]["found"]
    assert all(check["hint"] for check in found.values() if check["result"] != "ok")
