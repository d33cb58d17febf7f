"""Scripts, styles and the icon, as they are in the package."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.gateway.console.session import PATH
from services.gateway.edge.problems import Refused

_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    etag: str
    kind: str


def route() -> Route:
    """Serves them. They have no versions in their names, so browsers ask each time whether they changed."""
    folder = Path(__file__).parent / "static"
    files = {path.name: _read(path) for path in folder.iterdir() if path.suffix in _TYPES}

    async def serve(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise Refused(404, "NOT_FOUND", "There is no such file.")
        headers = {"etag": file.etag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.kind)

    return Route(f"{PATH}/static/{{name}}", serve, methods=["GET"])


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, f'"{hashlib.sha256(content).hexdigest()[:16]}"', _TYPES[path.suffix])
