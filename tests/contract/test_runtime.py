"""The runtime over real servers: everything opens, works together, and tells when a server is gone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import nats.errors
import pytest
from pydantic import SecretStr

from codegraft.ingest.v1.snapshot_pb2 import SnapshotManifest
from services.core import errors
from services.core.config import CoreSettings
from services.core.names import new_id
from services.core.nats_connection import connect
from services.core.runtime import Runtime
from services.core.store.s3 import S3Address
from tests.conftest import standing_on


def settings_for(nats: Any, s3: S3Address, cache: Path) -> CoreSettings:
    there = {"s3_bucket": s3.bucket, "startup_timeout_seconds": 5.0}
    return standing_on(nats, s3, cache).model_copy(update=there)


async def test_everything_opens_and_works(own_nats_server: Any, s3_server: S3Address, tmp_path: Path) -> None:
    name = f"projects/{new_id('p')}/snapshots/s"
    settings = settings_for(own_nats_server, s3_server, tmp_path / "cache")
    async with Runtime.open("ingest", settings) as runtime:
        await runtime.check()
        assert await runtime.state("ingest").create(name, b"1") > 0
        await runtime.artifacts.commit(name, SnapshotManifest(name=name), {"a": b"1"})
        await runtime.events.publish(
            "codegraft.ingest.snapshot.created.v1", name, SnapshotManifest(name=name), id=new_id("e")
        )
        await runtime.jobs.submit("scan", name)
        delivery = await runtime.jobs.take("scan", 20)
        assert delivery is not None
        assert delivery.name == name
        await delivery.ack()

    async with Runtime.open("ingest", settings) as again:
        entry = await again.state("ingest").get(name)
        assert entry is not None
        assert entry.value == b"1"
        assert (await again.artifacts.manifest(name, SnapshotManifest)).name == name
        own_nats_server.stop()
        with pytest.raises(errors.StateUnavailable):
            for _ in range(200):
                await again.check()
        own_nats_server.start()


@pytest.mark.parametrize("turns", range(5))
async def test_a_connection_that_was_just_lost_is_closed_in_peace(nats_server: Any, turns: int) -> None:
    """However many turns of the event loop ago the client noticed, closing is no cancellation of who closes."""
    connection = await connect(nats_server.url, user=nats_server.user, password=nats_server.password)
    await connection.client._process_op_err(nats.errors.UnexpectedEOF())
    for _ in range(turns):
        await asyncio.sleep(0)
    await connection.close()
    assert connection.client.is_closed


async def test_wrong_store_credentials_are_named(own_nats_server: Any, s3_server: S3Address, tmp_path: Path) -> None:
    settings = settings_for(own_nats_server, s3_server, tmp_path).model_copy(
        update={"s3_secret_key": SecretStr("something-else"), "startup_timeout_seconds": 0.5}
    )
    with pytest.raises(errors.StoreUnavailable, match=r"gave up .*refuses the credentials") as raised:
        async with Runtime.open("ingest", settings):
            pass
    assert "CODEGRAFT_S3_SECRET_KEY" in raised.value.hint
