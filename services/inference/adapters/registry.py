"""Which adapter version answers for which project: pin, flip, drain.

The rules, and all there is to a safe swap:

1. A version is immutable and named by the SHA-256 of its weights; nothing is ever reloaded under a name.
2. A project's alias names its active version. A stream looks it up and raises its count in one locked operation, and
   keeps that version to its end.
3. A flip points the alias elsewhere: new streams get the new version, running ones do not notice.
4. A version that no alias names drains: when its last stream ends it becomes idle, and the longest idle ones are freed.

Imports no torch; the weights are only handed through. Thread-safe: pins are taken from the event loop and released from
the engine's thread.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.core.models.prompts import PromptFormat


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """One adapter, verified and staged."""

    sha256: str
    """SHA-256 of its adapter_model.safetensors."""
    checkpoint: str
    """projects/{project}/runs/{run}/checkpoints/{step}"""
    weights: Any
    """What the runner computes with."""
    rank: int
    size: int
    """Bytes in memory."""
    format: PromptFormat | None = None
    """How its prompts are rendered; None is as the base model's."""


@dataclass(slots=True, eq=False)
class Pin:
    """One stream's hold on its version."""

    project: str
    version: Version | None
    """None is the base model."""
    _registry: Registry
    _released: bool = False

    def release(self) -> None:
        """Ends the hold; a second time does nothing."""
        self._registry.release(self)


@dataclass(frozen=True, slots=True)
class Holding:
    """A staged version and who uses it, as of one moment."""

    version: Version
    streams: int
    projects: tuple[str, ...]


@dataclass(slots=True)
class _Staged:
    version: Version
    streams: int = 0
    projects: set[str] = field(default_factory=set)
    kept: bool = False


class Registry:
    """The staged versions of one replica.

    Args:
        idle: versions that nobody uses are kept staged up to this number, so that going back to one is only a flip.
    """

    def __init__(self, idle: int = 4) -> None:
        self._limit = idle
        self._lock = threading.Lock()
        self._staged: dict[str, _Staged] = {}
        self._alias: dict[str, str] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._streams: Counter[tuple[str, str]] = Counter()

    def pin(self, project: str) -> Pin:
        """The project's active version, held until the pin is released; the base model when it has none."""
        with self._lock:
            return self._pin(project, self._alias.get(project, ""))

    def pin_base(self, project: str) -> Pin:
        """The base model, whatever the project's active version is."""
        with self._lock:
            return self._pin(project, "")

    def pin_version(self, project: str, version: Version) -> Pin:
        """That version, whatever the project's active one is; staged by this when it is not."""
        with self._lock:
            self._stage(version)
            return self._pin(project, version.sha256)

    def release(self, pin: Pin) -> None:
        """See :meth:`Pin.release`."""
        with self._lock:
            if pin._released:
                return
            pin._released = True
            sha256 = pin.version.sha256 if pin.version else ""
            self._streams[pin.project, sha256] -= 1
            if not self._streams[pin.project, sha256]:
                del self._streams[pin.project, sha256]
            if pin.version:
                self._staged[sha256].streams -= 1
                self._settle(sha256)

    def flip(self, project: str, version: Version | None) -> str:
        """Makes a version (None: the base model) the project's active one; the SHA-256 of the one before, or empty."""
        with self._lock:
            before = self._alias.pop(project, "")
            if version is not None:
                self._stage(version).projects.add(project)
                self._alias[project] = version.sha256
            if before and before != self._alias.get(project):
                self._staged[before].projects.discard(project)
                self._settle(before)
            return before

    def keep(self, version: Version) -> Holding:
        """Stages a version and keeps it until :meth:`drop`, though nobody uses it."""
        with self._lock:
            staged = self._stage(version)
            staged.kept = True
            return _holding(staged)

    def drop(self, sha256: str) -> bool:
        """Frees a version once its last stream has ended; False when a project's alias names it."""
        with self._lock:
            staged = self._staged.get(sha256)
            if staged is None:
                return True
            if staged.projects:
                return False
            staged.kept = False
            self._settle(sha256, idle=False)
            return True

    def find(self, sha256: str = "", *, checkpoint: str = "") -> Version | None:
        """A staged version by its SHA-256 or by its checkpoint."""
        with self._lock:
            if sha256:
                return self._staged[sha256].version if sha256 in self._staged else None
            versions = (staged.version for staged in self._staged.values())
            return next((version for version in versions if version.checkpoint == checkpoint), None)

    def active(self, project: str) -> Version | None:
        """The version that the project's new streams get; None is the base model."""
        with self._lock:
            sha256 = self._alias.get(project, "")
            return self._staged[sha256].version if sha256 else None

    def streams(self, project: str) -> dict[str, int]:
        """Running streams of a project by version; the empty SHA-256 is the base model."""
        with self._lock:
            return {sha256: count for (owner, sha256), count in self._streams.items() if owner == project}

    def holdings(self) -> list[Holding]:
        """All staged versions, by checkpoint."""
        with self._lock:
            found = [_holding(staged) for staged in self._staged.values()]
        return sorted(found, key=lambda holding: holding.version.checkpoint)

    def _pin(self, project: str, sha256: str) -> Pin:
        self._streams[project, sha256] += 1
        if not sha256:
            return Pin(project, None, self)
        staged = self._staged[sha256]
        staged.streams += 1
        self._idle.pop(sha256, None)
        return Pin(project, staged.version, self)

    def _stage(self, version: Version) -> _Staged:
        self._idle.pop(version.sha256, None)
        return self._staged.setdefault(version.sha256, _Staged(version))

    def _settle(self, sha256: str, *, idle: bool = True) -> None:
        """Makes a version idle, or frees it, when nobody uses it any more."""
        staged = self._staged[sha256]
        if staged.streams or staged.projects or staged.kept:
            return
        self._idle.pop(sha256, None)
        if idle:
            self._idle[sha256] = None
        else:
            del self._staged[sha256]
        while len(self._idle) > self._limit:
            oldest, _ = self._idle.popitem(last=False)
            del self._staged[oldest]


def _holding(staged: _Staged) -> Holding:
    return Holding(staged.version, staged.streams, tuple(sorted(staged.projects)))
