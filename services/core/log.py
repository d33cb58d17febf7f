"""Structured logs: one JSON object a line on stderr, with the request they belong to and without secrets.

Libraries that use :mod:`logging` (grpc, nats, urllib3, transformers) come out in the same form.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import structlog
from opentelemetry import trace
from pydantic import SecretStr

REDACTED = "[redacted]"

_SECRET_KEY = re.compile(
    r"(?:^|[_.-])(?:password|passwd|passphrase|secret|authorization|cookie|credentials?|"
    r"(?:secret|access|api|private)[_-]?key|(?:access|auth|bearer|session)[_-]?token)$",
    re.IGNORECASE,
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^\s/@:\"']*(?::[^\s/@\"']*)?@")
_SIGNATURE = re.compile(
    r"(?i)(?<=[?&])(X-Amz-(?:Signature|Credential|Security-Token)|access_token|token|sig)=[^\s&\"']+"
)
"""What makes a URL a key: presigned ones of S3."""
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_API_KEY = re.compile(r"\bcg_[a-z0-9-]{1,32}_[A-Za-z0-9_-]{43,}")
_SHORTEST_SECRET = 6
"""Shorter values are not replaced wherever they occur: that would eat ordinary words."""

_hidden: set[str] = set()


def configure(service: str, level: str = "info") -> None:
    """Sends every log line of this process to stderr as JSON. May be called again; the last call counts.

    Args:
        service: written into every line.
        level: "debug", "info", "warning" or "error".
    """

    def add_service(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = service
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
        add_span,
    ]
    handler = _Stderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                # Plain text, not dict_tracebacks: that would write local variables, and with them secrets.
                structlog.processors.format_exc_info,
                redact,
                structlog.processors.JSONRenderer(default=str),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for chatty in ("urllib3", "nats", "httpx", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def get(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module: ``log.get(__name__)``; ``logger.info("what happened", key=value)``."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def bound(**values: str) -> AbstractContextManager[None]:
    """Puts values (request_id, job) into every line of this context and of the tasks it starts."""
    return structlog.contextvars.bound_contextvars(**values)


def request_id() -> str:
    """The request id of this context; empty outside of a request."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


def hide(*secrets: SecretStr | str) -> None:
    """Makes sure that these values never reach a log line, whatever text they are part of."""
    for secret in secrets:
        value = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
        if len(value) >= _SHORTEST_SECRET:
            _hidden.add(value)


def scrub(text: str) -> str:
    """The text without hidden secrets, API keys, credentials and signatures in URLs, and authorization headers."""
    for secret in _hidden:
        text = text.replace(secret, REDACTED)
    text = _API_KEY.sub(REDACTED, text)
    text = _URL_CREDENTIALS.sub(REDACTED + "@", text)
    text = _SIGNATURE.sub(rf"\1={REDACTED}", text)
    return _BEARER.sub(rf"\1 {REDACTED}", text)


def add_span(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog processor: which span of which trace a line belongs to."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"], event["span_id"] = f"{context.trace_id:032x}", f"{context.span_id:016x}"
    return event


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog processor: replaces the values of secret-sounding keys, and scrubs all text."""
    return {key: _clean(key, value) for key, value in event.items()}


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is at that moment, also when it was replaced after :func:`configure` (as tests do)."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _clean(key: str, value: object) -> object:
    if _SECRET_KEY.search(key) and value not in (None, ""):
        return REDACTED
    match value:
        case bool() | int() | float() | None:
            return value
        case SecretStr():
            return REDACTED
        case str():
            return scrub(value)
        case bytes():
            return scrub(value.decode(errors="replace"))
        case Mapping():
            return {str(inner): _clean(str(inner), item) for inner, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_clean("", item) for item in value]
        case _:
            return scrub(str(value))
