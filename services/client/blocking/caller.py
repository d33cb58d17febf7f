# Made by make_blocking.py from services/client/aio; change it there.
"""One call: its deadline, its error, and whether it may be repeated."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import grpc

from services.client import retry
from services.client.streams import Stream, answer
from services.core.errors import CodegraftError, DeadlineExceeded, Unavailable
from services.core.rpc import context
from services.core.rpc.client import AUTHORIZATION
from services.core.rpc.status import from_rpc

Request = TypeVar("Request")
Response = TypeVar("Response")
Item = TypeVar("Item")


class _Paged(Protocol):
    page_token: str


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


PagedRequest = TypeVar("PagedRequest", bound=_Paged)
PagedResponse = TypeVar("PagedResponse", bound=_Page)


def new_request_id() -> str:
    """An idempotency key: the same through every try of one Create."""
    return secrets.token_hex(16)


class Caller:
    """Makes calls with a default deadline and turns their failures into the classes of services/core/errors.py.

    Within a service, calls made for a call that is being served carry its request id and trace, and end with it.

    Args:
        timeout: seconds.
        key: API key or token; empty sends none.
    """

    def __init__(self, timeout: float, key: str = "") -> None:
        self.timeout = timeout
        self._key = key

    def patient(self, timeout: float) -> Caller:
        """One with a deadline of at least so many seconds."""
        return Caller(max(self.timeout, timeout), self._key)

    def _metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What goes along: request id and trace of the call being served, and who calls."""
        who = ((AUTHORIZATION, f"Bearer {self._key}"),) if self._key else ()
        return (*context.outgoing(), *who)

    def unary(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request, *, repeat: bool
    ) -> Response:
        """The response.

        Args:
            repeat: whether the call may be made again when the service was not reachable or too busy: reads, and
                changes that have the same effect once or twice. All tries share one deadline.

        Raises:
            CodegraftError: the class that belongs to the error's reason.
        """
        timeout = context.shortened(self.timeout) or 0.0
        end = time.monotonic() + timeout
        attempt = 0
        earlier: CodegraftError | None = None
        while True:
            try:
                return method(request, timeout=timeout, metadata=self._metadata())
            except grpc.RpcError as failure:
                error = from_rpc(failure)
            if earlier is not None and isinstance(error, DeadlineExceeded):
                raise earlier  # which says why there was no answer in time
            earlier = error
            pause = retry.delay(error, attempt)
            timeout = end - time.monotonic() - pause
            attempt += 1
            if not repeat or not retry.will_pass(error) or attempt == retry.ATTEMPTS or timeout <= 0:
                raise error
            time.sleep(pause)

    def pages(
        self, method: grpc.UnaryUnaryMultiCallable[PagedRequest, PagedResponse], request: PagedRequest
    ) -> Iterator[PagedResponse]:
        """Every page of a list; each has a deadline of its own."""
        while True:
            page = self.unary(method, request, repeat=True)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def stream(
        self,
        method: grpc.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        convert: Callable[[Response], Item],
        timeout: float | None = None,
    ) -> Stream[Item]:
        """The messages of one stream, converted; never repeated."""
        call = method(request, timeout=context.shortened(timeout), metadata=self._metadata())
        return Stream(call, convert)

    def follow(self, method: grpc.UnaryStreamMultiCallable[Request, Response], request: Request) -> Iterator[Response]:
        """The messages of a watch, taken up again when the connection breaks; ends when the service ends it.

        The request object is read anew at each try, so that the caller can move its position forward.

        Raises:
            CodegraftError: the class that belongs to the error's reason; an outage only after some tries in a row,
                of which there are more once the watch was under way.
        """
        failures, patience = 0, retry.ATTEMPTS
        while True:
            try:
                for response in self.stream(method, request, _itself):
                    failures, patience = 0, 2 * retry.ATTEMPTS
                    yield response
                return
            except Unavailable as error:
                outage: CodegraftError = error
            if failures + 1 >= patience or not retry.will_pass(outage):
                raise outage
            time.sleep(retry.delay(outage, failures))
            failures += 1

    def upload(self, method: grpc.StreamUnaryMultiCallable[Request, Response], requests: Iterator[Request]) -> Response:
        """The response to a stream of requests, tried once, without a deadline but that of the call being served.

        Args:
            method: of a blocking channel, see :func:`services.client.streams.answer`.

        Raises:
            CodegraftError: the class that belongs to the error's reason.
        """
        call = method.future(requests, timeout=context.shortened(None), metadata=self._metadata())
        try:
            response: Response = answer(call)
        except grpc.RpcError as failure:
            raise from_rpc(failure) from None
        return response


def _itself(message: Response) -> Response:
    return message
