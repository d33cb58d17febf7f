"""What each service may do at NATS and at the object store: one table, from which the servers' own rules are made.

``python -m services.cli.local.permissions`` prints the NATS part for the configuration of a cluster, with
``$INGEST_PASSWORD`` and so on in place of passwords.

A service publishes to its own buckets and its own events, takes jobs of its own kinds, reads the API keys and all
events, says what it counts of quotas and hears what the others do, claims room where it stores for projects, and gets
answers in an inbox of its own. What no rule of NATS can see: a service may have messages of its streams sent to any
subject, so one that was taken over could still disturb others; it cannot read their buckets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from services.core.quota.nats import PREFIX as USAGE
from services.core.state import mirror

API = "$JS.API"
KEYS = "KV_access"
"""Stream of the bucket with the API keys, which ingest writes and everybody reads."""
ROOM = "$KV.access.StoredPlaces."
"""Subjects of the one part of that bucket that whoever stores for projects writes: claims (core/quota/places.py)."""


@dataclass(frozen=True, slots=True)
class Service:
    """What one service does."""

    jobs: tuple[str, ...] = ()
    """Kinds of jobs that it queues and takes."""
    writes_keys: bool = False
    reads_audit: bool = False
    writes_objects: bool = True
    buckets: tuple[str, ...] = ()
    """Of its own, beside that of its name."""


SERVICES: dict[str, Service] = {
    "ingest": Service(writes_keys=True, reads_audit=True),
    "scanner": Service(jobs=("scan", "scan-part")),
    "trainer": Service(jobs=("run",)),
    "inference": Service(writes_objects=False, buckets=("completions",)),
}

CALLS = {"trainer": "reader", "inference": "contributor"}
"""Services that call others, and the role of their API keys: the trainer asks for the newest dataset; inference for
projects and best checkpoints, and has those kept that it serves."""


def publish(name: str) -> list[str]:
    """Subjects that the service of that name may publish to, requests to JetStream among them."""
    service, buckets = SERVICES[name], (name, *SERVICES[name].buckets)
    own = [f"KV_{bucket}" for bucket in buckets]
    subjects = [f"$KV.{bucket}.>" for bucket in buckets]
    subjects += [f"codegraft.{name}.>", f"audit.{name}.>", f"{API}.STREAM.CREATE.AUDIT", f"{USAGE}{name}"]
    if service.writes_keys:
        subjects.append("$KV.access.>")
    elif service.writes_objects:
        subjects.append(f"{ROOM}>")
    for stream in (*own, KEYS, "EVENTS", *(["AUDIT"] if service.reads_audit else [])):
        subjects += [
            # An existing stream is not changed by this request.
            f"{API}.STREAM.CREATE.{stream}",
            f"{API}.STREAM.INFO.{stream}",
            f"{API}.CONSUMER.CREATE.{stream}",
            f"{API}.CONSUMER.CREATE.{stream}.>",
            f"{API}.CONSUMER.DELETE.{stream}.*",
            f"$JS.FC.{stream}.>",
        ]
    subjects += [f"{API}.STREAM.MSG.GET.{stream}" for stream in (*own, KEYS)]
    if service.jobs:
        subjects += [f"{API}.STREAM.CREATE.{stream}" for stream in ("JOBS", "JOBS_DEAD")]
    for kind in service.jobs:
        workers = f"JOBS.workers-{kind}"
        subjects += [
            f"jobs.{kind}.>",
            f"dead.{kind}.>",
            f"{API}.CONSUMER.DURABLE.CREATE.{workers}",
            f"{API}.CONSUMER.INFO.{workers}",
            f"{API}.CONSUMER.MSG.NEXT.{workers}",
            f"$JS.ACK.{workers}.>",
        ]
    return subjects


def subscribe(name: str) -> list[str]:
    """Subjects that it may subscribe to: its own inbox, through which also streams come, and what all say of usage."""
    return [f"_INBOX.{name}.>", f"{USAGE}*"]


def nats_users(passwords: Mapping[str, str]) -> str:
    """The services as users in nats-server's configuration, one a line.

    Args:
        passwords: by service; what begins with $ is a variable of the configuration.
    """
    return "\n".join(
        f"{{user: {name}, password: {_value(password)}, permissions: {{"
        f"publish: {{allow: {json.dumps(publish(name))}}}, subscribe: {{allow: {json.dumps(subscribe(name))}}}}}}}"
        for name, password in passwords.items()
    )


def s3_actions(name: str, bucket: str) -> list[str]:
    """What the service may do in the bucket, in the words of SeaweedFS."""
    reading = [f"Read:{bucket}", f"List:{bucket}"]
    if SERVICES[name].writes_objects:
        return [*reading, f"Write:{bucket}"]
    # Where every process proves at its start that the server keeps conditions (services/core/store/s3.py), and where
    # the copies of its records are (services/core/state/mirror.py).
    return [*reading, f"Write:{bucket}/.codegraft/*", f"Write:{bucket}/{mirror.ROOT}{name}/*"]


def _value(password: str) -> str:
    return password if password.startswith("$") else json.dumps(password)


if __name__ == "__main__":
    print(nats_users({name: f"${name.upper()}_PASSWORD" for name in SERVICES}))
