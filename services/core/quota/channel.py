"""How the processes of all services hear each other's usage: a broadcast that keeps nothing and promises nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

Hear = Callable[[bytes], None]
"""Takes a message that some process sent, maybe this one."""
Anew = Callable[[], None]
"""Called at the beginning, and whenever messages may have been missed."""


class Channel(Protocol):
    """See the module's docstring."""

    @property
    def connected(self) -> bool:
        """Whether what is sent now would be heard, as far as is known."""
        ...

    async def send(self, message: bytes) -> None:
        """Sends to all who listen, without waiting for them; a message that cannot be sent is lost."""
        ...

    def listen(self, hear: Hear, anew: Anew) -> AbstractAsyncContextManager[None]:
        """Hears within the block, its own messages as well."""
        ...


class Wire:
    """What the channels of a test hang on."""

    def __init__(self) -> None:
        self.channels: list[MemoryChannel] = []


class MemoryChannel:
    """A channel within one process, for tests."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._hear: Hear | None = None
        self._anew: Anew | None = None
        self._connected = True
        wire.channels.append(self)

    @property
    def connected(self) -> bool:
        return self._connected

    async def send(self, message: bytes) -> None:
        for each in self._wire.channels:
            if self._connected and each._connected and each._hear is not None:
                each._hear(message)

    @contextlib.asynccontextmanager
    async def listen(self, hear: Hear, anew: Anew) -> AsyncIterator[None]:
        self._hear, self._anew = hear, anew
        anew()
        try:
            yield
        finally:
            self._hear = self._anew = None

    def cut(self) -> None:
        """Disconnects it."""
        self._connected = False

    def mend(self) -> None:
        """Connects it again."""
        self._connected = True
        if self._anew is not None:
            self._anew()
