"""Small worlds for tests: built from a few words, watched while they run.

A journal listens at the places where the parts of a world tell one another what happened: tables
are linked, unlinked and freed, callbacks queued and invoked, walks made, ranges taken back. It
patches classes, so it must be open before the world is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from simkvm.kernel.host_memory import HostMemory
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.qrwlock import ROW
from simkvm.kernel.rcu import Rcu
from simkvm.kernel.stage2 import Stage2, TableId
from simkvm.kernel.unmap import UnmapWalk, chunks
from simkvm.kernel.world import World
from simkvm.observe.lock_stat import LockStat
from simkvm.observe.oracle import Oracle, Walk
from simkvm.observe.record import Record
from simkvm.scenario.kernel import load_kernel
from simkvm.scenario.load import require_possible
from simkvm.scenario.machine import load_machine
from simkvm.scenario.schema import Scenario
from simkvm.units import MIB

US, MS = 1_000, 1_000_000


def scenario(**keys: Any) -> Scenario:
    """A scenario with one guest ``vm0``, of ``guest``'s keys, unless ``keys`` gives ``guests``."""
    guest = {"memory": 4 * MIB, "access": {"pattern": "populate"}, **keys.pop("guest", {})}
    keys.setdefault("guests", {"vm0": guest})
    keys.setdefault("machine", "ampere-altra-80c")
    keys.setdefault("kernel", "linux-6.12")
    made = Scenario.model_validate({"name": "test", **keys})
    require_possible(made)
    return made


def world(spec: Scenario | None = None, **keys: Any) -> World:
    """The world of ``spec``, or of :func:`scenario` with ``keys``; not yet run."""
    spec = spec or scenario(**keys)
    return World(spec, load_machine(spec.machine), load_kernel(spec.kernel))


def run(spec: Scenario | None = None, **keys: Any) -> Record:
    """The record of that world."""
    return world(spec, **keys).run()


def after_every_event(made: World, check: Callable[[], None]) -> None:
    """Have ``check`` called after each event of the run to come."""
    step = made.env.step

    def checked() -> None:
        step()
        check()

    made.env.step = checked  # type: ignore[method-assign]


class Acquisition(NamedTuple):
    """One row of a lock's account."""

    site: int
    mode: int
    arrival: int
    wait: int
    hold: int
    met: int

    @property
    def entry(self) -> int:
        """When it got in."""
        return self.arrival + self.wait

    @property
    def release(self) -> int:
        """When it let go."""
        return self.entry + self.hold


def acquisitions(rows: list[int]) -> list[Acquisition]:
    """A lock's flat account, row by row."""
    return [Acquisition(*rows[at : at + ROW]) for at in range(0, len(rows), ROW)]


class Told(NamedTuple):
    """One thing told of a table, and when it happened (perhaps in the future)."""

    guest: str
    table: TableId
    t_ns: int


@dataclass
class Callback:
    """One RCU callback: queued when and where, invoked when (once, one hopes)."""

    cpu: int
    queued_ns: int
    invoked_ns: list[int] = field(default_factory=list)


@dataclass
class Journal:
    """All that was told, in the order of telling."""

    linked: list[Told] = field(default_factory=list)
    unlinked: list[Told] = field(default_factory=list)
    freed: list[Told] = field(default_factory=list)
    roots_freed: list[tuple[str, int]] = field(default_factory=list)
    walks: list[tuple[str, Walk]] = field(default_factory=list)
    callbacks: list[Callback] = field(default_factory=list)
    locks: dict[str, list[int]] = field(default_factory=dict)
    taken: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    open_leaves: dict[str, NDArray[np.int32]] = field(default_factory=dict)  #: how often each is
    ends: dict[str, int] = field(default_factory=dict)
    changes: int = 0  #: of tables or host mappings so far
    tables_queued: int = 0  #: tables left to RCU so far

    def take(self, kvm: Kvm, first: int, last: int) -> None:
        """These leaves were unmapped by an invalidation that has not ended."""
        self.taken.setdefault(kvm.name, []).append((first, last))
        nothing = np.zeros(kvm.leaves, np.int32)
        self.open_leaves.setdefault(kvm.name, nothing)[first:last] += 1

    def give_back(self, guest: str, piece: tuple[int, int]) -> None:
        """The invalidation that took ``piece`` has ended."""
        self.taken[guest].remove(piece)
        self.open_leaves[guest][slice(*piece)] -= 1

    def open_ranges(self, guest: str) -> list[tuple[int, int]]:
        """Leaves between the start and the end of an invalidation, as far as unmapped."""
        return self.taken.get(guest, [])

    def rows(self, guest: str = "vm0") -> list[Acquisition]:
        """The whole account of a guest's ``mmu_lock``, once the run is over."""
        return acquisitions(self.locks.get(guest, []))


@contextmanager
def journal() -> Iterator[Journal]:
    """Listen to every world that is built and run meanwhile."""
    notes = Journal()
    with pytest.MonkeyPatch.context() as patch:
        _listen_to_changes(notes, patch)
        _listen_to_oracle(notes, patch)
        _listen_to_invalidations(notes, patch)
        _listen_to_rcu(notes, patch)
        _listen_to_locks(notes, patch)
        yield notes


def before(patch: pytest.MonkeyPatch, owner: type, method: str, note: Callable[..., None]) -> None:
    """Have ``note`` called with the same arguments before ``method`` of any ``owner``."""
    done = getattr(owner, method)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return done(*args, **kwargs)

    patch.setattr(owner, method, noted)


