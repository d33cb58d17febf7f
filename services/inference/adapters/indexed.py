"""The adapters of a step that is recorded: which token runs on which is read from memory when the step is played.

So one recording does for any mix. It multiplies all tokens with the adapters of the first slots of a stack and picks
each token's own, in products of a fixed size: the weights are read once, and the arithmetic beside them is idle on a
GPU that decodes. What another adapter gives, be it no number at all, is dropped and never added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from services.inference.adapters.stack import Paths


@dataclass(frozen=True, slots=True)
class Memory:
    """A stack's at one moment; a stack that grows has another one, and this one stays as it is."""

    rank: int
    size: int
    """Slots. With the rank, it names the memory."""
    a: Mapping[Paths, torch.Tensor]
    """And b and owners: as a :class:`services.inference.adapters.stack.Stack` has them."""
    b: Mapping[Paths, torch.Tensor]
    owners: Mapping[Paths, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Indexed:
    """The adapters of a stack, for all tokens of a step."""

    memory: Memory
    used: int
    """Slots from the first on that are multiplied with."""
    slots: torch.Tensor
    """Each token's, ``[tokens]``, int64; -1 for none."""
    _own: torch.Tensor = field(init=False)
    _none: torch.Tensor = field(init=False)
    _at: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_own", self.slots.clamp(min=0))
        object.__setattr__(self, "_none", (self.slots < 0)[:, None])
        object.__setattr__(self, "_at", torch.arange(len(self.slots), device=self.slots.device))

    def add(self, paths: Paths, x: torch.Tensor, y: torch.Tensor) -> None:
        """See :meth:`services.inference.adapters.mix.Mix.add`."""
        a, b = self.memory.a[paths][: self.used], self.memory.b[paths][: self.used]
        ranks = torch.bmm(x.to(a.dtype).expand(self.used, -1, -1), a.mT)
        by_layer = ranks.view(self.used, len(x), len(paths), -1).transpose(1, 2)
        if (owners := self.memory.owners[paths]) is not None:
            by_layer = by_layer.index_select(1, owners)
        pieces = torch.bmm(by_layer.flatten(0, 1), b.flatten(0, 1)).view(self.used, b.shape[1], len(x), -1)
        own = pieces.transpose(1, 2)[self._own, self._at].flatten(1)
        y += own.masked_fill_(self._none, 0.0)
