"""What goes over NATS besides events, in AsyncAPI's words: jobs, audit log, usage, the services' records; the streams.

Subjects and settings come from the code, who may use them from the table of permissions.
"""

from __future__ import annotations

from typing import Any

from services.cli.local import permissions
from services.core.audit import nats as audit
from services.core.auth import keyring
from services.core.events import bus
from services.core.events import nats as events
from services.core.jobs import nats as jobs
from services.core.jobs import queue
from services.core.quota import nats as quota
from services.core.quota.exchange import INTERVAL
from services.inference import kept
from tools import contract

RECORDS: dict[str, tuple[str, ...]] = {
    "access": (
        "codegraft.access.v1.StoredKey",
        "codegraft.access.v1.Quota",
        "codegraft.access.v1.StoredPlaces",
        "codegraft.common.v1.DeletedProject",
    ),
    "ingest": (
        "codegraft.ingest.v1.Project",
        "codegraft.ingest.v1.Source",
        "codegraft.ingest.v1.Upload",
        "codegraft.ingest.v1.Snapshot",
        "codegraft.ingest.v1.StoredCredential",
        "codegraft.ingest.v1.ProjectDeletion",
    ),
    "scanner": ("codegraft.scanner.v1.Scan", "codegraft.scanner.v1.Dataset", "codegraft.access.v1.StoredPlaces"),
    "trainer": (
        "codegraft.trainer.v1.Run",
        "codegraft.trainer.v1.Checkpoint",
        "codegraft.trainer.v1.RunEvent",
        "codegraft.access.v1.StoredPlaces",
    ),
    "inference": ("codegraft.inference.v1.Serving", "codegraft.inference.v1.FeedbackHour"),
    kept.BUCKET: ("codegraft.inference.v1.KeptCompletion",),
}
"""By bucket of JetStream KV: the messages that it holds."""


def streams() -> dict[str, dict[str, Any]]:
    """The streams as the services make them; times in seconds, 0 for ever. Copies: CODEGRAFT_NATS_REPLICAS."""
    return {
        events.STREAM: {
            "subjects": [f"{bus.PREFIX}>"],
            "retention": "limits",
            "max_age": events.KEPT.total_seconds(),
            "duplicate_window": events.DUPLICATES.total_seconds(),
        },
        jobs.STREAM: {
            "subjects": ["jobs.>"],
            "retention": "workqueue",
            "max_age": 0.0,
            "max_msgs_per_subject": 1,
            "discard": "new",
            "consumers": {
                jobs.durable(kind): {"filter_subject": f"jobs.{kind}.>", "ack_wait": queue.ACK_WAIT.total_seconds()}
                for service in permissions.SERVICES.values()
                for kind in service.jobs
            },
        },
        jobs.DEAD_STREAM: {"subjects": ["dead.>"], "retention": "limits", "max_age": jobs.DEAD_KEPT.total_seconds()},
        audit.STREAM: {
            "subjects": ["audit.>"],
            "retention": "limits",
            "max_age": audit.KEPT.total_seconds(),
            "deny_delete": True,
            "deny_purge": True,
        },
        **{
            f"KV_{bucket}": {
                "subjects": [f"$KV.{bucket}.>"],
                "retention": "limits",
                "max_age": kept.BOUNDS.age.total_seconds() if bucket == kept.BUCKET else 0.0,
                "max_msgs_per_subject": 1,
                **({"max_bytes": kept.BOUNDS.size} if bucket == kept.BUCKET else {}),
            }
            for bucket in RECORDS
        },
    }


# --- jobs, audit, state: the services' own --------------------------------------------------------------------------


def channels() -> dict[str, Any]:
    kinds = sorted(kind for service in permissions.SERVICES.values() for kind in service.jobs)
    kind = {"description": "Kind of job.", "enum": kinds}
    name = {"description": "The job's resource name with dots for slashes: projects.acme.runs.r-1."}
    return {
        "jobs": {
            "address": "jobs.{kind}.{name}",
            "description": "Jobs, and parts of jobs, that wait for a worker. One message a job: the server refuses a"
            " second. Handed out again after 30 seconds of silence, without a bound: who owns a job, and how often it"
            " was tried, is in its record.",
            "parameters": {"kind": kind, "name": name},
            "messages": {"Job": {"$ref": "#/components/messages/Job"}},
            "x-jetstream-stream": jobs.STREAM,
        },
        "dead": {
            "address": "dead.{kind}.{name}",
            "description": "Jobs that were given up, with the reason: for people (docs/runbooks/jobs-fail.md).",
            "parameters": {"kind": kind, "name": name},
            "messages": {"DeadJob": {"$ref": "#/components/messages/DeadJob"}},
            "x-jetstream-stream": jobs.DEAD_STREAM,
        },
        "audit": {
            "address": "audit.{service}.{project}",
            "description": "One record of every call that changed something. Read it with codegraft audit.",
            "parameters": {
                "service": {"description": "Who took the call.", "enum": list(permissions.SERVICES)},
                "project": {"description": "Project id; _ for what is no project's."},
            },
            "messages": {"AuditRecord": {"$ref": "#/components/messages/AuditRecord"}},
            "x-jetstream-stream": audit.STREAM,
        },
        "quota": {
            "address": f"{quota.PREFIX}{{service}}",
            "description": "What processes let in of requests and tokens a minute, so that a limit holds over all of"
            " them. No stream: nothing keeps it, and a process that misses some counts alone for that long.",
            "parameters": {"service": {"description": "Whose process it is.", "enum": list(permissions.SERVICES)}},
            "messages": {"SharedUsage": {"$ref": "#/components/messages/SharedUsage"}},
        },
        **{f"state-{bucket}": _bucket(bucket) for bucket in RECORDS},
    }


