"""A relay on loopback between a client and a server, whose connections a test can break."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator


class Relay:
    """Passes on what comes, both ways.

    Args:
        target: host:port of the server.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._ends: list[socket.socket] = []
        self._is_broken = self._is_slow = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """Where clients connect to."""
        return f"127.0.0.1:{self._listening.getsockname()[1]}"

    def cut(self) -> None:
        """Breaks every connection that there is; new ones are accepted."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        """Nothing gets through for the time of the block: connections break, and so do new ones."""
        self._is_broken = True
        self.cut()
        try:
            yield
        finally:
            self._is_broken = False

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """What the server says comes at 1.3 kB a second for the time of the block, however fast the server is."""
        self._is_slow = True
        try:
            yield
        finally:
            self._is_slow = False

    def close(self) -> None:
        """Accepts nothing any more."""
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
                if self._is_broken:
                    client.close()
                    continue
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                return
            server.settimeout(None)
            self._ends += (client, server)
            for pump, source, sink in ((_ask, client, server), (self._answer, server, client)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=pump, args=(source, sink), daemon=True).start()

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                while self._is_slow and data:
                    client.sendall(data[:64])
                    data = data[64:]
                    time.sleep(0.05)
                client.sendall(data)
        _end(client)


def _ask(client: socket.socket, server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := client.recv(1 << 16):
            server.sendall(data)
    _end(server)


def _end(sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def relaying(target: str) -> Iterator[Relay]:
    """A relay for the time of the block."""
    relay = Relay(target)
    try:
        yield relay
    finally:
        relay.close()