def _listen_to_changes(notes: Journal, patch: pytest.MonkeyPatch) -> None:
    def changed(*_: Any, **__: Any) -> None:
        notes.changes += 1

    for method in (
        *("map_leaf", "map_block", "break_block", "fill_block", "collapse", "clear"),
        *("allow_write", "write_protect", "write_protect_words", "set_young", "clear_young"),
    ):
        before(patch, Stage2, method, changed)
    before(patch, UnmapWalk, "__post_init__", changed)
    before(patch, HostMemory, "install", changed)
    for method in ("install_huge", "zap", "split"):
        before(patch, HostMemory, method, changed)


def _listen_to_oracle(notes: Journal, patch: pytest.MonkeyPatch) -> None:
    def allocated(oracle: Oracle, tables: list[TableId], t_ns: int) -> None:
        notes.linked += [Told(oracle.guest, table, t_ns) for table in tables]

    def unlinked(oracle: Oracle, table: TableId, t_ns: int, *_: Any, **__: Any) -> None:
        notes.unlinked.append(Told(oracle.guest, table, t_ns))

    def freed(oracle: Oracle, table: TableId, t_ns: int, *_: Any, **__: Any) -> None:
        notes.freed.append(Told(oracle.guest, table, t_ns))

    before(patch, Oracle, "allocated", allocated)
    before(patch, Oracle, "unlinked", unlinked)
    before(patch, Oracle, "freed", freed)
    before(patch, Oracle, "root_freed", lambda o, t: notes.roots_freed.append((o.guest, t)))
    before(patch, Oracle, "walk", lambda o, walk: notes.walks.append((o.guest, walk)))


def _listen_to_invalidations(notes: Journal, patch: pytest.MonkeyPatch) -> None:
    guests: dict[str, Kvm] = {}
    pieces: dict[str, list[tuple[int, int]]] = {}  # where unmap is not by chunk

    def unmap_chunk(kvm: Kvm, cpu: int, t_ns: int, first: int, last: int) -> None:
        guests[kvm.name] = kvm
        if kvm.no_memslot(first):
            return  # a memslot goes: no range that ends
        notes.take(kvm, first, last)

    def zap_leaves(kvm: Kvm, t_ns: int, first: int, last: int) -> None:
        if kvm.alive and not kvm.no_memslot(first):
            pieces.setdefault(kvm.name, []).append((first, last))
            notes.take(kvm, first, last)

    def invalidated(oracle: Oracle, first: int, last: int, *_: Any) -> None:
        taken = notes.taken.get(oracle.guest, [])
        for piece in [p for p in pieces.get(oracle.guest, []) if first <= p[0] and p[1] <= last]:
            pieces[oracle.guest].remove(piece)
            notes.give_back(oracle.guest, piece)
        kvm = guests.get(oracle.guest)
        for slot in kvm.memslots.overlapping(first, last) if kvm is not None else ():
            for cut in chunks(kvm.stage2, *slot):
                if cut in taken:  # all of them, unless the tree went away half-way
                    notes.give_back(oracle.guest, cut)
        notes.ends[oracle.guest] = notes.ends.get(oracle.guest, 0) + 1

    before(patch, Kvm, "unmap_chunk", unmap_chunk)
    before(patch, Kvm, "zap_leaves", zap_leaves)
    before(patch, Oracle, "invalidated", invalidated)


def _listen_to_rcu(notes: Journal, patch: pytest.MonkeyPatch) -> None:
    queue_many = Rcu.call_rcu_many

    def noted(queue: Callable[..., int]) -> Callable[..., int]:
        def call_rcu(rcu: Rcu, t_ns: int, cpu_id: int, callback: Callable[[int], int]) -> int:
            note = Callback(cpu_id, t_ns)
            notes.callbacks.append(note)

            def invoked(at_ns: int) -> int:
                note.invoked_ns.append(at_ns)
                return callback(at_ns)

            return queue(rcu, t_ns, cpu_id, invoked)

        return call_rcu

    def call_rcu_many(
        rcu: Rcu, times_ns: Sequence[int], cpu_id: int, callback: Callable[[int, int], int]
    ) -> int:
        added = [Callback(cpu_id, t_ns) for t_ns in times_ns]
        notes.callbacks.extend(added)

        def invoked(at_ns: int, index: int) -> int:
            added[index].invoked_ns.append(at_ns)
            return callback(at_ns, index)

        return queue_many(rcu, times_ns, cpu_id, invoked)

    def one(*_: Any) -> None:
        notes.tables_queued += 1

    def many(_: Kvm, t_ns: int, cpu: int, tables: Sequence[TableId], *__: Any) -> None:
        notes.tables_queued += len(tables)

    before(patch, Kvm, "call_rcu", one)
    before(patch, Kvm, "call_rcu_for", many)
    patch.setattr(Rcu, "call_rcu", noted(Rcu.call_rcu))
    patch.setattr(Rcu, "call_rcu_hurry", noted(Rcu.call_rcu_hurry))
    patch.setattr(Rcu, "call_rcu_many", call_rcu_many)


def _listen_to_locks(notes: Journal, patch: pytest.MonkeyPatch) -> None:
    absorb = LockStat.absorb

    def noted(stat: LockStat, rows: list[int], *args: Any, **kwargs: Any) -> None:
        waiting = list(rows)
        absorb(stat, rows, *args, **kwargs)
        if not rows:
            notes.locks.setdefault(stat.guest, []).extend(waiting)

    patch.setattr(LockStat, "absorb", noted)