def _bucket(bucket: str) -> dict[str, Any]:
    described = {
        keyring.BUCKET: "Records of the API keys: ingest writes, every service reads.",
        kept.BUCKET: "Texts of completions that a project wants kept, for inference alone.",
    }
    alone = f"Records of {bucket}, for itself alone: others ask it by gRPC (Get, List, Watch)."
    return {
        "address": f"$KV.{bucket}.{{key}}",
        "description": described.get(bucket, alone),
        "parameters": {
            "key": {"description": "Message and resource, dots for slashes: Source.projects.acme.sources.app."}
        },
        "messages": {_last(name): {"$ref": f"#/components/messages/{_last(name)}"} for name in RECORDS[bucket]},
        "x-jetstream-stream": f"KV_{bucket}",
    }


def operations() -> dict[str, Any]:
    operations: dict[str, Any] = {}

    def add(service: str, verb: str, to: str, action: str, what: str) -> None:
        operations[f"{service}.{verb}"] = {
            "action": action,
            "channel": channel(to),
            "description": what,
            "tags": [{"name": service}],
        }

    for name, service in permissions.SERVICES.items():
        kinds = ", ".join(service.jobs)
        if service.jobs:
            add(name, "queues.jobs", "jobs", "send", f"Kinds: {kinds}. Repeated every so often while the job waits.")
            add(
                name,
                "takes.jobs",
                "jobs",
                "receive",
                f"Kinds: {kinds}. Acknowledged once the job's record has the end.",
            )
            add(name, "buries.jobs", "dead", "send", f"Kinds: {kinds}. Once for each message of the queue.")
        add(
            name,
            "audits",
            "audit",
            "send",
            "Before the call is answered; a failure is logged and does not fail the call.",
        )
        if service.reads_audit:
            add(name, "reads.audit", "audit", "receive", "For AuditService.ListAuditRecords.")
        add(
            name,
            "tells.usage",
            "quota",
            "send",
            f"At most every {INTERVAL:g} seconds while owners with a limit call, sooner where it is much of a limit.",
        )
        add(name, "hears.usage", "quota", "receive", "Taken from the buckets of this process, too.")
        add(name, "writes.state", f"state-{name}", "send", "Compare-and-set on the key's revision.")
        add(name, "follows.state", f"state-{name}", "receive", "Begun anew behind the last revision every two minutes.")
        for bucket in service.buckets:
            add(name, f"writes.{bucket}", f"state-{bucket}", "send", "Compare-and-set on the key's revision.")
        if service.writes_keys:
            add(name, "writes.keys", f"state-{keyring.BUCKET}", "send", "Compare-and-set on the key's revision.")
        add(name, "follows.keys", f"state-{keyring.BUCKET}", "receive", "So that no call waits for NATS.")
    return operations


def messages() -> dict[str, Any]:
    name = {"type": "string", "description": "The job's resource name, UTF-8."}
    trace = {"traceparent": {"type": "string", "description": "W3C trace context of what queued it."}}
    dead = {
        "Codegraft-Reason": {"type": "string", "description": "Reason of the error, and what it says."},
        "Nats-Msg-Id": {"type": "string", "description": "JOBS: and the sequence of the job's message."},
    }
    return {
        "Job": {
            "name": "Job",
            "contentType": "text/plain",
            "headers": {"type": "object", "properties": trace},
            "payload": name,
        },
        "DeadJob": {
            "name": "DeadJob",
            "contentType": "text/plain",
            "headers": {"type": "object", "properties": dead, "required": list(dead)},
            "payload": name,
        },
        "AuditRecord": _record("codegraft.access.v1.AuditRecord"),
        "SharedUsage": _record("codegraft.access.v1.SharedUsage"),
        **{_last(name): _record(name) for names in RECORDS.values() for name in names},
    }


def _record(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "contentType": "application/protobuf",
        "summary": " ".join(contract.messages()[name].comment.split()),
        "description": f"Fields: docs/api/{name.split('.')[1]}.md#{_last(name).lower()}.",
    }


def channel(name: str) -> dict[str, str]:
    """Reference to a channel."""
    return {"$ref": f"#/channels/{name}"}


def _last(name: str) -> str:
    return name.rpartition(".")[2]
