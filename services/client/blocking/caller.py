# Made by make_blocking.py from services/client/aio; change it there.
"""One call: its deadline, its error, and whether it may be repeated."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import grpc

from services.core.backoff import Backoff
from services.core.errors import Cancelled, CodegraftError, Unavailable
from services.core.rpc.status import from_rpc

Request = TypeVar("Request")
Response = TypeVar("Response")


class _Paged(Protocol):
    page_token: str


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


PagedRequest = TypeVar("PagedRequest", bound=_Paged)
PagedResponse = TypeVar("PagedResponse", bound=_Page)

ATTEMPTS = 5
"""Tries of a call that may be repeated, the first included: about three seconds of an outage are bridged."""
LONGEST_RETRY_AFTER = 10.0
"""Seconds; a service that asks for more patience gets its error passed on instead."""


def new_request_id() -> str:
    """An idempotency key: the same through every try of one Create."""
    return secrets.token_hex(16)


class Caller:
    """Makes calls with a default deadline and turns their failures into the classes of services/core/errors.py."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._backoff = Backoff()

    def unary(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request, *, repeat: bool
    ) -> Response:
        """The response.

        Args:
            repeat: whether the call may be made again when the service was not reachable: reads, and changes that
                have the same effect once or twice.

        Raises:
            CodegraftError: the class that belongs to the error's reason.
        """
        for attempt in range(ATTEMPTS):
            try:
                return method(request, timeout=self.timeout)
            except grpc.RpcError as failure:
                error = from_rpc(failure)
            delay = max(error.retry_after or 0.0, self._backoff.delay(attempt))
            if not repeat or not isinstance(error, Unavailable) or delay > LONGEST_RETRY_AFTER:
                raise error
            if attempt < ATTEMPTS - 1:
                time.sleep(delay)
        raise error

    def pages(
        self, method: grpc.UnaryUnaryMultiCallable[PagedRequest, PagedResponse], request: PagedRequest
    ) -> Iterator[PagedResponse]:
        """Every page of a list."""
        while True:
            page = self.unary(method, request, repeat=True)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def pause(self, attempt: int) -> None:
        """Waits before the try that follows the given one (from 0)."""
        time.sleep(self._backoff.delay(attempt))

    def stream(
        self,
        method: grpc.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        timeout: float | None = None,
    ) -> Iterator[Response]:
        """The messages of one stream, never repeated. Leaving the loop cancels the call.

        Raises:
            CodegraftError: the class that belongs to the error's reason.
        """
        call: Any = method(request, timeout=timeout)
        try:
            for response in call:
                yield response
        except grpc.RpcError as failure:
            raise from_rpc(failure) from None
        finally:
            call.cancel()

    def follow(self, method: grpc.UnaryStreamMultiCallable[Request, Response], request: Request) -> Iterator[Response]:
        """The messages of a watch, taken up again when the connection breaks; ends when the service ends it.

        The request object is read anew at each try, so that the caller can move its position forward.

        Raises:
            CodegraftError: the class that belongs to the error's reason; an outage only after some tries in a row.
        """
        failures = 0
        while True:
            try:
                for response in self.stream(method, request):
                    failures = 0
                    yield response
                return
            except (Unavailable, Cancelled) as error:
                outage: CodegraftError = error
            failures += 1
            if failures >= 2 * ATTEMPTS:
                raise outage
            self.pause(failures)
