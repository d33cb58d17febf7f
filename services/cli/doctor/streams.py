"""Streams and buckets of NATS: whether they are as the services make them, with their copies, and on disk in time."""

from __future__ import annotations

import asyncio
import http
import json
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import nats.js.errors
import urllib3
from nats.js import api
from urllib3.exceptions import HTTPError

from services.cli.control.backup import BUCKETS
from services.cli.control.installation import Control, Installation
from services.cli.doctor.check import Check, failed, ok, warning
from services.cli.local import permissions
from services.core.audit.nats import stream_config as audit_config
from services.core.auth.keyring import BUCKET as KEYS
from services.core.errors import StateUnavailable
from services.core.events.nats import stream_config as events_config
from services.core.jobs.nats import stream_configs as jobs_configs
from services.core.nats_connection import translated
from services.core.state.nats import bucket_config, stream_of

SAFE_COPIES = 3
"""Copies of a stream with which no write is lost when one server dies before it reached the disk."""
_FULL = 0.8
"""Share of the storage of JetStream from which it is told; the alert comes at the same."""
_COMPARED = (
    "subjects",
    "retention",
    "storage",
    "max_age",
    "max_msgs_per_subject",
    "discard",
    "discard_new_per_subject",
    "deny_delete",
    "deny_purge",
)


def wanted(replicas: int) -> list[api.StreamConfig]:
    """Every stream as the services make it, buckets among them."""
    others = [bucket for service in permissions.SERVICES.values() for bucket in service.buckets]
    buckets = [bucket_config(bucket, replicas) for bucket in (*BUCKETS, *others, KEYS)]
    streams = [
        api.StreamConfig(
            name=stream_of(bucket.bucket),
            subjects=[f"$KV.{bucket.bucket}.>"],
            retention=api.RetentionPolicy.LIMITS,
            storage=bucket.storage,
            max_msgs_per_subject=bucket.history,
            discard=api.DiscardPolicy.NEW,
            deny_delete=True,
        )
        for bucket in buckets
    ]
    streams += [events_config(), audit_config(), *jobs_configs()]
    for config in streams:
        config.num_replicas = replicas
    return streams


async def check(control: Control, replicas: int) -> list[Check]:
    """All streams.

    Args:
        replicas: copies that each should have.
    """
    return await asyncio.gather(*(_look(control, config) for config in wanted(replicas)))


async def _look(control: Control, config: api.StreamConfig) -> Check:
    name = config.name or ""
    try:
        with translated(f"look at the stream {name}"):
            return judge(config, await control.nats.js.stream_info(name))
    except StateUnavailable as error:
        if isinstance(error.__cause__, nats.js.errors.NotFoundError):
            return ok(f"stream {name}", "not made yet: its first use makes it")
        return warning(f"stream {name}", f"not to be seen: {error.message}", "Come as the NATS user operator.")


def judge(config: api.StreamConfig, info: api.StreamInfo) -> Check:
    """One stream against what it should be."""
    name = f"stream {config.name}"
    if info.cluster is not None and info.cluster.leader is None:
        return failed(
            name, "has no leader: nothing can be written", "Bring the NATS servers back: two of three suffice."
        )
    if different := [field for field in _COMPARED if _other(config, info.config, field)]:
        told = ", ".join(f"{field} {_word(getattr(info.config, field))}" for field in different)
        meant = ", ".join(f"{field} {_word(getattr(config, field))}" for field in different)
        return failed(name, f"has {told}", f"It needs {meant}: nats stream edit {config.name} (as operator).")
    copies = info.config.num_replicas or 1
    if copies < (config.num_replicas or 1):
        return failed(
            name,
            f"has {copies} of {config.num_replicas} copies",
            f"nats stream edit {config.name} --replicas {config.num_replicas} (as operator).",
        )
    peers = (info.cluster.replicas or []) if info.cluster is not None else []
    if behind := [peer.name or "" for peer in peers if peer.offline or not peer.current]:
        return warning(name, f"the copy on {', '.join(behind)} is behind or away", "See that those servers are well.")
    return ok(name, f"{info.state.messages:,} messages, {copies} cop{'y' if copies == 1 else 'ies'}")


