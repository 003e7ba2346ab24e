"""What the host does to its mappings between a range's start and end, other than removing them.

Source: mm/{mprotect,ksm,migrate,memory}.c, v6.12. Stage 2 is unmapped for each of these on arm64.
They differ in what the guest's next fault finds in the host's own table:

* write-protected (``mprotect``, fork, KSM's first step): a read maps, a write copies or reuses;
* ``prot_none`` (NUMA balancing): any access takes a hinting fault, then maps;
* merged (KSM's second step): one page that many share, never to be written;
* a migration entry: whoever comes waits until the page has moved.

A huge page of which only a part changes is split first, as the kernel does.

Every change works on the leaves ``first`` up to ``last`` at once and returns how many entries it
changed: what each costs is for the caller to say.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from simpy import Environment, Event

from simkvm.kernel.host_memory import (
    MIGRATION,
    OWN,
    PRESENT,
    PROT_NONE,
    WRPROTECT,
    YOUNG,
    HostMemory,
)

MERGED: Final = PRESENT | WRPROTECT  #: KSM's page: write-protected and nobody's own

# -- asked by faults --------------------------------------------------------------------------


def usable(state: int, write: bool) -> bool:
    """Whether an entry in ``state``, which a change has marked, allows the access as it is."""
    return not state & (MIGRATION | PROT_NONE) and not (write and state & WRPROTECT)


def copies(host: HostMemory, state: int) -> bool:
    """Whether a write to an entry in ``state`` takes a copy (``wp_page_copy``).

    So for the zero page, KSM's page, and a page that a forked child still maps; a page protected
    for another reason, or whose child is gone, is the guest's alone and reused.
    """
    if not state & OWN:
        return state != 0
    return bool(state & WRPROTECT) and host.children > 0


# -- changes ----------------------------------------------------------------------------------


def write_protect(host: HostMemory, first: int, last: int) -> int:
    """Take the right to write from the pages of their own."""
    return _mark(host, first, last, OWN | PRESENT | WRPROTECT, WRPROTECT)


def make_writable(host: HostMemory, first: int, last: int) -> int:
    """Give it back (``MM_CP_TRY_CHANGE_WRITABLE``: exclusive anonymous pages)."""
    host.split(first, last)
    state = host.state[first:last]
    there = (state & (OWN | WRPROTECT)) == (OWN | WRPROTECT)
    state[there] &= np.uint8(~WRPROTECT & 0xFF)
    return _entries(host, first + np.flatnonzero(there))


def make_prot_none(host: HostMemory, first: int, last: int) -> int:
    """Have the next access to each page of its own fault (``change_prot_numa``).

    The zero page and KSM's pages are left alone, and so is what is marked already.
    """
    return _mark(host, first, last, OWN | PRESENT | PROT_NONE, PROT_NONE)


def _mark(host: HostMemory, first: int, last: int, mask: int, flag: int) -> int:
    host.split(first, last)
    state = host.state[first:last]
    there = (state & mask) == (OWN | PRESENT)
    state[there] |= np.uint8(flag)
    return _entries(host, first + np.flatnonzero(there))


def merge(host: HostMemory, first: int, last: int) -> int:
    """Put KSM's page in the place of write-protected ones; they are freed (``replace_page``).

    A page that was written meanwhile is protected no more, and stays.
    """
    host.split(first, last)
    state = host.state[first:last]
    there = first + np.flatnonzero((state & (OWN | MERGED)) == (OWN | MERGED))
    host.lru.remove(there)
    host.state[there] = MERGED | (host.state[there] & YOUNG)
    return len(there)


def depart(host: HostMemory, first: int, last: int) -> int:
    """Put migration entries in the place of pages of their own (``try_to_migrate``)."""
    host.split(first, last)
    there = first + np.flatnonzero(host.state[first:last] & OWN)
    host.lru.remove(there)
    host.state[there] = MIGRATION
    _count(host, there, -1)
    return _entries(host, there)


def arrive(host: HostMemory, env: Environment, first: int, last: int, t_ns: int) -> int:
    """The pages have moved: map them in their new place and wake who waits, at ``t_ns``.

    A migration entry that was removed meanwhile stays removed. The folio joins the LRU again.
    """
    there = first + np.flatnonzero(host.state[first:last] & MIGRATION)
    host.state[there] = PRESENT | OWN
    _count(host, there, 1)
    for leaf in there.tolist():
        host.lru.add(leaf)
    for leaf in range(first, last) if host.arrivals else ():
        for waiting in host.arrivals.pop(leaf, ()):
            waiting._ok = True
            waiting._value = t_ns
            env.schedule(waiting, delay=max(0, t_ns - int(env.now)))
    return len(there)


def arrival(host: HostMemory, env: Environment, leaf: int) -> Event:
    """The event of ``leaf``'s page having moved (``migration_entry_wait``)."""
    # One for each that waits: a process that an event resumes does not see the others coming.
    moved = Event(env)
    host.arrivals.setdefault(leaf, []).append(moved)
    return moved


def _entries(host: HostMemory, leaves: NDArray[np.int64]) -> int:
    """Entries of the host's table that map ``leaves``: a huge page has one."""
    tables = leaves // host.entries
    huge = host.huge[tables]
    return int(np.count_nonzero(~huge)) + len(np.unique(tables[huge]))


def _count(host: HostMemory, leaves: NDArray[np.int64], step: int) -> None:
    tables, counts = np.unique(leaves // host.entries, return_counts=True)
    for table, count in zip(tables.tolist(), counts.tolist(), strict=True):
        host.present[table] += step * count
