"""Errors as google.rpc.Status and back, without a server: the bounds, and what others put on the wire."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.core import errors
from services.core.rpc import context, status


def rpc_error(
    code: grpc.StatusCode, details: str, carried: status_pb2.Status | bytes | None = None
) -> grpc.aio.AioRpcError:
    data = carried.SerializeToString() if isinstance(carried, status_pb2.Status) else carried
    trailers = grpc.aio.Metadata(*([("grpc-status-details-bin", data)] if data is not None else []))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details)


def size_on_the_wire(packed: status_pb2.Status) -> int:
    """Bytes that the two trailers take at most: the message percent-encoded, the details in base64."""
    return 3 * len(packed.message.encode()) + -(-packed.ByteSize() // 3) * 4 + 32 * 2 + len("grpc-message") * 3


def test_every_grpc_code_has_its_name_in_the_table_and_the_other_way_round() -> None:
    assert {status.grpc_code(code) for code in errors.Code} | {grpc.StatusCode.OK} == set(grpc.StatusCode)


@given(st.text(max_size=9000), st.text(max_size=3000), st.dictionaries(st.text("abc", max_size=20), st.text()))
def test_no_error_is_too_large_for_trailing_metadata(message: str, hint: str, metadata: dict[str, str]) -> None:
    error = errors.InvalidArgument(message, field="f" * 500, hint=hint, retry_after=1.5)
    error.metadata.update(metadata)
    packed = status.to_status(error)
    assert size_on_the_wire(packed) < 8192
    back = status.from_status(packed)
    assert type(back) is errors.InvalidArgument
    assert message.startswith(back.message.removesuffix("…")) or "?" in back.message


def test_the_largest_error_of_all_fits() -> None:
    error = errors.LimitExceeded("漢" * 50_000, field="ß" * 5_000, hint="漢" * 50_000, retry_after=1e6)
    error.metadata.update({f"key{n}": "漢" * 50_000 for n in range(100)})
    packed = status.to_status(error)
    assert size_on_the_wire(packed) < 8192
    assert packed.message.endswith("漢…")


def test_names_that_are_no_utf8_do_not_break_the_status() -> None:
    error = errors.BrokenArchive("cannot read a\udcff.py", field="path", hint="rename \udc80", path="a\udcff.py")
    back = status.from_status(status.to_status(error))
    assert back is not None
    assert (back.message, back.hint, back.metadata) == ("cannot read a?.py", "rename ?", {"path": "a?.py"})


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.FailedPrecondition),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhausted),
        (grpc.StatusCode.DATA_LOSS, errors.InternalError),
    ],
)
def test_a_newer_servers_reason_keeps_at_least_its_code(
    code: grpc.StatusCode, expected: type[errors.CodegraftError]
) -> None:
    packed = status_pb2.Status(code=code.value[0], message="what it says")
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="OF_THE_FUTURE", domain=errors.DOMAIN, metadata={"a": "b"}))
    packed.details.append(detail)
    error = status.from_rpc(rpc_error(code, "what it says", packed))
    assert type(error) is expected
    assert error.message == "what it says"
    assert error.metadata == {"a": "b", "reason": "OF_THE_FUTURE"}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_a_status_without_details_becomes_the_general_class_of_its_code(code: grpc.StatusCode) -> None:
    error = status.from_rpc(rpc_error(code, "from the transport"))
    assert "from the transport" in error.message
    unnamed = {"UNKNOWN", "PERMISSION_DENIED", "OUT_OF_RANGE", "INTERNAL", "DATA_LOSS", "UNAUTHENTICATED"}
    assert error.code.name == code.name or code.name in unnamed
    assert isinstance(error, errors.Unavailable) == (code is grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize("broken", [b"\xff\xff\xff", b""])
def test_details_that_are_not_ours_are_no_obstacle(broken: bytes) -> None:
    error = status.from_rpc(rpc_error(grpc.StatusCode.NOT_FOUND, "nothing here", broken))
    assert type(error) is errors.NotFound


def test_another_domains_reason_is_not_taken_for_ours() -> None:
    packed = status_pb2.Status(code=5, message="no such bucket")
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="PROJECT_NOT_FOUND", domain="storage.example.com"))
    packed.details.append(detail)
    assert type(status.from_rpc(rpc_error(grpc.StatusCode.NOT_FOUND, "no such bucket", packed))) is errors.NotFound


@pytest.mark.parametrize("given_id", ["", "a b", "x" * 129, "a\nb", "é", '{"a":1}'])
def test_request_ids_that_would_harm_a_log_line_are_replaced(given_id: str) -> None:
    made = context.accept_request_id(given_id)
    assert made != given_id
    assert len(made) == 16
