"""Events: what happened, for whoever follows. Followers reconcile, so a lost or repeated event changes nothing."""

from services.core.events.bus import Event, EventBus
from services.core.events.memory import MemoryBus

__all__ = ["Event", "EventBus", "MemoryBus"]
