"""The figures that every service has: calls, jobs, NATS, the object store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from services.core.errors import CodegraftError
from services.core.telemetry.metrics import LONG, collected, counter, gauge, histogram

RPC_SECONDS = histogram(
    "rpc_server_call_duration_seconds",
    "RPCs that ended, by full method name and status code, and how long they took. Streams last as long as they do.",
    "rpc_method",
    "rpc_response_status_code",
)

QUOTA_REFUSALS = counter(
    "codegraft_quota_refusals_total",
    "Calls and fetches that were refused because a quota was used up, by its limit, and whether it is a project's or a "
    "key's.",
    "quota",
    "owner",
)

QUOTA_MESSAGES = counter(
    "codegraft_quota_messages_total",
    "Messages about used rates, sent to the other processes and received from them. Who has nothing to tell is silent.",
    "direction",
)
QUOTA_PEERS = gauge(
    "codegraft_quota_peers", "Other processes from which a message about used rates came within 5 minutes."
)
QUOTA_HEARD = gauge(
    "codegraft_quota_last_received_timestamp_seconds",
    "When the newest message about used rates came from another process, as Unix time; 0 while none has.",
)
QUOTA_ALONE = gauge(
    "codegraft_quota_alone",
    "1 while the process counts rates for itself alone, since it is cut off from NATS or that lets nothing through.",
)
QUOTA_FALLBACKS = counter(
    "codegraft_quota_fallbacks_total", "How often the process began to count rates for itself alone, and why.", "reason"
)

ATTEMPT_SECONDS = histogram(
    "codegraft_job_attempt_seconds",
    "Attempts at jobs by this process, and how long they took, by the state that they brought the job to; LOST where "
    "another worker has it, or NATS was away at the end.",
    "kind",
    "outcome",
    buckets=LONG,
)
JOBS = collected(
    "codegraft_jobs",
    "Jobs that have not ended, by state. Every replica tells all: take the largest.",
    "kind",
    "state",
)
OLDEST = collected(
    "codegraft_job_oldest_queued_timestamp_seconds",
    "When the job that waits longest was created, as Unix time; 0 while none waits.",
    "kind",
)
DEAD = counter("codegraft_jobs_dead_total", "Jobs and parts of jobs that were given up: dead letters.", "kind")
PARTS_WAITING = gauge(
    "codegraft_parts_waiting", "Parts without result, of the jobs that this process puts together.", "kind"
)
PART_SECONDS = histogram(
    "codegraft_part_seconds", "Parts of jobs that this process made or failed to make.", "kind", "outcome"
)

EVENTS = counter("codegraft_events_published_total", "Events that this process published, by CloudEvents type.", "type")
NATS_CONNECTED = gauge("codegraft_nats_connected", "Whether the process is connected to NATS.", "connection")
NATS_ERRORS = counter("codegraft_nats_errors_total", "Requests to NATS that failed or were not answered.")

STORE_SECONDS = histogram(
    "codegraft_store_request_seconds", "Requests to the object store, uploads and downloads with their bytes."
)
STORE_ERRORS = counter(
    "codegraft_store_errors_total",
    "Requests to the object store that failed; an object that is not there is no failure.",
    "reason",
)


@contextmanager
def timed_part(kind: str) -> Iterator[None]:
    """Counts the making of a part, by how it ends."""
    began, outcome = time.monotonic(), "MADE"
    try:
        yield
    except CodegraftError as error:
        outcome = error.reason
        raise
    except BaseException:
        outcome = "INTERRUPTED"
        raise
    finally:
        PART_SECONDS.labels(kind, outcome).observe(time.monotonic() - began)
