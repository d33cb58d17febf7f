"""Starting without NATS or without the store: clear lines, growing jittered waits, a typed error in the end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from google.protobuf.message import Message

from codegraft.ingest.v1.snapshot_pb2 import SnapshotManifest
from services.cli.local import ports
from services.core import errors, log, runtime
from services.core.config import CoreSettings
from services.core.runtime import Runtime

SECRET = "the-secret-of-the-store"


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    log.configure("scanner")
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    log._hidden.discard(SECRET)


@pytest.fixture
def nowhere(tmp_path: Path) -> CoreSettings:
    """Settings that point at ports on which nothing listens."""
    free = ports.choose(["nats", "s3"], {})
    return CoreSettings(
        nats_url=f"nats://127.0.0.1:{free['nats']}",
        s3_endpoint=f"127.0.0.1:{free['s3']}",
        s3_access_key=SECRET,  # type: ignore[arg-type]  # pydantic makes the SecretStr
        s3_secret_key=SECRET,  # type: ignore[arg-type]
        startup_timeout_seconds=2,
        cache_dir=tmp_path,
    )


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert SECRET not in text
    return [json.loads(line) for line in text.splitlines()]


async def test_nats_is_not_there(nowhere: CoreSettings, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.StateUnavailable, match=r"gave up waiting for NATS after \d\.\d s") as raised:
        async with Runtime.open("scanner", nowhere):
            pass
    assert raised.value.field == "nats_url"
    assert "CODEGRAFT_NATS_URL" in raised.value.hint
    lines = lines_of(capsys)
    assert len(lines) >= 3
    assert [line["tries"] for line in lines] == list(range(1, len(lines) + 1))
    for line in lines:
        assert line["event"] == "waiting for NATS"
        assert line["level"] == "warning"
        assert "refused" in str(line["error"])
    waits = [float(str(line["next_try_in"])) for line in lines]
    for i, wait in enumerate(waits):
        assert 0.1 * 2**i - 0.01 <= wait <= 0.2 * 2**i + 0.01


async def test_the_store_is_not_there(
    nowhere: CoreSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Connection:
        closed = False

        async def close(self) -> None:
            self.closed = True

    connection = Connection()

    async def connected(_service: str, _settings: CoreSettings) -> Connection:
        return connection

    monkeypatch.setattr(runtime, "connect_nats", connected)
    with pytest.raises(errors.StoreUnavailable, match="gave up waiting for the object store") as raised:
        async with Runtime.open("scanner", nowhere):
            pass
    assert raised.value.field == "s3_endpoint"
    assert connection.closed, "what was opened is closed"
    lines = lines_of(capsys)
    assert len(lines) >= 3
    assert {line["event"] for line in lines} == {"waiting for the object store"}
    assert all(nowhere.s3_endpoint in str(line["error"]) and "refused" in str(line["error"]) for line in lines)


async def test_a_server_that_comes_later_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([errors.StoreUnavailable("not yet"), errors.StateUnavailable("nor now"), "there"])

    async def attempt() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    deadline = asyncio.get_running_loop().time() + 5
    assert await runtime._waiting("it", attempt, deadline) == "there"
    assert [line["error"] for line in lines_of(capsys)] == ["not yet", "nor now"]


async def test_a_wrong_setting_is_not_waited_for() -> None:
    async def attempt() -> None:
        raise errors.InvalidArgument("no such bucket name", field="s3_bucket")

    with pytest.raises(errors.InvalidArgument, match="no such bucket name"):
        await runtime._waiting("it", attempt, deadline=float("inf"))


def test_a_process_ends_with_one_line_and_status_1(
    nowhere: CoreSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEGRAFT_NATS_URL", nowhere.nats_url)
    monkeypatch.setenv("CODEGRAFT_STARTUP_TIMEOUT_SECONDS", "0.01")

    async def main(settings: CoreSettings) -> None:
        async with Runtime.open("scanner", settings):
            raise AssertionError("unreachable")

    assert runtime.run("scanner", CoreSettings, main) == 1
    [line] = lines_of(capsys)
    assert (line["event"], line["reason"], line["field"]) == ("cannot run", "STATE_UNAVAILABLE", "nats_url")


def test_a_wrong_setting_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEGRAFT_LISTEN", "everywhere")

    async def main(_settings: CoreSettings) -> None:
        raise AssertionError("unreachable")

    assert runtime.run("scanner", CoreSettings, main) == 1
    [line] = lines_of(capsys)
    assert line["field"] == "CODEGRAFT_LISTEN"


async def test_memory_has_everything() -> None:
    memory = Runtime.memory()
    await memory.check()
    state = memory.state("ingest")
    await state.create("projects/p", b"1")
    assert memory.state("ingest") is state
    assert await memory.state("other").get("projects/p") is None
    manifest: Message = SnapshotManifest(name="projects/p/snapshots/s")
    files = await memory.artifacts.commit("projects/p/snapshots/s", manifest, {"a": b"1"})
    folder = await memory.artifacts.fetch("projects/p/snapshots/s", files)
    assert (folder / "a").read_bytes() == b"1"
    cache = folder.parent.parent
    del memory
    assert not cache.exists(), "the temporary cache goes with its runtime"
