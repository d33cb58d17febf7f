"""docs/events.yaml and docs/events.md against the real server: the streams as services make them, and who follows."""

from __future__ import annotations

import io
import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import pytest
import yaml

from codegraft.access.v1.audit_pb2 import AuditRecord
from codegraft.event.v1.events_pb2 import BestCheckpointChanged
from services.cli.local import nats, permissions, ports
from services.core.audit.nats import NatsAudit
from services.core.events.nats import NatsBus
from services.core.jobs.nats import NatsQueue
from services.core.nats_connection import NatsConnection, connect
from services.core.state.nats import NatsState
from services.inference import kept
from tools import asyncapi, event_catalogue

PASSWORDS = {name: f"password-of-{name}" for name in permissions.SERVICES}
BEST = "codegraft.trainer.checkpoint.best.v1"
PAGE = event_catalogue.PAGE.read_text(encoding="utf-8")
STREAMS: dict[str, dict[str, Any]] = yaml.safe_load(asyncapi.YAML.read_text(encoding="utf-8"))["x-jetstream-streams"]


def follower() -> str:
    """The user of docs/events.md, with the rights that stand there."""
    block = next(text for text in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL) if text.startswith("publish:"))
    publish, subscribe = re.split(r"subscribe:", block.removeprefix("publish:"))
    may, hears = (json.dumps(re.split(r",?\s+", rights.strip())) for rights in (publish, subscribe))
    allowed = f"publish: {{allow: {may}}}, subscribe: {{allow: {hears.replace('<user>', 'others')}}}"
    return f"{{user: others, password: word, permissions: {{{allowed}}}}}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with every service as a user, and one that follows events."""
    folder, port = tmp_path_factory.mktemp("nats"), ports.choose(["nats"], {})["nats"]
    users = permissions.nats_users(PASSWORDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permissions, "nats_users", lambda _passwords: f"{users}\n{follower()}")
        child = nats.start(folder, log=folder / "log", port=port, user="admin", password="secret", services=PASSWORDS)
    yield f"nats://{ports.HOST}:{port}"
    child.stop(nats.GRACE)


async def used_by_all(server: str) -> None:
    """Has every service make its streams, as it does at its first use of each."""
    for name, password in PASSWORDS.items():
        connection = await connect(server, user=name, password=password)
        await NatsState(connection, name).list()
        await NatsState(connection, "access").list()
        await NatsAudit(connection, name).append(AuditRecord())
        for kind in permissions.SERVICES[name].jobs:
            await NatsQueue(connection).submit(kind, "projects/p/jobs/j")
        if name == "inference":
            await NatsState(connection, kept.BUCKET, kept.BOUNDS).list()
        if name == "trainer":
            event = BestCheckpointChanged(checkpoint="projects/p/runs/r/checkpoints/7", test_loss=1.25)
            await NatsBus(connection, "codegraft/trainer").publish(BEST, "projects/p/runs/r", event, id="one")
        await connection.close()


async def config_of(connection: NatsConnection, stream: str) -> dict[str, Any]:
    info = await connection.js._api_request(f"$JS.API.STREAM.INFO.{stream}", b"{}")
    found: dict[str, Any] = info["config"]
    return found


async def test_the_streams_are_those_of_the_catalogue(server: str) -> None:
    await used_by_all(server)
    connection = await connect(server, user="admin", password="secret")
    assert {info.config.name for info in await connection.js.streams_info()} == STREAMS.keys()
    for name, told in STREAMS.items():
        real = await config_of(connection, name)
        assert real["storage"] == "file"
        for setting in ("subjects", "retention", "max_msgs_per_subject", "discard", "deny_delete", "deny_purge"):
            assert setting not in told or told[setting] == real[setting], (name, setting)
        assert real["max_age"] == told["max_age"] * 1e9
        assert "duplicate_window" not in told or real["duplicate_window"] == told["duplicate_window"] * 1e9
        consumers = {info.name: info.config for info in await connection.js.consumers_info(name)}
        for durable, settings in told.get("consumers", {}).items():
            assert consumers[durable].filter_subject == settings["filter_subject"]
            assert consumers[durable].ack_wait == settings["ack_wait"] and consumers[durable].max_deliver == -1
    await connection.close()


async def test_the_example_of_the_page_follows_with_the_rights_of_the_page(server: str) -> None:
    await used_by_all(server)
    example = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    made: dict[str, Any] = {}
    lines = textwrap.indent(f"{example}await connection.close()", "    ")
    exec(f"async def example(url, user, password):\n{lines}", made)
    with redirect_stdout(io.StringIO()) as printed:
        await made["example"](server, "others", "word")
    assert printed.getvalue() == "one projects/p/runs/r/checkpoints/7 1.25\n"
