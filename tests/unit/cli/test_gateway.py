"""The stack's gateway is asked over HTTP how it is."""

from __future__ import annotations

from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

from services.cli.local import gateway, ports, stack
from services.core.rpc.probe import SERVING, UNREACHABLE


def test_health_is_a_word() -> None:
    answers = [200, 503, 0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if (status := answers.pop(0)) and self.path == "/health":
                self.send_response(status)
                self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer((ports.HOST, 0), Handler)
    address = f"{ports.HOST}:{server.server_port}"
    serving = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    try:
        assert [stack.check(gateway.NAME, address) for _ in range(3)] == [SERVING, "not_serving", UNREACHABLE]
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
    assert gateway.check(address, timedelta(seconds=1)) == UNREACHABLE
