"""Domain errors as ``google.rpc.Status`` and back: what :mod:`services.core.errors` says, on the wire.

One status carries ErrorInfo (reason, domain, metadata), and where they apply BadRequest (the field), RetryInfo and
LocalizedMessage (the hint), as https://google.aip.dev/193 describes.
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.core.errors import (
    DOMAIN,
    Cancelled,
    Code,
    CodegraftError,
    DeadlineExceeded,
    InternalError,
    NotSupported,
    Unavailable,
    by_reason,
)

_WITHOUT_DETAILS: dict[grpc.StatusCode, type[CodegraftError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
}
"""What a status without ErrorInfo becomes: it came from the transport, not from a service."""


def to_status(error: CodegraftError) -> status_pb2.Status:
    """The status that a failed call ends with."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata),
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after * 1e9))
        details.append(retry)
    if error.hint:
        details.append(error_details_pb2.LocalizedMessage(locale="en", message=error.hint))
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code.name), message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def from_status(status: status_pb2.Status) -> CodegraftError | None:
    """The error that the status carries; None when it has no ErrorInfo."""
    info, fields = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry, hint = error_details_pb2.RetryInfo(), error_details_pb2.LocalizedMessage()
    found: set[str] = set()
    for detail in status.details:
        for message in (info, fields, retry, hint):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
                found.add(message.DESCRIPTOR.name)
    if "ErrorInfo" not in found:
        return None
    error = by_reason(info.reason)(
        status.message,
        field=fields.field_violations[0].field if fields.field_violations else "",
        hint=hint.message,
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if "RetryInfo" in found else None,
    )
    error.metadata.update(info.metadata)
    return error


def from_rpc(call: grpc.RpcError) -> CodegraftError:
    """The domain error behind a failed call, also when the transport failed before any service answered."""
    status = None
    if isinstance(call, grpc.aio.AioRpcError):
        trailers = call.trailing_metadata() or ()
        for key, value in trailers:
            if key == "grpc-status-details-bin" and isinstance(value, bytes):
                status = status_pb2.Status.FromString(value)
    elif isinstance(call, grpc.Call):
        status = rpc_status.from_call(call)
    if status is not None and (error := from_status(status)) is not None:
        return error
    code = call.code() if callable(getattr(call, "code", None)) else grpc.StatusCode.UNKNOWN
    details = str(call.details() or "") if callable(getattr(call, "details", None)) else str(call)
    error_class = _WITHOUT_DETAILS.get(code, InternalError)
    if error_class is Unavailable:
        return Unavailable(
            f"the service cannot be reached: {details}", hint="Check its address and that it runs.", retry_after=1.0
        )
    return error_class(details or code.name)


def grpc_code(code: Code) -> grpc.StatusCode:
    """The gRPC code of the same canonical name."""
    return grpc.StatusCode[code.name]
