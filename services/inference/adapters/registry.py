"""Which adapter version answers for which project: pin, flip, drain.

The rules, and all there is to a safe swap:

1. A version is immutable and named by the SHA-256 of its weights; nothing is ever reloaded under a name.
2. A project's route says which version answers. A stream looks it up and raises its count in one locked operation, and
   keeps that version to its end.
3. A flip replaces the route: new streams get the new version, running ones do not notice. So rollback is a flip too.
4. Device memory has a fixed number of places. A version gives its place up only when another one needs it and no stream
   runs on it: those that no route names go first, the longest unused before the others. A routed one comes back when
   the next stream asks for it.
5. A place is reserved before anything is copied into it. While all are in use whoever stages waits, and streams do not.

Imports no torch; the weights are only handed through. Thread-safe: pins are taken from the event loop and released from
the engine's thread.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from services.inference.adapters.route import Route, Version

_BASE = Route()


@dataclass(slots=True, eq=False)
class Pin:
    """One stream's hold on its version."""

    project: str
    version: Version | None
    """None is the base model."""
    weights: Any
    """What the runner computes with; None is the base model."""
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
    """Whose routes name it."""
    names: tuple[str, ...]
    """Every checkpoint with these weights that was asked for since they are here."""


@dataclass(slots=True)
class _Place:
    """A place in device memory, taken."""

    version: Version
    weights: Any
    names: set[str] = field(default_factory=set)
    """Checkpoints that were asked for: those of several runs may have the same weights."""
    streams: int = 0
    kept: bool = False
    """Somebody asked to have it here, used or not."""
    leaving: bool = False
    """Freed as soon as no stream runs on it."""