def _word(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


def _other(wanted: api.StreamConfig, there: api.StreamConfig, field: str) -> bool:
    """Whether a setting that the services give is another one there. What they leave to the server may be anything."""
    value = getattr(wanted, field)
    return value is not None and value != (getattr(there, field) or type(value)())


# --- on disk in time ---


def check_sync(place: Installation, monitor: str) -> list[Check]:
    """Whether an acknowledged write survives the death of a machine.

    JetStream acknowledges before it syncs, and syncs every two minutes unless told otherwise: with one server that much
    can be lost. Three copies are on three machines.

    Args:
        monitor: URL of the monitoring port, empty when there is none; a local stack's configuration is read instead.
    """
    name = "sync of NATS"
    if monitor:
        try:
            found = _jsz(monitor)
        except (HTTPError, ValueError, TypeError) as error:
            return [failed(name, f"{monitor} does not answer: {error}", "Correct --nats-monitor.")]
        return [judge_sync(found.get("config", {}), place.settings.nats_replicas), *_storage(found), _health(monitor)]
    if place.folder is not None:
        return [judge_sync(_configured(place), 1)]
    if place.settings.nats_replicas >= SAFE_COPIES:
        return [ok(name, f"{place.settings.nats_replicas} copies of everything")]
    return [warning(name, "not to be seen", "Give --nats-monitor http://HOST:8222, or set CODEGRAFT_NATS_REPLICAS.")]


def _configured(place: Installation) -> dict[str, Any]:
    text = (place.folder / "nats" / "nats.conf").read_text() if place.folder else ""
    found = re.search(r"^\s*sync_interval:\s*(\S+)", text, re.MULTILINE)
    return {"sync_always": found is not None and found[1] == "always"}


def judge_sync(config: dict[str, Any], replicas: int) -> Check:
    """By what a server says of itself."""
    name = "sync of NATS"
    if config.get("sync_always"):
        return ok(name, "every write is on disk before it is acknowledged")
    seconds = config.get("sync_interval", 120e9) / 1e9
    if replicas >= SAFE_COPIES:
        return ok(name, f"{replicas} copies, each on disk within {seconds:.0f} s")
    return failed(
        name,
        f"what was acknowledged in the last {seconds:.0f} s is lost when the machine dies",
        "Set `jetstream { sync_interval: always }` in the server's configuration, or run three servers.",
    )


def _storage(found: dict[str, Any]) -> Iterator[Check]:
    most, used = found.get("config", {}).get("max_storage", 0), found.get("storage", 0)
    if most > 0:
        told = f"{used / 2**30:.1f} of {most / 2**30:.1f} GiB are used"
        if used / most < _FULL:
            yield ok("storage of NATS", told)
        else:
            yield warning("storage of NATS", told, "Give JetStream a larger volume: docs/runbooks/disk-full.md.")


def _health(monitor: str) -> Check:
    answer = urllib3.PoolManager(timeout=5.0, retries=False).request("GET", f"{monitor}/healthz")
    return judge_health(answer.status, answer.data)


def judge_health(status: int, body: bytes) -> Check:
    """By a server's word of all its streams: one whose disk ran full is read from, and not written until a restart."""
    name = "health of NATS"
    if status == http.HTTPStatus.OK:
        return ok(name, "every stream is well")
    said = str(json.loads(body).get("error", f"it answers {status}"))
    return failed(name, said, "Give it room where it lacks it, then restart that server: docs/runbooks/disk-full.md.")


def _jsz(monitor: str) -> dict[str, Any]:
    answer = urllib3.PoolManager(timeout=5.0, retries=False).request("GET", f"{monitor}/jsz?config=true")
    found: dict[str, Any] = json.loads(answer.data)
    return found
