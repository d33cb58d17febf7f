"""A project's route: the version that answers its requests, or two that share them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.core.models.prompts import PromptFormat


@dataclass(frozen=True, slots=True)
class Version:
    """One adapter, verified. Immutable: another set of weights is another version."""

    sha256: str
    """SHA-256 of its adapter_model.safetensors."""
    checkpoint: str
    """projects/{project}/runs/{run}/checkpoints/{step}, as whoever asked for it calls it: runs that come to the same
    weights share a place in device memory, and each keeps its name."""
    rank: int
    size: int
    """Bytes in device memory."""
    format: PromptFormat | None = field(default=None, compare=False)
    """How its prompts are rendered; None is as the base model's."""
    scale: float = field(default=1.0, compare=False)
    """What the products of its weights are multiplied by."""


@dataclass(frozen=True, slots=True)
class Route:
    """Which versions answer; None stands for the base model."""

    main: Version | None = None
    second: Version | None = None
    percent: int = 0
    """Percentage of the requests that the second version answers."""

    def choose(self, project: str, key: str) -> Version | None:
        """The version for a request.

        Args:
            key: the request's session, or its completion id: see :func:`share`.
        """
        return self.second if share(project, key) < self.percent else self.main

    def versions(self) -> set[str]:
        """SHA-256 of the versions on it."""
        used = (self.main, self.second if self.percent else None)
        return {version.sha256 for version in used if version}

    def same_as(self, other: Route) -> bool:
        """Whether the same weights answer the same requests, whatever they are called."""
        return _weights(self) == _weights(other)


def _weights(route: Route) -> tuple[str, str, int]:
    main, second = (version.sha256 if version else "" for version in (route.main, route.second))
    return main, second, route.percent


def share(project: str, key: str) -> int:
    """Where a request stands among all of its project's, 0 to 99, evenly spread.

    A pure function, so that an editor session stays on one side of a split, on every replica and over restarts. The
    project is part of it, so that two projects do not send the same sessions to their newcomers.
    """
    digest = hashlib.sha256(f"{project}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8]) % 100
