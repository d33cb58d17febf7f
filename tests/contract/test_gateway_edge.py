"""The gateway's edge over real HTTP: whom it refuses, what it passes on, what its responses say to browsers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc
import httpx2
import openai
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from codegraft.common.v1.model_pb2 import Model
from codegraft.inference.v1 import completion_pb2 as pb
from services.core import errors
from tests.contract.gateway_world import Gateway
from tests.contract.inference_world import until

pytest_plugins = ["tests.contract.gateway_fixtures"]

CODE = {"model": "demo", "prompt": "x = "}
OPENAIS = "authorization, content-type, x-codegraft-session, x-stainless-lang, x-stainless-os, x-stainless-retry-count"
"""Headers for which openai's JavaScript client has a browser ask."""
ANSWER = [
    pb.CompleteResponse(started=pb.Started(completion_id="c-base", model="m", prompt_tokens=3)),
    pb.CompleteResponse(delta=pb.Delta(text="1", tokens=1)),
    pb.CompleteResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP)),
]


@pytest.fixture
async def scripted(gateways: Callable[..., Any]) -> Gateway:
    """A gateway before services that say what the test wants."""
    made: Gateway = await gateways()
    made.neighbours.scripts["Complete"] = [ANSWER]  # type: ignore[list-item]
    made.neighbours.scripts["ListModels"] = [pb.ListModelsResponse(models=[Model(id="m")])]
    return made


def metadata(gateway: Gateway, method: str) -> dict[str, str]:
    return gateway.neighbours.metadata[method][-1]


async def test_key_request_id_trace_and_deadline_go_on_to_the_services(scripted: Gateway) -> None:
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    headers = {"authorization": "Bearer cg_1_s3cret", "x_request_id": "from-editor", "traceparent": trace}
    for path, method in (("/v1/completions", "Complete"), ("/infill", "Complete"), ("/v1/feedback", "RecordFeedback")):
        body = {**CODE, "input_prefix": "x", "completion_id": "c", "event": "shown"}
        answer = await scripted.post(path, body, **headers)
        assert answer.status_code == 200 and answer.headers["x-request-id"] == "from-editor"
        passed = metadata(scripted, method)
        assert passed["authorization"] == "Bearer cg_1_s3cret" and passed["x-request-id"] == "from-editor"
        assert passed["traceparent"].startswith("00-" + "a" * 32)
        left = scripted.neighbours.remaining[method][-1]
        assert left is not None and 0 < left <= 120
    await scripted.post("/v1/completions", CODE)
    assert "authorization" not in metadata(scripted, "Complete"), "nobody's key is anybody else's"


@pytest.mark.parametrize("path", ["/v1/completions", "/infill", "/v1/models", "/v1/feedback"])
async def test_what_the_services_say_of_a_key_is_said_in_openais_words(scripted: Gateway, path: str) -> None:
    body = {**CODE, "input_prefix": "x", "completion_id": "c", "event": "shown"}
    for error, status, kind in (
        (errors.Unauthenticated("no such key", hint="Ask your admin."), 401, "authentication_error"),
        (errors.PermissionDenied("the key is of another project"), 403, "permission_error"),
    ):
        for method in ("Complete", "ListModels", "RecordFeedback", "ListProjects"):
            scripted.neighbours.scripts[method] = [error]
        answer = await (scripted.http.get(path) if path == "/v1/models" else scripted.post(path, body))
        said = answer.json()["error"]
        assert (answer.status_code, said["type"], said["code"]) == (status, kind, error.reason)
        assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    async with openai.AsyncOpenAI(base_url=f"{scripted.url}/v1", api_key="k", max_retries=0) as client:
        with pytest.raises(openai.PermissionDeniedError):
            await client.models.list()


async def test_a_key_that_grpc_cannot_carry_is_refused(scripted: Gateway) -> None:
    answer = await scripted.http.get("/v1/models", headers={"authorization": b"Bearer \xe9"})  # type: ignore[dict-item]
    assert answer.status_code == 401 and "ListModels" not in scripted.neighbours.requests


