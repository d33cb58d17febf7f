"""/openapi.json: the description of all operations, made from the types that read and write them (OpenAPI 3.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

from pydantic import TypeAdapter

from services.gateway.api.operations import Operation
from services.gateway.edge.problems import Problem

_INTRODUCTION = (
    "Completions of code by your own model. The API is OpenAI's, llama.cpp's and Mistral's as far as their clients use "
    "it. A model is a project (acme: its serving policy decides), acme@base, acme@RUN/STEP, or the base model's own "
    "name. Every address also stands under /projects/{project}, for clients that name no model. Responses name the "
    "version that answered in X-Codegraft-Adapter and in system_fingerprint."
)
_STATUSES = {
    "400": "The request is not valid, or not possible in the present state.",
    "401": "The key is missing or not valid.",
    "403": "The key may not do this.",
    "404": "There is no such thing.",
    "408": "The body came too slowly.",
    "409": "Somebody else changed it at the same moment.",
    "413": "The body is too large.",
    "415": "The body is not announced as JSON, or compressed.",
    "429": "Too much waits already: come back after Retry-After.",
    "503": "A service cannot be reached, or the model is being loaded: come back after Retry-After.",
    "504": "Time ran out before anything was generated.",
}
_PROJECT = {
    "name": "X-Codegraft-Project",
    "in": "header",
    "description": "Project, where the model does not name it.",
    "schema": {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$"},
}
_SESSION = {
    "name": "X-Codegraft-Session",
    "in": "header",
    "description": "Editor session: its newer request drops the older one.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{0,128}$"},
}


def describe(operations: Sequence[Operation]) -> dict[str, Any]:
    """The document."""
    wanted: dict[str, tuple[Literal["validation", "serialization"], type]] = {"Problem": ("serialization", Problem)}
    for operation in operations:
        if operation.ask:
            wanted[operation.ask.__name__] = ("validation", operation.ask)
        for answer in filter(None, (operation.answer, operation.event)):
            wanted[answer.__name__] = ("serialization", answer)
    adapters = [(name, mode, TypeAdapter[Any](kind)) for name, (mode, kind) in wanted.items()]
    _, schemas = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Codegraft", "version": version("codegraft"), "description": _INTRODUCTION},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key."}},
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(operation.answer)}}
    if operation.event:
        each = f"With stream: events, the data of each a {operation.event.__name__}. OpenAI's end with [DONE]."
        content["text/event-stream"] = {"schema": {"description": each}}  # OpenAPI 3.1 has no type for a stream
    described: dict[str, Any] = {
        "operationId": f"{operation.method.lower()}{re.sub(r'[^A-Za-z0-9]+', '_', operation.path)}".rstrip("_"),
        "summary": operation.summary,
        "parameters": [
            *(
                {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                for name in re.findall(r"{(\w+)}", operation.path)
            ),
            *([_PROJECT] if operation.needs_key else []),
            *([_SESSION] if operation.takes_session else []),
        ],
        "responses": {
            "200": {"description": operation.summary, "content": content},
            **{
                status: {
                    "description": text,
                    "content": {"application/json": {"schema": _ref(Problem)}},
                }
                for status, text in _STATUSES.items()
            },
        },
    }
    if operation.ask:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(operation.ask)}},
        }
    if operation.needs_key:
        described["security"] = [{"key": []}, {}]
    return described


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
