"""What every call of every service goes through: ids, deadline, one log line, and errors made into statuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc
from grpc_status import rpc_status

from services.core import log
from services.core.errors import CodegraftError, InternalError
from services.core.rpc import context as call_context
from services.core.rpc.status import grpc_code, to_status

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
logger = log.get(__name__)

_QUIET = ("/grpc.health.v1.", "/grpc.reflection.")
"""Services whose calls are logged at debug level only: probes come every second."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler; see the module's docstring."""

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
            kind = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            behaviour: Any = _streaming(method, metadata, inner)
        else:
            kind = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
            behaviour = _unary(method, metadata, inner)
        return kind(
            behaviour,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


class _Call:
    """One call on its way: bound ids, its clock, its end."""

    def __init__(self, method: str, metadata: dict[str, Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.method = method
        self.context = context
        self.began = time.monotonic()
        self.request_id = call_context.accept_request_id(str(metadata.get(call_context.REQUEST_ID, "")))
        call_context.request_id.set(self.request_id)
        call_context.traceparent.set(call_context.accept_traceparent(str(metadata.get(call_context.TRACEPARENT, ""))))
        call_context.set_deadline(context.time_remaining())
        context.set_trailing_metadata(((call_context.REQUEST_ID, self.request_id),))

    def ended(self, code: grpc.StatusCode, reason: str = "", message: str = "") -> None:
        """The call's one log line."""
        tell = logger.info if not self.method.startswith(_QUIET) else logger.debug
        details = {"reason": reason, "error": message} if reason else {}
        tell("call", method=self.method, code=code.name, seconds=round(time.monotonic() - self.began, 4), **details)

    async def failed(self, error: Exception) -> NoReturn:
        """Ends the call with the error's status."""
        if not isinstance(error, CodegraftError):
            logger.error("unexpected error", method=self.method, exc_info=error)
            error = InternalError(
                f"internal error; look for request id {self.request_id} in the logs", request_id=self.request_id
            )
        self.ended(grpc_code(error.code), error.reason, error.message)
        status = rpc_status.to_status(to_status(error))
        trailers = (*(status.trailing_metadata or ()), (call_context.REQUEST_ID, self.request_id))
        await self.context.abort(status.code, status.details, trailers)


def _unary(method: str, metadata: dict[str, Any], inner: Any) -> Any:
    async def behaviour(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        call = _Call(method, metadata, context)
        with log.bound(request_id=call.request_id, trace_id=call_context.trace_id()):
            try:
                response = await inner(request, context)
            except grpc.aio.AbortError:
                raise
            except asyncio.CancelledError:
                call.ended(grpc.StatusCode.CANCELLED)
                raise
            except Exception as error:
                await call.failed(error)
            call.ended(grpc.StatusCode.OK)
            return response

    return behaviour


def _streaming(method: str, metadata: dict[str, Any], inner: Any) -> Any:
    async def behaviour(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        call = _Call(method, metadata, context)
        with log.bound(request_id=call.request_id, trace_id=call_context.trace_id()):
            responses = inner(request, context)
            try:
                if hasattr(responses, "__aiter__"):
                    async for response in responses:
                        yield response
                else:
                    await responses  # a handler that writes to the context itself (health, reflection)
            except grpc.aio.AbortError:
                raise
            except (asyncio.CancelledError, GeneratorExit):
                call.ended(grpc.StatusCode.CANCELLED)
                raise
            except Exception as error:
                await call.failed(error)
            finally:
                if hasattr(responses, "aclose"):
                    await responses.aclose()  # runs the handler's own clean-up now, not at garbage collection
            call.ended(grpc.StatusCode.OK)

    return behaviour
