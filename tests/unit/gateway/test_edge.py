"""What the edge decides by itself."""

from __future__ import annotations

import socket

import pytest
from starlette.datastructures import Headers

from services.core import errors
from services.gateway import server
from services.gateway.config import GatewaySettings
from services.gateway.edge import problems
from services.gateway.edge.guard import Guard
from services.gateway.edge.problems import Refused

STATUSES = {
    errors.InvalidArgument: 400,
    errors.ChatUnsupported: 400,
    errors.Unauthenticated: 401,
    errors.PermissionDenied: 403,
    errors.CheckpointNotFound: 404,
    errors.ResourceExists: 409,
    errors.EtagMismatch: 409,
    errors.QueueFull: 429,
    errors.InternalError: 500,
    errors.DigestMismatch: 500,
    errors.NotSupported: 501,
    errors.ModelLoading: 503,
    errors.DeadlineExceeded: 504,
}


@pytest.mark.parametrize("error_class", [e for e in errors.all_errors() if e is not errors.CodegraftError])
def test_every_error_has_a_status_and_keeps_its_reason(error_class: type[errors.CodegraftError]) -> None:
    error = error_class("it broke", field="stop.strings", hint="Mend it.", retry_after=0.2)
    fault = problems.problem(error).error
    assert (fault.code, fault.param, fault.message) == (error.reason, "stop", "it broke. Mend it.")
    answer = problems.response(error)
    assert 400 <= answer.status_code <= 504 and answer.headers["retry-after"] == "1"
    near = next((status for known, status in STATUSES.items() if error_class is known), answer.status_code)
    assert answer.status_code == near
    assert (fault.type == "server_error") == (answer.status_code >= 500)


def test_a_field_is_told_as_the_body_spells_it() -> None:
    spelled = {"parent": "model", "sampling.top_p": "top_p", "messages.role": "messages", "": None}
    found = {field: problems.problem(errors.InvalidArgument("x", field=field)).error.param for field in spelled}
    assert found == spelled


def guard(**fields: object) -> Guard:
    return Guard(GatewaySettings(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "headers", "scheme", "status"),
    [
        ({}, {"host": "127.0.0.1:80"}, "http", 0),
        ({}, {"host": "[::1]:80"}, "http", 0),
        ({}, {"host": "evil.example"}, "http", 421),
        ({}, {}, "http", 421),
        ({"listen": "0.0.0.0:80"}, {"host": "anything.example"}, "http", 0),
        ({"listen": "0.0.0.0:80", "gateway_hosts": ("a.corp",)}, {"host": "b.corp"}, "http", 421),
        ({"listen": "0.0.0.0:80", "gateway_hosts": ("a.corp",)}, {"host": "A.corp:443"}, "http", 0),
        ({}, {"host": "localhost:80", "origin": "http://localhost:80"}, "http", 0),
        ({}, {"host": "localhost:80", "origin": "http://localhost:81"}, "http", 403),
        ({}, {"host": "localhost:80", "origin": "null"}, "http", 403),
        ({}, {"host": "localhost:80", "origin": "http://[broken"}, "http", 403),
        ({"gateway_origins": ("https://ide.corp/",)}, {"host": "localhost", "origin": "https://ide.corp"}, "http", 0),
        ({}, {"host": "localhost", "origin": "https://localhost"}, "https", 0),
        ({}, {"host": "localhost", "origin": "http://localhost"}, "https", 403),
    ],
)
def test_the_guard(settings: dict[str, object], headers: dict[str, str], scheme: str, status: int) -> None:
    try:
        guard(**settings).check(Headers(headers), scheme)
        refused = 0
    except Refused as refusal:
        refused = refusal.status
    assert refused == status


def test_small_answers_do_not_wait_for_acknowledgements() -> None:
    with server._bind("127.0.0.1:0") as listening:
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with pytest.raises(errors.Unavailable) as taken:
            server._bind(f"127.0.0.1:{listening.getsockname()[1]}")
    assert taken.value.field == "CODEGRAFT_LISTEN"
