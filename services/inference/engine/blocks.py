"""Which blocks of the KV cache hold which tokens. Knows no torch.

Keys and values lie in blocks of 16 tokens (PagedAttention, arXiv:2309.06180), so that a sequence takes memory as it
grows, and sequences that begin alike share blocks without a copy:

1. A full block is named by a hash of its tokens and of the name before it; the first name is the root, which stands for
   the weights and the project. So one name means the same tokens after the same tokens under the same weights, for the
   same project, and nothing else.
2. Only full blocks are shared; what is written to is held by one sequence only.
3. A block that nobody holds keeps its keys and values until its memory is wanted: the longest unused goes first, and of
   a sequence its end before its begin, which more others begin with.

Attention reads neighbouring blocks in place and has to gather others, so a sequence gets its blocks side by side where
that can be done, and some free ones behind them to grow into.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

BLOCK = 16
"""Tokens in a block."""
_AHEAD = 8
"""Blocks that a sequence is given room to grow into: with runs of 128 tokens, gathering is rare enough."""
_LOOSE = 8
"""Once an eighth of the memory lies free in pieces, nothing cached is dropped any more for the sake of neighbours."""


@dataclass(slots=True, eq=False)
class Table:
    """The blocks of one sequence."""

    root: bytes
    """Stands for the weights that the sequence runs on, and for whose it is; at most 64 bytes."""
    blocks: list[int] = field(default_factory=list)
    """In the order of its tokens; the last ones may be part empty."""
    names: list[bytes] = field(default_factory=list)
    """Of those of its first blocks that are full and computed."""


class Blocks:
    """All blocks, and who holds them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._holders = [0] * count
        self._name: list[bytes | None] = [None] * count
        self._by_name: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._free = bytearray(b"\1" * count)
        self._free_count = count
        self._cursor = 0

    @property
    def available(self) -> int:
        """Blocks that nobody holds, those with something in them too."""
        return self._free_count + len(self._idle)

    @property
    def held(self) -> int:
        """Blocks that somebody holds."""
        return self.count - self.available

    @property
    def cached(self) -> int:
        """Full blocks that a new sequence may find, whether somebody holds them or not."""
        return len(self._by_name)

    def holders(self, block: int) -> int:
        """Sequences that hold a block."""
        return self._holders[block]

    def open(self, root: bytes, tokens: list[int], *, reusable: int, capacity: int, spare: int = 0) -> Table | None:
        """Blocks for all these tokens: the longest beginning that is there already, and new ones for the rest.

        Args:
            tokens: of the sequence so far.
            reusable: most tokens to be taken as computed; below ``len(tokens)``, for the last one's logits are needed.
            capacity: tokens that the sequence may grow to; it only guides where the blocks lie.
            spare: blocks that have to be left over.

        Returns:
            None when there are too few blocks now; then nothing has changed.
        """
        table = Table(root)
        for begin in range(0, reusable - BLOCK + 1, BLOCK):
            name = _name(table, tokens[begin : begin + BLOCK])
            block = self._by_name.get(name)
            if block is None:
                break
            table.names.append(name)
            table.blocks.append(block)
        idle = sum(not self._holders[block] for block in table.blocks)
        if blocks_for(len(tokens)) - len(table.blocks) + idle + spare > self.available:
            return None
        for block in table.blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1
        self.grow(table, len(tokens), capacity)
        return table

    def grow(self, table: Table, tokens: int, capacity: int) -> bool:
        """Sees that a table has blocks for that many tokens; False, and no change, when there are too few."""
        size = blocks_for(tokens)
        missing = size - len(table.blocks)
        if missing <= 0:
            return True
        if missing > self.available:
            return False
        room = missing + max(0, min(blocks_for(capacity) - size, _AHEAD))
        for wanted in range(room, room - missing, -1):
            block = table.blocks[-1] + 1 if table.blocks else self.count
            if block >= self.count or not self._free[block]:
                block = self._place(wanted)
            self._free[block] = 0
            self._free_count -= 1
            self._holders[block] = 1
            table.blocks.append(block)
        return True

    def commit(self, table: Table, tokens: list[int], computed: int) -> None:
        """Lets others find a table's blocks as far as the first ``computed`` tokens fill them."""
        while (len(table.names) + 1) * BLOCK <= computed:
            at = len(table.names)
            name = _name(table, tokens[at * BLOCK : (at + 1) * BLOCK])
            table.names.append(name)
            if name not in self._by_name:  # else another sequence computed the same meanwhile: one is enough
                self._by_name[name] = table.blocks[at]
                self._name[table.blocks[at]] = name

    def close(self, table: Table) -> None:
        """Lets go of a table's blocks; it is empty after it."""
        for block in reversed(table.blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._name[block] is None:
                self._free[block] = 1
                self._free_count += 1
            else:
                self._idle[block] = None
        table.blocks.clear()
        table.names.clear()

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        name = self._name[block]
        assert name is not None
        del self._by_name[name]
        self._name[block] = None
        self._free[block] = 1
        self._free_count += 1

    def _place(self, room: int) -> int:
        """A free block with free ones behind it: that many in all where there are such, else three quarters, and so on.

        The longest unused mostly lie side by side, so they make room before a sequence is cut into pieces.
        """
        found = self._find(room)
        if found < 0 and self._free_count < max(room, self.count // _LOOSE):
            for _ in range(min(room, len(self._idle))):
                self._evict()
            found = self._find(room)
        while found < 0:
            room = max(1, room * 3 // 4)
            found = self._find(room)
        self._cursor = found + room  # the next one begins behind, or everybody would grow into another's blocks
        return found

    def _find(self, room: int) -> int:
        """Begin of so many free blocks; below 0 when there are none."""
        found = self._free.find(b"\1" * room, self._cursor)
        return found if found >= 0 else self._free.find(b"\1" * room)


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


def _name(table: Table, tokens: list[int]) -> bytes:
    """Name of the block after the named ones. Cryptographic: nobody may make a prompt that finds another's keys."""
    before = table.names[-1] if table.names else table.root
    return hashlib.blake2b(array("q", tokens).tobytes(), key=before, digest_size=16).digest()
