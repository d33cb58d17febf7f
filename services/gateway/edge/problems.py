"""Failures over HTTP: the errors of services/core/errors.py in OpenAI's shape, with the gRPC reason as code.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import orjson
from starlette.responses import Response

from services.core.errors import Code, CodegraftError, QuotaExceeded

_STATUS = {
    Code.INVALID_ARGUMENT: 400,
    Code.OUT_OF_RANGE: 400,
    Code.FAILED_PRECONDITION: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.ABORTED: 409,
    Code.RESOURCE_EXHAUSTED: 429,
    # Not by the client, who is there to read it: the service gave the call up.
    Code.CANCELLED: 503,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_PARAMS = {
    "parent": "model",
    "project": "model",
    "checkpoint": "model",
    "adapter.checkpoint": "model",
    "prompt.path": "prompt",
    "stop.max_tokens": "max_tokens",
    "stop.strings": "stop",
    "messages.role": "messages",
    "characters": "accepted_characters",
}
"""Fields of the contract that bodies spell otherwise; ``sampling.`` is left out of the rest."""


_RATES = {"requests_per_minute": "requests", "tokens_per_minute": "tokens"}
"""Quotas that OpenAI has, too, and how its headers call them: x-ratelimit-limit-requests and so on."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field of the request at fault."""
    code: str
    """The reason of the gRPC error, or one of the gateway's own: as services/core/errors.py spells them."""


@dataclass(frozen=True, slots=True)
class Problem:
    """The body of a failed request."""

    error: Fault


class Refused(Exception):
    """A request that the gateway itself refuses, for what HTTP alone knows of.

    Args:
        status: HTTP's.
        code: as services/core/errors.py spells reasons.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after


def status_of(error: CodegraftError | Refused) -> int:
    """The HTTP status."""
    return error.status if isinstance(error, Refused) else _STATUS.get(error.code, 500)


def problem(error: CodegraftError | Refused) -> Problem:
    """The body that tells of an error."""
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if isinstance(error, Refused):
        return Problem(Fault(error.message, kind, error.param, error.code))
    field = _PARAMS.get(error.field, error.field.removeprefix("sampling.")) or None
    message = f"{error.message}. {error.hint}" if error.hint else error.message
    return Problem(Fault(message, kind, field, error.reason))


def response(error: CodegraftError | Refused) -> Response:
    """The response that tells of an error; with Retry-After where the service said when to come back."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if isinstance(error, QuotaExceeded) and (kind := _RATES.get(error.metadata.get("quota", ""))):
        headers[f"x-ratelimit-limit-{kind}"] = error.metadata.get("limit", "")
        headers[f"x-ratelimit-remaining-{kind}"] = "0"
        headers[f"x-ratelimit-reset-{kind}"] = f"{error.retry_after or 0:.3f}s"
    status = status_of(error)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(orjson.dumps(problem(error)), status, headers, "application/json")
