"""What every call of every service goes through: ids, deadline, the gate, one log line, errors made into statuses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog
from grpc_status import rpc_status
from opentelemetry.trace import SpanKind

from services.core import disk, log
from services.core.audit.calls import Audit
from services.core.audit.log import AuditLog
from services.core.auth import policy
from services.core.auth.caller import ANYBODY, set_current
from services.core.auth.gate import Gate
from services.core.errors import CodegraftError, InternalError, ShuttingDown
from services.core.quota.quotas import Quotas
from services.core.rpc import context as call_context
from services.core.rpc import times
from services.core.rpc.status import grpc_code, to_status
from services.core.telemetry import figures, tracing
from services.core.version import release

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
logger = log.get(__name__)

_QUIET = ("/grpc.health.v1.", "/grpc.reflection.")
"""Services whose calls are logged at debug level only: probes come every second."""
_CODES = {int(code.value[0]): code for code in grpc.StatusCode}


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler; see the module's docstring.

    Args:
        gate: says who calls, and whether it may; None lets everybody do everything.
        audit: takes a record of every call that changes something; None keeps none.
        quotas: counts the calls; None counts none.
    """

    def __init__(self, gate: Gate | None = None, audit: AuditLog | None = None, quotas: Quotas | None = None) -> None:
        self._gate = gate or Gate(None)
        self._audit = Audit(audit)
        self._quotas = quotas
        self._watches: set[asyncio.Task[Any]] = set()
        self._draining = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Called by grpc for each call."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: grpc answers UNIMPLEMENTED
            return handler
        method = str(handler_call_details.method)
        metadata = {key: value for key, value in handler_call_details.invocation_metadata or ()}
        if handler.response_streaming:
            kind: Any = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            behaviour = self._streaming(method, metadata, inner)
        else:
            kind = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
            behaviour = self._unary(method, metadata, inner, handler.request_streaming)
        wrapped: Handler = kind(
            behaviour,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    async def settle(self) -> None:
        """Returns once the audit log has every call that ended."""
        await self._audit.settle()

    def end_watches(self) -> None:
        """Ends the streams of methods named Watch… with SHUTTING_DOWN, now and from now on.

        They have no end of their own, so a drain that waited for them would always take its whole time; their callers
        take them up again at another replica.
        """
        self._draining = True
        for task in self._watches:
            task.cancel()

    def _streaming(self, method: str, metadata: dict[str, Any], inner: Any) -> Any:
        is_watch = method.rpartition("/")[2].startswith("Watch")

        # Writing to the context, where grpc would also take an async generator: a call that is cancelled while grpc
        # writes would leave a generator, and the handler in it, to the garbage collector.
        async def behaviour(request: Any, context: Context) -> None:
            call = _Call(method, metadata, context, self._gate, self._audit, self._quotas)
            task = asyncio.current_task()
            if is_watch and task is not None:
                self._watches.add(task)
                task.add_done_callback(self._watches.discard)
            responses: Any = None
            try:
                if is_watch and self._draining:
                    raise ShuttingDown("this replica is shutting down", hint="Watch again.")
                request = await call.admit(request)
                with call.gathering(), contextlib.ExitStack() as while_streaming:
                    if task is not None:
                        while_streaming.enter_context(self._gate.holding(call.about, task.cancel))
                    responses = inner(request, context)
                    if hasattr(responses, "__aiter__"):
                        async for response in responses:
                            await _write(context, response)
                    else:
                        await responses  # a handler that writes to the context itself (health)
            except asyncio.CancelledError:
                if is_watch and self._draining:
                    await call.failed(ShuttingDown("this replica is shutting down", hint="Watch again."))
                if (ended := self._gate.why_ended(call.about)) is not None:
                    await call.failed(ended)
                call.cancelled()
                raise
            except Exception as error:
                await call.failed(error)
            finally:
                if hasattr(responses, "aclose"):
                    await responses.aclose()  # runs the handler's own clean-up now, not at garbage collection
            await call.recorded()
            call.ended()

        return behaviour

    def _unary(self, method: str, metadata: dict[str, Any], inner: Any, takes_stream: bool) -> Any:
        async def behaviour(request: Any, context: Context) -> Any:
            call = _Call(method, metadata, context, self._gate, self._audit, self._quotas)
            task = asyncio.current_task()
            try:
                request = await call.admit(request)
                with call.gathering(), contextlib.ExitStack() as while_streaming:
                    if takes_stream and task is not None:
                        while_streaming.enter_context(self._gate.holding(call.about, task.cancel))
                    response = await inner(request, context)
            except asyncio.CancelledError:
                if takes_stream and (ended := self._gate.why_ended(call.about)) is not None:
                    await call.failed(ended)
                call.cancelled()
                raise
            except Exception as error:
                await call.failed(error)
            await call.recorded()
            call.ended()
            return response

        return behaviour


async def _write(context: Context, response: Any) -> None:
    """Raises CancelledError where grpc finds out, before it tells, that the caller has gone."""
    try:
        await context.write(response)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


class _Call:
    """One call on its way: bound ids, its clock, its end. Nothing is unbound: grpc gives every call a task."""

    def __init__(
        self,
        method: str,
        metadata: dict[str, Any],
        context: Context,
        gate: Gate,
        audit: Audit,
        quotas: Quotas | None,
    ) -> None:
        self.method = method
        self.context = context
        self.caller = self.about = ANYBODY
        self._gate, self._quotas = gate, quotas
        self._entry = audit.entry(method)
        self._metadata = metadata
        self.began = time.monotonic()
        self.request_id = call_context.accept_request_id(str(metadata.get(call_context.REQUEST_ID, "")))
        call_context.request_id.set(self.request_id)
        call_context.set_deadline(context.time_remaining())
        self._span = tracing.begin(
            method.lstrip("/"),
            SpanKind.SERVER,
            str(metadata.get(call_context.TRACEPARENT, "")),
            {"rpc.system.name": "grpc", "rpc.method": method.lstrip("/"), "codegraft.request_id": self.request_id},
        )
        tracing.enter(self._span)
        # For every log line and every event that comes of the call.
        structlog.contextvars.bind_contextvars(request_id=self.request_id)
        self._identity = ((call_context.REQUEST_ID, self.request_id),)
        context.set_trailing_metadata(self._identity)

    async def admit(self, request: Any) -> Any:
        """The request, when its caller may make it.

        The caller is told its request id before anything else happens, so that it is known while a stream runs.
        """
        told = ((call_context.VERSION, release()), (call_context.TIME, f"{time.time():.3f}"))
        await self.context.send_initial_metadata((*self._identity, *told))
        self.caller = await self._gate.identify(self.method, self._metadata)
        set_current(self.caller)
        structlog.contextvars.bind_contextvars(caller=self.caller.subject)
        self._entry.identified(self.caller)
        seen: list[Any] = []  # the request, of a stream the first one

        def see(first: Any) -> None:
            seen.append(first)
            self._entry.requested(first)

        admitted = await self._gate.admit(self.caller, self.method, request, see)
        self.about = policy.about(self.caller, self.method, seen[0]) if seen else self.caller
        if self._quotas is not None:  # after the gate: what was denied is no use that its project made
            self._quotas.count(self.caller, self.method, seen[0] if seen else None)
        for first in seen:
            times.check(first)
        return admitted

    def gathering(self) -> AbstractContextManager[object]:
        """For the time of the handler: what it changes is noted."""
        return self._entry.gathering()

    async def recorded(self, code: grpc.StatusCode = grpc.StatusCode.OK, reason: str = "") -> None:
        """Returns once the audit log has the call."""
        await self._entry.end(code.name, reason, self.request_id)

    def ended(self, code: grpc.StatusCode | None = None, reason: str = "", message: str = "") -> None:
        """The call's one log line, its figures and the end of its span; without a code, the one that the handler set,
        else OK."""
        given: Any = code or self.context.code()  # a number after set_code, whatever its type says
        code = given if isinstance(given, grpc.StatusCode) else _CODES.get(given or 0, grpc.StatusCode.UNKNOWN)
        is_quiet, seconds = self.method.startswith(_QUIET), time.monotonic() - self.began
        tell = logger.debug if is_quiet else logger.info
        details = {"reason": reason, "error": message} if reason else {}
        tell("call", method=self.method, code=code.name, seconds=round(seconds, 4), **details)
        if not is_quiet:
            figures.RPC_SECONDS.labels(self.method.lstrip("/"), code.name).observe(seconds)
        self._span.set_attribute("rpc.response.status_code", code.name)
        tracing.end(self._span, reason="" if code is grpc.StatusCode.OK else reason or code.name)

    def cancelled(self) -> None:
        """The log line of a call whose caller went away or whose deadline passed."""
        left = self.context.time_remaining()
        overdue = left is not None and left <= 0
        code = grpc.StatusCode.DEADLINE_EXCEEDED if overdue else grpc.StatusCode.CANCELLED
        self._entry.end_later(code.name, "", self.request_id)
        self.ended(code)

    async def failed(self, error: Exception) -> NoReturn:
        """Ends the call with the error's status."""
        if isinstance(error, grpc.aio.AbortError):  # the handler has ended it already (health, for unknown services)
            await self.recorded(grpc.StatusCode.UNKNOWN)
            self.ended()
            raise error
        if not isinstance(error, CodegraftError):
            error = disk.full(error) or error
        if not isinstance(error, CodegraftError):
            logger.error("unexpected error", method=self.method, exc_info=error)
            error = InternalError(
                f"internal error; look for request id {self.request_id} in the logs", request_id=self.request_id
            )
        await self.recorded(grpc_code(error.code), error.reason)
        self.ended(grpc_code(error.code), error.reason, error.message)
        status = rpc_status.to_status(to_status(error))
        await self.context.abort(status.code, status.details, (*(status.trailing_metadata or ()), *self._identity))
