"""What policies name is held at the trainer: its retention must not delete what a replica may have to load again."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

from services.core import log
from services.core.errors import CodegraftError, NotFound
from services.inference.policy import BestSource

HOLD = timedelta(days=1)
"""How long what serves outlives the last replica that said so: an outage of all of them overnight."""
_RENEW = HOLD.total_seconds() / 4
"""Seconds after which a hold is renewed."""
_log = log.get("inference.holds")


class Holds:
    """The holds of one replica. Those of others are the same: the latest end counts."""

    def __init__(self, trainer: BestSource) -> None:
        self._trainer = trainer
        self._renewed: dict[str, float] = {}
        """By checkpoint, on the monotonic clock."""

    async def renew(self, checkpoints: Iterable[str]) -> None:
        """Holds these checkpoints, unless that was done lately. Without the trainer nothing is deleted meanwhile, so
        that the next time is early enough."""
        now = time.monotonic()
        for checkpoint in checkpoints:
            if now - self._renewed.get(checkpoint, -_RENEW) < _RENEW:
                continue
            try:
                await self._trainer.hold(checkpoint, HOLD)
            except CodegraftError as error:
                _log.warning("the trainer does not hold a checkpoint", checkpoint=checkpoint, error=error.message)
                if not isinstance(error, NotFound):
                    continue
            self._renewed[checkpoint] = now
        self._renewed = {checkpoint: at for checkpoint, at in self._renewed.items() if now - at < _RENEW}
