"""The outermost layer: identity and deadline of a request, headers of every response, errors, one log line."""

from __future__ import annotations

import re
import time
from typing import Any

import structlog
from opentelemetry.trace import SpanKind
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.core import log
from services.core.errors import CodegraftError, InternalError
from services.core.rpc import context as call_context
from services.core.telemetry import tracing
from services.gateway.config import GatewaySettings
from services.gateway.edge import problems
from services.gateway.edge.attending import ClientGone
from services.gateway.edge.guard import Guard
from services.gateway.edge.problems import Refused
from services.gateway.figures import ACTIVE, HTTP_SECONDS

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # For what a browser might take for a page. A console's pages bring a policy of their own.
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
_READABLE = (
    "x-request-id",
    "x-codegraft-adapter",
    "x-codegraft-checkpoint",
    "retry-after",
    *(f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)
"""Headers of responses that pages of the named origins may read."""
_HTTPS_ONLY = "max-age=31536000"
"""Where we serve HTTPS ourselves, browsers come by it only, for a year. A proxy before us says so or not."""
_CREDENTIALS = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,4095}")
"""What gRPC takes as metadata."""
_CLIENT_GONE = 499
"""What nginx calls a request whose client did not wait; only the log sees it."""
_QUIET = frozenset({"/health"})
_logger = log.get("gateway")


class Edge:
    """ASGI middleware; see the module's docstring.

    The caller's Authorization header goes on to the services as it is: they decide, the gateway does not.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app, self._guard, self._timeout = app, Guard(settings), settings.gateway_timeout_seconds
        self._running, self._most = 0, settings.gateway_requests
        self._answer: ASGIApp = self._answered
        if settings.gateway_origins:  # around the errors, too: a page has to read why it was refused
            self._answer = CORSMiddleware(
                self._answered,
                allow_origins=[origin.lower().rstrip("/") for origin in settings.gateway_origins],
                allow_methods=["GET", "POST"],
                # Clients send headers of their own, openai's nine of them. A key is one that the page itself has.
                allow_headers=["*"],
                expose_headers=_READABLE,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            return
        call = _Call({**scope, "app": self}, receive, send)
        call.scope[_CALL] = call
        call_context.request_id.set(call.request_id)
        tracing.enter(call.span)
        call_context.set_deadline(self._timeout)
        structlog.contextvars.bind_contextvars(request_id=call.request_id)
        self._running += 1
        ACTIVE.inc()
        try:
            self._guard.check(Headers(scope=scope), scope["scheme"])
            await self._answer(call.scope, call.receive, call.send)
        except ClientGone:
            call.status = _CLIENT_GONE
        except Refused as error:
            await call.failed(error, call.send)
        finally:
            self._running -= 1
            ACTIVE.dec()
            call.ended()

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application's answer, or one that tells of its error."""
        call: _Call = scope[_CALL]
        try:
            if self._running > self._most:
                raise Refused(429, "OVERLOADED", "Too many requests are being answered.", retry_after=1.0)
            call_context.authorization.set(_credentials(Headers(scope=scope).get("authorization", "")))
            # With an "app" the router raises for what it cannot route; without it would answer in a shape of its own.
            await self._app(scope, receive, send)
        except HTTPException as error:  # no such route, or not with this method
            code, message = _ROUTING.get(error.status_code, ("BAD_REQUEST", error.detail))
            await call.failed(Refused(error.status_code, code, message), send, dict(error.headers or {}))
        except (CodegraftError, Refused) as error:
            await call.failed(error, send)
        except ClientGone:
            raise
        except Exception as error:
            _logger.error("unexpected error", path=scope["path"], exc_info=error)
            message = f"internal error; look for request id {call.request_id} in the logs"
            await call.failed(InternalError(message, request_id=call.request_id), send)


_CALL = "codegraft.call"
"""Key of a request's scope: the :class:`_Call`."""
_ROUTING = {
    404: ("NOT_FOUND", "There is no such address. /openapi.json lists those that there are."),
    405: ("METHOD_NOT_ALLOWED", "The address does not take this method. /openapi.json lists those that there are."),
}


class _Call:
    """One request on its way."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self._began, self._reason = time.monotonic(), ""
        headers = Headers(scope=scope)
        self.request_id = call_context.accept_request_id(headers.get(call_context.REQUEST_ID, ""))
        given = headers.get(call_context.TRACEPARENT, "")
        self.span = tracing.begin(scope["method"], SpanKind.SERVER, given, {"http.request.method": scope["method"]})
        self._is_unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self.status = 0
        """HTTP's; 0 until the response has begun."""

    async def receive(self) -> Message:
        """Receives, and notes when the body has come."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            self._is_unread = False
        return message

    async def send(self, message: Message) -> None:
        """Sends with what every response has in its head."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[call_context.REQUEST_ID] = self.request_id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if self.scope["scheme"] == "https":
                headers["strict-transport-security"] = _HTTPS_ONLY
            if self._is_unread:  # nobody will read the rest of the body, however long it is
                headers["connection"] = "close"
        await self._send(message)

    async def failed(self, error: CodegraftError | Refused, send: Send, headers: dict[str, str] | None = None) -> None:
        """Answers with the error, if nothing was sent yet."""
        self._reason = error.code if isinstance(error, Refused) else error.reason
        if self.status:
            return
        response = problems.response(error)
        response.headers.update(headers or {})
        await response(self.scope, self.receive, send)

    def ended(self) -> None:
        """The one log line, the figures, and the end of the span."""
        path: str = self.scope["path"]
        tell = _logger.debug if path in _QUIET else _logger.info
        details: dict[str, Any] = {"reason": self._reason} if self._reason else {}
        method, seconds = self.scope["method"], time.monotonic() - self._began
        tell("request", method=method, path=path[:200], status=self.status, seconds=round(seconds, 4), **details)
        operation = getattr(self.scope.get("endpoint"), "__name__", "none")  # as the router has noted it
        if path not in _QUIET:
            HTTP_SECONDS.labels(operation, str(self.status)).observe(seconds)
        self.span.update_name(f"{method} {operation}")
        self.span.set_attribute("http.response.status_code", self.status)
        tracing.end(self.span, reason=self._reason if self.status >= 500 else "")


def _credentials(header: str) -> str:
    if header and not _CREDENTIALS.fullmatch(header):
        raise Refused(401, "UNAUTHENTICATED", "The Authorization header cannot be read. Send Bearer and the API key.")
    return header
