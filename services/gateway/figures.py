"""The gateway's figures."""

from __future__ import annotations

from services.core.telemetry.metrics import gauge, histogram

ACTIVE = gauge("http_server_active_requests", "HTTP requests that are being answered, open streams among them.")

HTTP_SECONDS = histogram(
    "http_server_request_duration_seconds",
    "HTTP requests that ended, by operation (none: no such one) and status (499: the client did not wait), and how "
    "long they took, streams to their end.",
    "operation",
    "http_response_status_code",
)
