"""What both LRUs have in common: folios of the guests of one memcg on lists.

Folios are numbered through all guests of a memcg: ``base`` of a guest and the number of the leaf.
A folio is on one list, or on none: ``ABSENT``, or ``ISOLATED`` by somebody who looks at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from simkvm.kernel.cacheline import CacheLine, LineCosts
from simkvm.kernel.folio_list import NUMBER, TICKET_SHIFT, FolioList, Ids
from simkvm.kernel.mglru import LruGen, Lruvec
from simkvm.kernel.vmstat import Vmstat

ANON: Final = 0
FILE: Final = 1
TYPES: Final = (ANON, FILE)
MAX_SWAPPINESS: Final = 200
DEFAULT_SWAPPINESS: Final = 60
ABSENT: Final = 255
ISOLATED: Final = 254
NO_SHADOW: Final = -1


class Pages(Protocol):
    """What eviction has to know of a guest's pages to sort them."""

    def waiting(self, leaves: NDArray[np.int64], file: bool) -> NDArray[np.bool_]:
        """Which of ``leaves`` are locked or under writeback, or dirty pages of a file."""
        ...


class ListedLru(LruGen):
    """One guest's folios on the lists of ``lruvec``, of which it is number ``number``."""

    def __init__(self, lruvec: FolioLists, number: int, of_type: int, two_step: bool) -> None:
        self.base = int(lruvec.bases[number])
        self.number = number
        end = int(lruvec.bases[number + 1])
        super().__init__(end - self.base, two_step)
        self.lruvec = lruvec
        self.of_type = of_type
        self.pages: Pages | None = None
        self._listed = lruvec.listed[self.base : end]
        self._states = lruvec.states[self.base : end]
        self._shadows: NDArray[np.int64] = np.full(end - self.base, NO_SHADOW, np.int64)
        self._fast_listed = memoryview(self._listed)  # type: ignore[arg-type]  # a buffer
        self._fast_state = memoryview(self._states)  # type: ignore[arg-type]  # a buffer
        self._fast_ticket = memoryview(lruvec.ticket)[self.base : end]  # type: ignore[arg-type]

    def uncount(self, ids: Ids) -> None:
        """Folios, by their numbers in the lruvec, are not where ``sizes`` counts them any more."""
        raise NotImplementedError

    def all_old(self) -> None:
        """Ageing came by often enough for all folios to be where eviction looks first."""
        raise NotImplementedError

    def rotate(self, leaf: int) -> None:
        """The page of ``leaf`` is clean at last: eviction shall find it next."""
        raise NotImplementedError

    def written_back(self, leaf: int) -> None:
        """The page of ``leaf``, of a file, is clean: its write is over."""

    def accessed(self, leaf: int, times: int) -> None:
        """A fault of KVM's used the folio of ``leaf`` (``folio_mark_accessed``)."""
        raise NotImplementedError

    def marked(self, leaf: int) -> bool:
        """Whether something has marked the isolated folio of ``leaf``: it stays, unasked."""
        return False

    def askable(self, leaves: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of ``leaves`` those that a walk asks for."""
        return leaves

    def evicted(self, leaf: int) -> None:
        """The isolated folio of ``leaf`` is gone; a shadow says when."""
        raise NotImplementedError

    def refault(self, leaf: int) -> bool:
        """The page of ``leaf`` is read again: whether it went a short time ago."""
        raise NotImplementedError


class FolioLists(Lruvec):
    """Lists of one memcg, ``lists`` for each type; ``guests``: leaves of each."""

    def __init__(
        self, guests: Sequence[tuple[int, int]], lists: int, line: LineCosts, vmstat: Vmstat | None
    ) -> None:
        super().__init__()
        self.vmstat = Vmstat() if vmstat is None else vmstat
        self.lock = CacheLine(line)  #: the lruvec's spin lock: served first come, first served
        leaves = sum(n for n, _ in guests)
        self.listed: NDArray[np.uint8] = np.full(leaves, ABSENT, np.uint8)
        self.states: NDArray[np.uint8] = np.zeros(leaves, np.uint8)  #: flags of the folios
        self.ticket: NDArray[np.uint8] = np.zeros(leaves, np.uint8)
        self.lists = [[FolioList() for _ in range(lists)] for _ in TYPES]
        self.on_list = [[0] * lists for _ in TYPES]  #: folios on each, stale entries apart
        self.bases: NDArray[np.int64] = np.cumsum([0, *(n for n, _ in guests)], dtype=np.int64)
        self.listed_guests: Sequence[ListedLru] = []

    def settle(self, used: Ids, active: Ids, writeback: Ids) -> int:
        """Isolated folios that stay go back: those that were used, those that cannot be had for
        another reason, and those that are being written. Returns how many count as activated.
        """
        raise NotImplementedError

    def still_isolated(self, ids: Ids) -> Ids:
        """Of isolated folios those that nobody freed meanwhile."""
        there: Ids = ids[self.listed[ids] == ISOLATED]
        return there

    # -- guests ---------------------------------------------------------------------------------

    @property
    def types(self) -> list[int]:
        """The types of folios that there are."""
        return sorted({lru.of_type for lru in self.listed_guests})

    def by_guest(self, ids: Ids) -> list[tuple[ListedLru, Ids]]:
        """Cut folios by the guest that they belong to, in the order of guests."""
        if len(self.listed_guests) == 1:
            return [(self.listed_guests[0], ids)] if len(ids) else []
        owners = np.searchsorted(self.bases, ids, side="right") - 1
        return [(self.listed_guests[n], ids[owners == n]) for n in np.unique(owners).tolist()]

    def guest_of(self, folio: int) -> int:
        """The number of the guest that a folio belongs to."""
        return int(np.searchsorted(self.bases, folio, side="right")) - 1

    def owner(self, folio: int) -> ListedLru:
        """The guest that a folio belongs to."""
        return self.listed_guests[self.guest_of(folio)]

    # -- lists ----------------------------------------------------------------------------------

    def _valid(self, entries: Ids, number: int) -> Ids:
        """The folios of entries that are not stale, taken off the list ``number``."""
        ids = entries & NUMBER
        tickets = (entries >> TICKET_SHIFT).astype(np.uint8)
        there = (self.listed[ids] == number) & (self.ticket[ids] == tickets)
        valid: Ids = ids[there]
        return valid

    def _relist(
        self,
        ids: Ids,
        of_type: int,
        number: int,
        old_end: bool = False,
        were_listed: bool = True,
    ) -> None:
        """Put folios, all on one list of their type or on none, on another one."""
        if not len(ids):
            return
        if were_listed:
            self.on_list[of_type][int(self.listed[ids[0]])] -= len(ids)
        self.on_list[of_type][number] += len(ids)
        self.ticket[ids] += np.uint8(1)
        self.listed[ids] = number
        entries = ids | (self.ticket[ids].astype(np.int64) << TICKET_SHIFT)
        target = self.lists[of_type][number]
        if old_end:
            target.extend_old(entries)
        else:
            target.extend(entries)
