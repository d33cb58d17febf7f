"""Requests that nobody would think of, made by schemathesis from /openapi.json: none ends in a 500."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode

from tests.contract.gateway_world import Gateway

pytest_plugins = ["tests.contract.gateway_fixtures"]

GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "demo", "prompt": "x = ", "max_tokens": 2},
    "/infill": {"input_prefix": "x = ", "input_suffix": "", "n_predict": 2},
}
"""Requests that are answered: what is drawn names a model that there is, and says something, only by luck."""
REQUESTS = 25
"""For each operation and for each kind: such as the description allows, and such as it does not."""
CHECKED = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]


async def test_no_request_ends_in_a_500_and_answers_are_as_described(gateway: Gateway) -> None:
    document = (await gateway.http.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    statuses: dict[str, set[int]] = {}
    await asyncio.to_thread(lambda: fuzz(document, gateway.url, statuses))
    assert len(statuses) == sum(len(path) for path in document["paths"].values())
    assert all(200 in statuses[f"POST {path}"] for path in GOOD), statuses
    assert all(400 in seen for label, seen in statuses.items() if label.startswith("POST")), statuses


def fuzz(document: dict[str, Any], url: str, statuses: dict[str, set[int]]) -> None:
    """Asks every operation, and notes which statuses it gave."""
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    for found in schema.get_all_operations():
        operation = found.ok()
        seen = statuses.setdefault(operation.label, set())
        if operation.path in GOOD:
            response = operation.Case(body=GOOD[operation.path], media_type="application/json").call(timeout=20)
            seen.add(response.status_code)
        if operation.path != "/health":  # 503 is one of its answers
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                ask(operation.as_strategy(generation_mode=mode), seen)


def ask(cases: Any, seen: set[int]) -> None:
    """Sends requests and checks the answers."""
    checks = CHECKS.get_by_names(CHECKED)

    @settings(
        max_examples=REQUESTS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def requests(case: Any) -> None:
        if isinstance(case.body, dict):  # the point is what is asked, not how long the answer takes
            short = {"max_tokens": 4, "max_completion_tokens": 4, "n_predict": 4, "n": 2}
            for name, most in short.items():
                if type(case.body.get(name)) is int:
                    case.body[name] = min(case.body[name], most)
        response = case.call(timeout=20)
        seen.add(response.status_code)
        case.validate_response(response, checks=checks)

    with contextlib.suppress(Unsatisfiable):  # it has no parameters, so there is nothing that it does not allow
        requests()
