"""A network that can be made bad: TCP proxies between processes, on an event loop in a thread of its own.

What TCP has taken is not lost while a connection lives, so a stalled one delivers late, as after retransmission; a cut
one is reset, and nobody listens until it is mended.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from services.cli.local import ports

CHUNK = 32 << 10
"""Bytes that are passed on at once."""

Result = TypeVar("Result")


class Network:
    """The thread. Close it at the end."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()
        self._proxies: list[Proxy] = []

    def proxy(self, name: str, port: int, target: int) -> Proxy:
        """A proxy on a port of this machine, before another one; it listens."""
        made = Proxy(self, name, port, target)
        self._proxies.append(made)
        made.mend()
        return made

    def do(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs it in the thread to its end."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def close(self) -> None:
        for proxy in self._proxies:
            proxy.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class Proxy:
    """The way to one server for one client. Its methods may be called from any thread.

    Attributes:
        address: host:port where the client finds the server.
    """

    def __init__(self, network: Network, name: str, port: int, target: int) -> None:
        self.name = name
        self.port = port
        self.address = f"{ports.HOST}:{self.port}"
        self._network = network
        self._target = target
        self._latency = 0.0
        self._bandwidth = 0.0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()

    def slow(self, latency: float, bandwidth: float = 0.0) -> None:
        """Every piece takes so many seconds each way, and so many bytes pass in a second; 0 for no limit."""
        self._latency, self._bandwidth = latency, bandwidth

    def stall(self) -> None:
        """Connections stay, also new ones are taken, and nothing passes."""
        self._network.do(self._stall())

    def cut(self) -> None:
        """Connections are reset, new ones refused."""
        self._network.do(self._cut())

    def mend(self) -> None:
        """A good network from now on."""
        self.slow(0.0)
        self._network.do(self._mend())

    # --- in the thread ----------------------------------------------------------------------------------------------

    async def _stall(self) -> None:
        self._flows.clear()

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._connections):
            writer.transport.abort()

    async def _mend(self) -> None:
        self._flows.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, ports.HOST, self.port)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            answers, there = await asyncio.open_connection(ports.HOST, self._target)
            self._connections.add(there)
            ways = [
                asyncio.ensure_future(self._pass(reader, there)),
                asyncio.ensure_future(self._pass(answers, writer)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
            for way in ways:
                way.cancel()
            if not any(await asyncio.gather(*ways, return_exceptions=True)):
                for end in (writer, there):  # both have said their last: what is on its way still arrives
                    end.close()
                    await end.wait_closed()
        except OSError:
            pass  # nobody listens there, or nobody any more
        finally:
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()
                    self._connections.discard(end)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, until its sender has said its last; a reset ends both."""
        while data := await reader.read(CHUNK):
            await self._flows.wait()
            if delay := self._latency + (len(data) / self._bandwidth if self._bandwidth else 0.0):
                await asyncio.sleep(delay)
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