async def test_pages_of_other_origins_and_other_names_are_refused(scripted: Gateway, gateways: Any) -> None:
    own = scripted.url.removeprefix("http://")
    port = own.rpartition(":")[2]
    for headers, status in (
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"host": f"evil.example:{port}", "origin": f"http://evil.example:{port}"}, 421),
        ({"host": ""}, 421),
        ({"origin": scripted.url}, 200),
        ({"host": f"localhost:{port}"}, 200),
    ):
        answer = await scripted.http.post("/v1/completions", json=CODE, headers=headers)
        assert answer.status_code == status, (headers, answer.text)
    named: Gateway = await gateways(gateway_hosts=("gateway.corp",), gateway_origins=("https://ide.corp/",))
    named.neighbours.scripts["Complete"] = [ANSWER]  # type: ignore[list-item]
    named.neighbours.scripts["ListModels"] = [pb.ListModelsResponse(models=[Model(id="m")])]
    page = {"host": "gateway.corp", "origin": "https://ide.corp"}
    answer = await named.http.post("/v1/completions", json=CODE, headers=page)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://ide.corp"
    assert "x-codegraft-adapter" in answer.headers["access-control-expose-headers"].lower()
    asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": OPENAIS}
    allowed = await named.http.options("/v1/completions", headers=asked)
    assert (allowed.status_code, allowed.headers["access-control-allow-headers"]) == (200, OPENAIS)
    # A page can only read why it was refused when that, too, says that it may.
    named.neighbours.scripts["Complete"] = [errors.QueueFull("full", retry_after=3)]
    for path, body, sent, status in (
        ("/v1/completions", CODE, {}, 429),
        ("/v1/completions", {"prompt": 7}, {}, 400),
        ("/v1/completions", CODE, {"authorization": b"\xe9"}, 401),
        ("/v1/nothing", CODE, {}, 404),
    ):
        refused = await named.http.post(path, json=body, headers={**page, **sent})
        assert refused.status_code == status and refused.json()["error"]["message"]
        assert refused.headers["access-control-allow-origin"] == "https://ide.corp", status
        readable = refused.headers["access-control-expose-headers"]
        assert "retry-after" in readable and "x-ratelimit-reset-tokens" in readable
        assert refused.headers["x-content-type-options"] == "nosniff" and refused.headers["x-request-id"]
    asked["origin"] = "https://evil.example"
    assert (await named.http.options("/v1/completions", headers=asked)).status_code == 403


async def test_no_page_may_do_anything_with_a_response(scripted: Gateway) -> None:
    for answer in (
        await scripted.post("/v1/completions", CODE),
        await scripted.post("/v1/completions", {**CODE, "stream": True}),
        await scripted.http.get("/v1/nothing"),
        await scripted.http.get("/openapi.json"),
    ):
        head = answer.headers
        assert head["x-content-type-options"] == "nosniff" and head["cache-control"] == "no-store"
        assert "default-src 'none'" in head["content-security-policy"] and head["x-frame-options"] == "DENY"
        assert head["cross-origin-resource-policy"] == "same-origin" and head["x-request-id"]
        assert not {"access-control-allow-origin", "server", "set-cookie"} & set(head)


async def test_bodies_are_bounded_in_size_time_and_type(gateways: Callable[..., Any]) -> None:
    gateway: Gateway = await gateways(gateway_body_bytes=1024)
    impatient: Gateway = await gateways(gateway_body_seconds=0.2)
    large = await gateway.post("/v1/completions", {**CODE, "prompt": "x" * 7000})

    async def endless() -> Any:
        while True:
            yield b" " * 512

    async def stalled() -> Any:
        yield b"{"
        await asyncio.sleep(0.6)

    json = {"content-type": "application/json"}
    with contextlib.suppress(httpx2.NetworkError):  # it is told why if it listens; the point is that it ends
        unannounced = await gateway.http.post("/v1/completions", content=endless(), headers=json)
        assert unannounced.status_code == 413
    slow = await impatient.http.post("/v1/completions", content=stalled(), headers=json)
    form = await gateway.http.post("/v1/completions", data={"prompt": "x"})
    assert (large.status_code, slow.status_code, form.status_code) == (413, 408, 415)
    zipped = await gateway.http.post("/v1/completions", content=b"{}", headers={**json, "content-encoding": "gzip"})
    assert zipped.status_code == 415 and "Content-Encoding" in zipped.json()["error"]["message"]
    assert large.json()["error"]["code"] == "LIMIT_EXCEEDED" and form.json()["error"]["type"] == "invalid_request_error"
    for content in (b"", b"{", b"[]", b"7", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"\xff", b"[" * 900):
        answer = await gateway.http.post("/v1/completions", content=content, headers=json)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "INVALID_ARGUMENT", content
    head = {"authorization": "Bearer " + "x" * 70_000}
    with contextlib.suppress(httpx2.NetworkError):
        assert (await gateway.http.get("/v1/models", headers=head)).status_code == 400
    assert gateway.neighbours.requests == impatient.neighbours.requests == {}


