"""Verified adapters in host memory, from where a place in device memory is filled in milliseconds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from codegraft.trainer.v1.checkpoint_pb2 import AdapterProbe
    from services.core.models.prompts import PromptFormat


@dataclass(frozen=True, slots=True)
class Verified:
    """An adapter that passed every check but that of its probe, which needs the device."""

    sha256: str
    checkpoint: str
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    """By module path, A ``[rank, in]`` and B ``[out, rank]``, on the CPU."""
    scale: float
    """What B A is multiplied by."""
    format: PromptFormat | None
    size: int
    """Bytes of the pairs."""
    probe: AdapterProbe | None = None
    """What it has to make of a prompt; None when nobody computed that."""


class HostCache:
    """The latest used ones, up to a number of bytes. All methods belong to one event loop.

    What is here has served or passed the probe, so it is staged again without being checked again.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[str, Verified] = OrderedDict()
        self.size = 0
        """Bytes held."""

    def get(self, sha256: str) -> Verified | None:
        """The adapter, now the latest used one; None when it is not here."""
        if found := self._held.get(sha256):
            self._held.move_to_end(sha256)
        return found

    def put(self, verified: Verified) -> None:
        """Holds an adapter, and lets go of the longest unused ones that do not fit beside it."""
        if verified.size > self._limit:
            return
        if (before := self._held.pop(verified.sha256, None)) is not None:  # perhaps of another scale
            self.size -= before.size
        self._held[verified.sha256] = verified
        self.size += verified.size
        while self.size > self._limit:
            _, oldest = self._held.popitem(last=False)
            self.size -= oldest.size