class Registry:
    """The versions of one replica.

    Args:
        places: versions that device memory holds at once.
    """

    def __init__(self, places: int = 16) -> None:
        self._limit = places
        self._lock = threading.Lock()
        self._places: OrderedDict[str, _Place] = OrderedDict()  # the longest unused first
        self._reserved = 0
        self._routes: dict[str, Route] = {}
        self._streams: Counter[tuple[str, str]] = Counter()
        self._refused = False  # whether somebody was told that all places are in use
        self._listeners: list[Callable[[], None]] = []

    # --- streams ---

    def pin(self, project: str, key: str = "") -> Pin | None:
        """The version that answers a request, held until the pin is released; None when it has to be staged first.

        Args:
            key: what decides between two versions, see :class:`Route`.
        """
        with self._lock:
            return self._pin(project, self._routes.get(project, _BASE).choose(project, key))

    def pin_version(self, project: str, version: Version) -> Pin | None:
        """That version, whatever the project's route is; None when it has to be staged first."""
        with self._lock:
            return self._pin(project, version)

    def pin_base(self, project: str) -> Pin:
        """The base model, whatever the project's route is."""
        with self._lock:
            return self._count(project, None, None)

    def release(self, pin: Pin) -> None:
        """See :meth:`Pin.release`."""
        with self._lock:
            if pin._released:
                return
            pin._released = True
            key = (pin.project, pin.version.sha256 if pin.version else "")
            self._streams[key] -= 1
            if not self._streams[key]:
                del self._streams[key]
            if pin.version is None:
                return
            place = self._places[pin.version.sha256]
            place.streams -= 1
            self._places.move_to_end(pin.version.sha256)
            if place.leaving and not place.streams:
                del self._places[pin.version.sha256]
        self._tell()

    # --- routes ---

    def route(self, project: str) -> Route:
        """What the project's new streams get."""
        with self._lock:
            return self._routes.get(project, _BASE)

    def flip(self, project: str, route: Route) -> Route:
        """Sends the project's new streams another way; the route before."""
        with self._lock:
            before = self._routes.pop(project, _BASE)
            if route != _BASE:
                self._routes[project] = route
            for version in filter(None, (route.main, route.second)):
                if place := self._places.get(version.sha256):
                    place.names.add(version.checkpoint)
                    place.leaving = False
            for sha256 in route.versions() & self._places.keys():
                self._places.move_to_end(sha256)
        self._tell()
        return before

    # --- places ---

    def reserve(self) -> bool:
        """Takes a place for a version to come, an unused one's when none is free.

        False when all are in use; then those who :meth:`listen` hear when it is worth another try.
        """
        with self._lock:
            if len(self._places) + self._reserved >= self._limit:
                if (unused := self._unused()) is None:
                    self._refused = True
                    return False
                del self._places[unused]
            self._reserved += 1
            return True

    def cancel(self) -> None:
        """Gives a reserved place back."""
        with self._lock:
            self._reserved -= 1
        self._tell()

    def put(self, version: Version, weights: Any) -> None:
        """Fills a reserved place."""
        with self._lock:
            self._reserved -= 1
            place = self._places.setdefault(version.sha256, _Place(version, weights))
            place.names.add(version.checkpoint)
            place.leaving = False
            self._places.move_to_end(version.sha256)
        self._tell()

    def keep(self, sha256: str) -> Holding | None:
        """Keeps a staged version in its place until :meth:`drop`, though nobody uses it; None when it is not staged."""
        with self._lock:
            if (place := self._places.get(sha256)) is None:
                return None
            place.kept, place.leaving = True, False
            return self._holding(place)

    def drop(self, sha256: str) -> bool:
        """Frees a version's place once its last stream has ended; False when a route names it."""
        with self._lock:
            if any(sha256 in route.versions() for route in self._routes.values()):
                return False
            if place := self._places.get(sha256):
                place.kept, place.leaving = False, True
                if not place.streams:
                    del self._places[sha256]
        self._tell()
        return True

    def listen(self, listener: Callable[[], None]) -> None:
        """Has a function called when a place may be had again; from any thread, and it must not wait."""
        self._listeners.append(listener)

    # --- what there is ---

    def find(self, sha256: str) -> Version | None:
        """A staged version by its SHA-256."""
        with self._lock:
            return self._places[sha256].version if sha256 in self._places else None

    def ask(self, checkpoint: str, sha256: str = "") -> Version | None:
        """A staged version by a name that it has here, and called so; None when it is not here, or not by that name.

        Args:
            sha256: which version of that name; empty for any.
        """
        with self._lock:
            found = self._places.get(sha256) if sha256 else self._named(checkpoint)
            return replace(found.version, checkpoint=checkpoint) if found and checkpoint in found.names else None

    def call(self, checkpoint: str, sha256: str) -> Version | None:
        """Gives a staged version one more name, and what :meth:`ask` finds by it."""
        with self._lock:
            if place := self._places.get(sha256):
                place.names.add(checkpoint)
        return self.ask(checkpoint, sha256)

    def streams(self, project: str) -> dict[str, int]:
        """Running streams of a project by version; the empty SHA-256 is the base model."""
        with self._lock:
            return {sha256: count for (owner, sha256), count in self._streams.items() if owner == project}

    def all_streams(self) -> dict[tuple[str, str], int]:
        """Running streams by project and SHA-256."""
        with self._lock:
            return dict(self._streams)

    def holdings(self) -> list[Holding]:
        """All staged versions, by checkpoint."""
        with self._lock:
            found = [self._holding(place) for place in self._places.values()]
        return sorted(found, key=lambda holding: holding.version.checkpoint)

    def _named(self, checkpoint: str) -> _Place | None:
        return next((place for place in self._places.values() if checkpoint in place.names), None)

    def _pin(self, project: str, version: Version | None) -> Pin | None:
        if version is None:
            return self._count(project, None, None)
        if (place := self._places.get(version.sha256)) is None:
            return None
        place.streams += 1
        self._places.move_to_end(version.sha256)
        return self._count(project, version, place.weights)

    def _count(self, project: str, version: Version | None, weights: Any) -> Pin:
        self._streams[project, version.sha256 if version else ""] += 1
        return Pin(project, version, weights, self)

    def _unused(self) -> str | None:
        """The version whose place is the first to be taken; None when all are in use."""
        routed = set[str]().union(*(route.versions() for route in self._routes.values()))
        unused = [sha256 for sha256, place in self._places.items() if not place.streams and not place.kept]
        return next((sha256 for sha256 in unused if sha256 not in routed), unused[0] if unused else None)

    def _holding(self, place: _Place) -> Holding:
        sha256 = place.version.sha256
        projects = sorted(project for project, route in self._routes.items() if sha256 in route.versions())
        return Holding(place.version, place.streams, tuple(projects), tuple(sorted(place.names)))

    def _tell(self) -> None:
        """Tells those who wait, if somebody was refused. Without the lock: a listener may call back."""
        if self._refused:
            self._refused = False
            for listener in self._listeners:
                listener()