async def test_wrong_addresses_and_methods_are_told_in_the_same_shape(scripted: Gateway) -> None:
    for answer, status, code in (
        (await scripted.http.get("/v2/completions"), 404, "NOT_FOUND"),
        (await scripted.http.get("/v1/completions"), 405, "METHOD_NOT_ALLOWED"),
        (await scripted.post("/v1/completions/", CODE), 404, "NOT_FOUND"),
        (await scripted.post("/v1/embeddings", CODE), 404, "NOT_FOUND"),
        (await scripted.http.options("/v1/completions"), 405, "METHOD_NOT_ALLOWED"),
    ):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code) and "/openapi.json" in error["message"]
        assert status != 405 or answer.headers["allow"] == "POST"
    head = await scripted.http.head("/openapi.json")
    assert (head.status_code, head.content) == (200, b"") and int(head.headers["content-length"]) > 1000


async def test_an_outage_is_503_and_a_break_is_told_within_the_stream(scripted: Gateway) -> None:
    scripted.neighbours.scripts["Complete"] = [errors.ModelLoading("not yet", retry_after=1.5)]
    answer = await scripted.post("/v1/completions", CODE)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert answer.json()["error"] == {
        "message": "not yet",
        "type": "server_error",
        "param": None,
        "code": "MODEL_LOADING",
    }
    scripted.neighbours.scripts["Complete"] = [[*ANSWER[:2], errors.ShuttingDown("goodbye")]]
    async with openai.AsyncOpenAI(base_url=f"{scripted.url}/v1", api_key="k", max_retries=0) as client:
        got = []
        with pytest.raises(openai.APIError, match="goodbye"):
            async for chunk in await client.completions.create(model="demo", prompt="x", stream=True):
                got.append(chunk.choices[0].text)
    assert got == ["1"]
    broken = await scripted.post("/v1/completions", CODE)
    assert broken.status_code == 503 and broken.json()["error"]["code"] == "SHUTTING_DOWN"


async def test_too_many_requests_at_once_are_told_when_to_come_back(gateways: Callable[..., Any]) -> None:
    gateway: Gateway = await gateways(gateway_requests=2)
    gateway.neighbours.scripts["ListModels"] = [pb.ListModelsResponse(models=[Model(id="m")])]
    gateway.neighbours.scripts["Complete"] = [[ANSWER[0], lambda _: asyncio.sleep(60)]]  # type: ignore[list-item]
    running = [asyncio.create_task(gateway.post("/v1/completions", CODE)) for _ in range(2)]
    await until(lambda: gateway.neighbours.count("Complete") == 2)
    refused = await gateway.post("/v1/completions", CODE)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["code"] == "OVERLOADED"
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    await asyncio.wait_for(gateway.neighbours.cancelled.wait(), 20)
    gateway.neighbours.scripts["Complete"] = [ANSWER]  # type: ignore[list-item]
    assert (await gateway.post("/v1/completions", CODE)).status_code == 200


async def test_health_is_inferences(scripted: Gateway, gateways: Callable[..., Any]) -> None:
    assert (await scripted.http.get("/health")).status_code == 503, "these services have no health"
    server = grpc.aio.server()
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        healthy: Gateway = await gateways(inference_address=f"127.0.0.1:{port}")
        answer = await healthy.http.get("/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        await checks.enter_graceful_shutdown()
        assert (await healthy.http.get("/health")).status_code == 503
    finally:
        await server.stop(None)
