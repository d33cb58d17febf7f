"""Control state: small records under resource names, with compare-and-set and watches."""

from services.core.state.memory import MemoryState
from services.core.state.store import Bounds, Entry, StateStore
from services.core.state.table import Table

__all__ = ["Bounds", "Entry", "MemoryState", "StateStore", "Table"]
