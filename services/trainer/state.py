"""Where a run is, in one value that is kept with every checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from services.trainer.proving.proof import Measures


@dataclass(slots=True)
class State:
    """Where a run is; with the masters and the optimizer all that a later process needs to go on exactly."""

    step: int = 0
    seconds: float = 0.0
    """Time spent, earlier processes included as far as their kept states tell: what came after the last one is not
    counted, and a limit gives it again."""
    base_loss: float | None = None
    best_loss: float | None = None
    """Test loss of the best version so far, the base model included."""
    best_step: int = 0
    evaluations_without_gain: int = 0
    evaluated_step: int = -1
    """Step of the newest evaluation."""
    ended: str = ""
    """Why the run is over."""
    step_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    commit_seconds: float = 0.0
    """What the newest step, evaluation and checkpoint took: a time limit leaves room for them."""
    proof_seconds: float = 0.0
    """What the base model's lines took; the best one's will take as much."""
    lowest_loss: float | None = None
    """Lowest test loss after a step, whether that version may be the best or not."""
    base: Measures | None = None
    best: Measures | None = None
    """None while no step has led to a best one."""
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    best_strength: float = 1.0
    """Share of the trained update that is in them."""
    proved: bool = False
    """Whether the proof is made; kept with the run's record, not with this state."""
    _since: float = field(default_factory=time.monotonic)

    def tick(self) -> float:
        """Adds the time since the last tick; returns the time spent in all."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        return self.seconds
