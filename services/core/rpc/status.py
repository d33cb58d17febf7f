"""Domain errors as ``google.rpc.Status`` and back: what :mod:`services.core.errors` says, on the wire.

One status carries ErrorInfo (reason, domain, metadata), and where they apply BadRequest (the field), RetryInfo and
LocalizedMessage (the hint), as https://google.aip.dev/193 describes.
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from services.core.errors import (
    DOMAIN,
    Aborted,
    Cancelled,
    Code,
    CodegraftError,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    NotFound,
    NotSupported,
    PermissionDenied,
    ResourceExhausted,
    ResourceExists,
    Unauthenticated,
    Unavailable,
    by_reason,
)

_GENERAL: dict[grpc.StatusCode, type[CodegraftError]] = {
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: ResourceExists,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}
"""What a status becomes whose reason says nothing to us: the transport's own, a proxy's, a newer server's. The other
codes become InternalError."""

# Trailing metadata of more than 8 KiB is refused by the receiving side, and the caller then sees RESOURCE_EXHAUSTED
# instead of the error. The message travels twice, once percent-encoded (three bytes for one), the details in base64.
_MESSAGE_BYTES = 1_000
_DESCRIPTION_BYTES = 300
_HINT_BYTES = 500
_FIELD_BYTES = 100
_METADATA_BYTES = 1_000
_ENTRY_BYTES = 300


def to_status(error: CodegraftError) -> status_pb2.Status:
    """The status that a failed call ends with; texts too long for a status are cut."""
    message = _cut(error.message, _MESSAGE_BYTES)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_cut_metadata(error.metadata))
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(error.field, _FIELD_BYTES), description=_cut(message, _DESCRIPTION_BYTES)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after * 1e9))
        details.append(retry)
    if error.hint:
        details.append(error_details_pb2.LocalizedMessage(locale="en", message=_cut(error.hint, _HINT_BYTES)))
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code.name), message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def from_status(status: status_pb2.Status) -> CodegraftError | None:
    """The error that the status carries; None when no service of ours wrote it (it has no ErrorInfo of our domain)."""
    info, fields = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry, hint = error_details_pb2.RetryInfo(), error_details_pb2.LocalizedMessage()
    found: set[str] = set()
    for detail in status.details:
        for message in (info, fields, retry, hint):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
                found.add(message.DESCRIPTOR.name)
    if info.domain != DOMAIN:
        return None
    error_class = by_reason(info.reason)
    if error_class is CodegraftError:  # a newer server's reason: at least its code is known
        info.metadata.setdefault("reason", info.reason)
        error_class = _general(_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN))
    error = error_class(
        status.message,
        field=fields.field_violations[0].field if fields.field_violations else "",
        hint=hint.message,
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if "RetryInfo" in found else None,
    )
    error.metadata.update(info.metadata)
    return error


def from_rpc(call: grpc.RpcError) -> CodegraftError:
    """The domain error behind a failed call, also when the transport failed before any service answered."""
    trailers = getattr(call, "trailing_metadata", lambda: None)()
    for key, value in trailers or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                error = from_status(status_pb2.Status.FromString(value))
            except DecodeError:  # a proxy's or another library's
                continue
            if error is not None:
                return error
    code = call.code() if callable(getattr(call, "code", None)) else grpc.StatusCode.UNKNOWN
    details = str(call.details() or "") if callable(getattr(call, "details", None)) else str(call)
    error_class = _general(code)
    if error_class is Unavailable:
        return Unavailable(f"the service cannot be reached: {details}", hint="Check its address and that it runs.")
    if error_class is NotSupported:  # no service of ours wrote it: the server's library knows no such method
        return NotSupported(
            f"the service does not know this call ({details}): it is of an older release, or not the one meant",
            hint="Upgrade the service (codegraft doctor tells releases), or use the client of its release.",
        )
    return error_class(details or code.name)


def grpc_code(code: Code) -> grpc.StatusCode:
    """The gRPC code of the same canonical name."""
    return grpc.StatusCode[code.name]


_BY_NUMBER = {int(code.value[0]): code for code in grpc.StatusCode}


def _general(code: grpc.StatusCode) -> type[CodegraftError]:
    return _GENERAL.get(code, InternalError)


def _cut(text: str, limit: int) -> str:
    """At most so many bytes of the text in UTF-8; what UTF-8 cannot spell (names of files) becomes question marks."""
    data = text.encode("utf-8", "replace")
    return data.decode() if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "…"


def _cut_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """The entries that fit, each cut."""
    kept: dict[str, str] = {}
    left = _METADATA_BYTES
    for key, value in metadata.items():
        kept[key] = _cut(str(value), _ENTRY_BYTES)
        left -= len(key) + len(kept[key].encode())
        if left < 0:
            del kept[key]
            break
    return kept
