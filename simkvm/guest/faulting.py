"""The leaves of a guest that a touch would fault on, to draw from by weight.

Two sets: leaves that are not mapped, on which every touch faults, and leaves mapped without the
right to write, on which a write does. Each keeps the summed weight of 64 leaves at a time in a
binary indexed tree (Fenwick, Software: Practice and Experience 24 (1994), 327-336), so that a
change and a draw take a step a level; a range takes one pass over it.

What is known here may be behind what stage 2 maps, never ahead: who draws looks whether the leaf
still faults, and if not the touch was an ordinary one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from simkvm.guest.leaf_weights import PART, Equal, LeafWeights
from simkvm.kernel.stage2 import VALID, WRITE

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

SHIFT: Final = 6  #: leaves that have one sum, as a power of two
MAPPED: Final = 0
MISSING: Final = 1
READ_ONLY: Final = 2
_ENTRIES: Final = np.arange(256)
STATES: Final[Bytes] = np.where(
    _ENTRIES & VALID == 0, MISSING, np.where(_ENTRIES & WRITE, MAPPED, READ_ONLY)
).astype(np.uint8)
"""What a leaf is, by its entry in stage 2."""


class FaultingLeaves:
    """Of the leaves with these stage-2 ``entries``; ``write_ratio`` of the touches write."""

    def __init__(self, weights: LeafWeights, entries: Bytes, write_ratio: float) -> None:
        self._weights = weights
        self._entries = entries
        self._write_ratio = write_ratio
        self._state: Bytes = np.zeros(len(entries), np.uint8)
        self._sets = {state: _Sums(len(entries)) for state in (MISSING, READ_ONLY)}
        self.refresh(0, len(entries))

    @property
    def hazard(self) -> float:
        """The probability that a touch faults."""
        missing, read_only = (self._sets[state].total for state in (MISSING, READ_ONLY))
        return (missing + self._write_ratio * read_only) / self._weights.total

    def refresh(self, first: int, last: int) -> bool:
        """Take over what is mapped of ``first`` up to ``last``; returns whether that changed."""
        if last - first == 1:
            return self._refresh_one(first)
        changed = False
        first -= first & ((1 << SHIFT) - 1)
        for low in range(first, last, PART):
            changed |= self._refresh_part(low, min(low + PART, last))
        return changed

    def _refresh_part(self, first: int, last: int) -> bool:
        entries, before = self._entries[first:last], self._state[first:last]
        now = STATES[entries]
        if (now == before).all():
            return False
        weights = self._weights.of(first, last)
        edges = np.arange(0, last - first, 1 << SHIFT)
        for state, sums in self._sets.items():
            moved = weights * ((now == state).astype(np.int8) - (before == state).astype(np.int8))
            sums.add_many(first >> SHIFT, np.add.reduceat(moved, edges))
        before[:] = now
        return True

    def _refresh_one(self, leaf: int) -> bool:
        now, before = int(STATES[self._entries[leaf]]), int(self._state[leaf])
        if now == before:
            return False
        self._state[leaf] = now
        weight = self._weights.at(leaf)
        if before:
            self._sets[before].add(leaf >> SHIFT, -weight)
        if now:
            self._sets[now].add(leaf >> SHIFT, weight)
        return True

    def draw(self, first: float, second: float, third: float) -> tuple[int, bool]:
        """The leaf of a touch that faults, and whether it writes.

        Takes three numbers drawn uniformly from [0, 1).
        """
        missing, read_only = self._sets[MISSING].total, self._sets[READ_ONLY].total
        if first * (missing + self._write_ratio * read_only) < missing:
            return self._draw_from(MISSING, second), third < self._write_ratio
        return self._draw_from(READ_ONLY, second), True

    def _draw_from(self, state: int, uniform: float) -> int:
        sums = self._sets[state]
        block, rest = sums.find(min(int(uniform * sums.total), sums.total - 1))
        first = block << SHIFT
        last = min(first + (1 << SHIFT), len(self._state))
        members = first + np.flatnonzero(self._state[first:last] == state)
        if isinstance(self._weights, Equal):
            return int(members[rest])
        mass = np.cumsum(self._weights.take(members))
        return int(members[np.searchsorted(mass, rest, side="right")])


class _Sums:
    """The summed weights of a set's leaves, by block, and of all blocks."""

    def __init__(self, leaves: int) -> None:
        blocks = -(-leaves >> SHIFT)
        self.total = 0
        self._sums: Int64s = np.zeros(blocks, np.int64)
        self._tree: Int64s = np.zeros(blocks + 1, np.int64)
        self._fast = memoryview(self._tree)  # type: ignore[arg-type]  # a buffer
        self._top = 1 << (blocks.bit_length() - 1)

    def add(self, block: int, weight: int) -> None:
        """``block`` has ``weight`` more."""
        self.total += weight
        self._sums[block] += weight
        tree, size, place = self._fast, len(self._sums), block + 1
        while place <= size:
            tree[place] += weight
            place += place & -place

    def add_many(self, first: int, weights: Int64s) -> None:
        """As :meth:`add` for the blocks from ``first`` on."""
        changed = np.flatnonzero(weights)
        if len(changed) <= 32 + len(self._sums) // 512:
            for block in changed.tolist():
                self.add(first + block, int(weights[block]))
            return
        self._sums[first : first + len(weights)] += weights
        whole = np.concatenate([[0], np.cumsum(self._sums)])
        places = np.arange(1, len(self._tree))
        self._tree[1:] = whole[1:] - whole[places - (places & -places)]
        self.total = int(whole[-1])

    def find(self, mass: int) -> tuple[int, int]:
        """The block in which the sum over blocks and leaves passes ``mass``, and what is left."""
        tree, size, place, step = self._fast, len(self._sums), 0, self._top
        while step:
            ahead = place + step
            if ahead <= size and tree[ahead] <= mass:
                mass -= tree[ahead]
                place = ahead
            step >>= 1
        return place, mass
