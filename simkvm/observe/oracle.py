"""The safety oracle: what the model knows and C does not.

It is told of every table's birth, unlinking and free, of every grace period and of every walk
that holds no ``mmu_lock``, each with its time, and reports what a kernel could only crash on:

* ``use_after_free``: a table's page is freed while a walker is inside that table, or a walk that
  frees the tree comes back to a table that it freed before;
* ``root_freed_under_walker``: a walker is in the root, or enters it, when that has been freed: the
  lock-free walk takes the root without looking whether the VM still has it (arm64 handler of
  message 20230526234435.662652-6-yuzhao@google.com);
* ``free_before_grace_period``: a deferred free that no full grace period separates from unlink;
* ``double_free``, ``unlink_twice``, ``unlink_with_entries``: broken life of a table (a page that
  is no table can be freed twice as well);
* ``leaf_after_invalidate``: a mapping that survived, or appeared in, a range that was taken back;
* ``leak``: a table whose callback ran without freeing it, or that nobody freed although its VM is
  gone and no callback of it is to come.

A violation is a result: kind, time, guest, one sentence and the time line that led to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from simkvm.kernel.stage2 import TableId
from simkvm.units import format_duration

ROOT = TableId(-1, 0, 1)
KEPT = 16  # violations kept in full; the others are counted
LOOK_BACK_NS = 1_000_000  # no actor tells of walks that began longer ago
NEVER = 1 << 62


class Walk(NamedTuple):
    """``count`` reads of ``tables`` that last ``busy_ns`` each and begin ``period_ns`` apart."""

    walker: str
    tables: frozenset[TableId]
    start_ns: int
    period_ns: int
    busy_ns: int
    count: int  # type: ignore[assignment]  # nobody counts values in a walk

    @property
    def end_ns(self) -> int:
        """When the last read ends."""
        return self.start_ns + (self.count - 1) * self.period_ns + self.busy_ns

    def inside(self, t_ns: int) -> bool:
        """Whether a read that began before ``t_ns`` still goes on then."""
        if not self.start_ns < t_ns < self.end_ns:
            return False
        return 0 < (t_ns - self.start_ns) % self.period_ns < self.busy_ns


class Violation(NamedTuple):
    """One offence against memory safety."""

    kind: str
    time_ns: int
    guest: str
    message: str
    timeline: list[str]


@dataclass
class _Life:
    born_ns: int
    unlinked_ns: int = -1
    freed_ns: int = -1


@dataclass
class Oracle:
    """Watches the tables of one guest."""

    guest: str
    violations: list[Violation] = field(default_factory=list)
    total: int = 0
    _lives: dict[TableId, _Life] = field(default_factory=dict)
    _walks: deque[Walk] = field(default_factory=deque)
    _recent: deque[TableId] = field(default_factory=deque)  # freed, perhaps in the future
    _leaving: deque[TableId] = field(default_factory=deque)  # unlinked, perhaps in the future
    _root_freed_ns: int = NEVER
    _pages: dict[str, tuple[int, str]] = field(default_factory=dict)  # freed, and no tables
    _leaked: set[TableId] = field(default_factory=set)
    _grace_periods: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=4096))

    # -- told by the model --------------------------------------------------------------------

    def allocated(self, tables: Iterable[TableId], t_ns: int) -> None:
        """Tables were linked at ``t_ns``."""
        self._forget(t_ns - LOOK_BACK_NS)
        for table in tables:
            self._lives[table] = _Life(t_ns)

    def unlinked(self, table: TableId, t_ns: int, entries_left: int = 0) -> None:
        """``table`` was unlinked at ``t_ns`` with ``entries_left`` counted entries."""
        life = self._lives.get(table)
        if life is None or life.unlinked_ns >= 0:
            self._report("unlink_twice", t_ns, f"{name(table)} is not linked", table)
            return
        life.unlinked_ns = t_ns
        self._leaving.append(table)
        if entries_left:
            self._report(
                "unlink_with_entries",
                t_ns,
                f"{name(table)} still has {entries_left} entries",
                table,
            )

    def freed(self, table: TableId, t_ns: int, deferred: bool) -> None:
        """The page of ``table`` went back to the allocator at ``t_ns``."""
        life = self._lives.get(table)
        if life is None or life.freed_ns >= 0:
            self._report("double_free", t_ns, f"{name(table)} was free already", table)
            return
        life.freed_ns = t_ns
        if deferred and not self._separated(life.unlinked_ns, t_ns):
            self._report(
                "free_before_grace_period",
                t_ns,
                f"no full grace period protects {name(table)}",
                table,
            )
        for walk in self._walks:
            self._check(walk, table, t_ns)
        self._recent.append(table)

    def root_freed(self, t_ns: int) -> None:
        """The root tables were freed at ``t_ns``."""
        if self._root_freed_ns != NEVER:
            self._report("double_free", t_ns, f"{name(ROOT)} was free already", ROOT)
            return
        self._root_freed_ns = t_ns
        for walk in self._walks:
            self._check_root(walk)

    def page_allocated(self, page: str) -> None:
        """A page of the VM that is no table is in use again, under a name that it had before."""
        self._pages.pop(page, None)

    def page_freed(self, page: str, t_ns: int, by: str) -> None:
        """A page of the VM that is no table, called ``page``, was freed at ``t_ns`` by ``by``."""
        if page in self._pages:
            what = f"{by} frees {page}, which is free"
            self._report("double_free", t_ns, what, story=[self._pages[page]])
        self._pages.setdefault(page, (t_ns, f"{page} freed by {by}"))

    def read(self, walker: str, table: TableId, t_ns: int) -> None:
        """``walker``, which holds no lock, reads ``table`` at ``t_ns``, whoever may have freed it.

        For walks that free as they go; those that only look are told by :meth:`walk`.
        """
        life = self._lives.get(table)
        freed_ns = life.freed_ns if life is not None else -1
        if table == ROOT and self._root_freed_ns != NEVER:
            freed_ns = self._root_freed_ns
        if 0 <= freed_ns <= t_ns:
            what = f"{walker} reads {name(table)} after its page was freed"
            self._report("use_after_free", t_ns, what, table)

    def walk(self, walk: Walk) -> None:
        """A lock-free walk is planned: it may meet tables whose free is planned already."""
        while self._walks and self._walks[0].end_ns < walk.start_ns:
            self._walks.popleft()
        self._walks.append(walk)
        self._forget(walk.start_ns)
        for table in self._recent:
            self._check(walk, table, self._lives[table].freed_ns)
        self._check_root(walk)

    def _forget(self, t_ns: int) -> None:
        """Drop what no walk from ``t_ns`` on can meet."""
        leaving = self._leaving
        while leaving and self._lives[leaving[0]].unlinked_ns <= t_ns:
            leaving.popleft()
        recent = self._recent
        while recent and self._lives[recent[0]].freed_ns < t_ns:
            table = recent.popleft()
            if table not in leaving:
                del self._lives[table]

    def still_linked(
        self, path: list[TableId], places: list[tuple[int, int]], t_ns: int
    ) -> frozenset[TableId]:
        """What a walker finds at ``t_ns`` on its way through ``places``, the root included.

        ``path`` is what is linked in the model, where a lock holder's section has its whole effect
        at its start: a table that it unlinks later than ``t_ns`` is still there for the walker.
        """
        found = {ROOT, *path}
        for table in self._leaving:
            if (table.level, table.index) in places and self._lives[table].unlinked_ns > t_ns:
                found.add(table)
        return frozenset(found)

    def grace_period(self, start_ns: int, end_ns: int) -> None:
        """A grace period ran from ``start_ns`` to ``end_ns``."""
        self._grace_periods.append((start_ns, end_ns))

    def invalidated(self, first: int, last: int, leaves_left: int, t_ns: int) -> None:
        """The leaves ``first`` up to ``last`` were taken back; ``leaves_left`` are mapped."""
        if leaves_left:
            self._report(
                "leaf_after_invalidate",
                t_ns,
                f"{leaves_left} leaves map pages in {first}..{last - 1} that their owner took back",
            )

    def callback_done(self, table: TableId, t_ns: int) -> None:
        """The RCU callback that was to free ``table`` has run, at ``t_ns``."""
        life = self._lives.get(table)
        if life is not None and life.freed_ns < 0:
            self._leaked.add(table)
            what = f"the callback of {name(table)} ran and left its last reference"
            self._report("leak", t_ns, what, table)

    def finished(self, t_ns: int, waiting: Container[TableId] = ()) -> None:
        """The VM is gone: every table must have been freed but those ``waiting`` for a callback."""
        for table, life in sorted(self._lives.items()):
            if life.freed_ns < 0 and table not in waiting and table not in self._leaked:
                self._report("leak", t_ns, f"nobody freed {name(table)}", table)

    # -- inside -------------------------------------------------------------------------------

    def _separated(self, unlinked_ns: int, freed_ns: int) -> bool:
        return any(
            unlinked_ns <= start and end <= freed_ns for start, end in reversed(self._grace_periods)
        )

    def _check(self, walk: Walk, table: TableId, freed_ns: int) -> None:
        if table in walk.tables and walk.inside(freed_ns):
            self._report(
                "use_after_free",
                freed_ns,
                f"{walk.walker} reads {name(table)} after its page was freed",
                table,
                walk,
            )

    def _check_root(self, walk: Walk) -> None:
        t_ns = self._root_freed_ns
        if walk.end_ns <= t_ns:
            return
        what = f"the root was freed while {walk.walker} was walking it"
        if not walk.inside(t_ns):  # between two of its reads, or before the first
            what = f"{walk.walker} walks the root after it was freed"
            late = max(0, t_ns - walk.start_ns)
            t_ns = walk.start_ns - (-late // walk.period_ns) * walk.period_ns
        self._report("root_freed_under_walker", t_ns, what, ROOT, walk)

    def _report(
        self,
        kind: str,
        t_ns: int,
        message: str,
        table: TableId | None = None,
        walk: Walk | None = None,
        story: Iterable[tuple[int, str]] = (),
    ) -> None:
        self.total += 1
        if len(self.violations) >= KEPT:
            return
        story = list(story)
        life = self._lives.get(table) if table is not None else None
        if life is not None and table is not None:
            story.append((life.born_ns, f"{name(table)} linked"))
            if life.unlinked_ns >= 0:
                story.append((life.unlinked_ns, f"{name(table)} unlinked"))
            if 0 <= life.freed_ns < t_ns:
                story.append((life.freed_ns, f"{name(table)} freed"))
        if table == ROOT:
            story.append((self._root_freed_ns, "the root freed"))
        if walk is not None:
            began = t_ns - (t_ns - walk.start_ns) % walk.period_ns
            story.append((began, f"{walk.walker} enters, holding no lock"))
            story.append((began + walk.busy_ns, f"{walk.walker} leaves"))
        story.append((t_ns, f"{kind}: {message}"))
        lines = [f"{format_duration(at)} ({at} ns): {what}" for at, what in sorted(story)]
        self.violations.append(Violation(kind, t_ns, self.guest, message, lines))


def name(table: TableId) -> str:
    """A table's name for people."""
    if table == ROOT:
        return "the root"
    return f"L{table.level} table {table.index} (incarnation {table.incarnation})"
