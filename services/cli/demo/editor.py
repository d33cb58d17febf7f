"""An editor at work: it always has one completion open, also while the adapter is swapped in under it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from codegraft.inference.v1.completion_pb2 import Sampling
from services.client import Codegraft
from services.core.errors import CodegraftError

_PROMPT = '"""Object storage client."""\n\nimport os\n\n\ndef main('
TOKENS = 40


@dataclass(slots=True)
class Stream:
    """One completion from its first message to its last."""

    sha256: str = ""
    """Version it named in its first message; empty for the base model."""
    begin: float = 0.0
    """Seconds, wall clock."""
    first_token: float = 0.0
    end: float = 0.0
    whole: bool = False
    """Whether it ended as it should."""
    error: str = ""


class Editor:
    """Streams completions one after the other in a thread, from :meth:`start` to :meth:`stop`."""

    def __init__(self, client: Codegraft, project: str) -> None:
        self._client = client
        self._project = project
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._type, daemon=True)
        self.streams: list[Stream] = []

    def start(self) -> None:
        """Begins to stream."""
        self._thread.start()

    def stop(self) -> None:
        """Returns when the last stream has ended."""
        self._stopping.set()
        self._thread.join()

    def _type(self) -> None:
        while not self._stopping.is_set():
            stream = Stream(begin=time.time())
            self.streams.append(stream)
            try:
                pieces = self._client.completions.complete(
                    self._project,
                    prefix=_PROMPT,
                    path="client.py",
                    max_tokens=TOKENS,
                    sampling=Sampling(temperature=1.0, seed=len(self.streams)),
                )
                for piece in pieces:
                    if piece.started is not None:
                        stream.sha256 = piece.started.adapter_sha256
                    elif piece.finished is not None:
                        stream.whole = True
                    else:
                        stream.first_token = stream.first_token or time.time()
            except CodegraftError as error:
                stream.error = f"{error.reason}: {error.message}"
                self._stopping.wait(0.5)
            stream.end = time.time()


@dataclass(frozen=True, slots=True)
class Swap:
    """What the streams saw of one swap."""

    streams: int
    broken: int
    over_the_swap: int
    """Streams that began on the old version and ended after the new one served."""
    first_token_seconds: float | None
    """From the trainer's word to the first token on the new version; None when no stream ran on it."""


def look_back(streams: list[Stream], sha256: str, published: float, served: float) -> Swap:
    """Reads the swap to a version out of the streams.

    Args:
        published: when the trainer told of the version; wall clock, seconds.
        served: when the replica served it.
    """
    after = [stream for stream in streams if stream.sha256 == sha256 and stream.first_token]
    return Swap(
        streams=len(streams),
        broken=sum(not stream.whole for stream in streams),
        over_the_swap=sum(stream.sha256 != sha256 and stream.begin < served < stream.end for stream in streams),
        first_token_seconds=min(stream.first_token for stream in after) - published if after else None,
    )
