"""A bench for single mechanisms: one guest of a simulated host, driven a command at a time.

Commands begin when the one before is done, as those of a test program that drives KVM would, and
nothing else runs: no samples, no contender, and vCPUs only if :meth:`Lab.touch_all` starts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np

from simkvm.guest.patterns import Chunk
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.aging import METHODS, AgeingMethod
from simkvm.kernel.aging_call import Pass
from simkvm.kernel.qrwlock import ROW
from simkvm.kernel.sites import NAMES
from simkvm.kernel.stage2 import WRITE
from simkvm.kernel.task import Task
from simkvm.kernel.teardown import Teardown
from simkvm.kernel.unmap import UnmapWalk
from simkvm.kernel.world import World
from simkvm.kernel.zap_roots import teardown_of
from simkvm.scenario.kernel import load_kernel
from simkvm.scenario.machine import load_machine
from simkvm.scenario.schema import Scenario
from simkvm.units import MIB

ROWS = ("site", "mode", "arrival", "wait", "hold", "met")


def scenario(**keys: Any) -> Scenario:
    """A scenario with one guest ``vm`` unless ``keys`` says otherwise."""
    guest = {"memory": 4 * MIB, "access": {"pattern": "populate"}, **keys.pop("guest", {})}
    keys.setdefault("guests", {"vm": guest})
    keys.setdefault("machine", "graviton3-64c")
    keys.setdefault("kernel", "linux-6.12")
    return Scenario.model_validate({"name": "test", **keys})


def world(**keys: Any) -> World:
    """The world of :func:`scenario`, not yet run."""
    spec = scenario(**keys)
    return World(spec, load_machine(spec.machine), load_kernel(spec.kernel))


def account(rows: list[int]) -> list[dict[str, int]]:
    """A lock's flat account as one dict an acquisition; ``entry`` is when it got in."""
    cut = [rows[at : at + ROW] for at in range(0, len(rows), ROW)]
    named = [dict(zip(ROWS, row, strict=True)) for row in cut]
    return [row | {"entry": row["arrival"] + row["wait"]} for row in named]


class Lab:
    """One guest and a thread of the host. ``keys`` as for :func:`scenario`.

    ``t_ns``: when the last command was done. ``visits``: calls of the unmap walker so far.
    """

    def __init__(self, memory: int = 4 * MIB, guest: dict[str, Any] | None = None, **keys: Any):
        self.world = world(guest={"memory": memory, **(guest or {})}, **keys)
        self.env = self.world.env
        self.kvm = self.world.kvms[0]
        self.vcpus = list(self.kvm.vcpus)
        self.kvm.vcpus.clear()  # those that run are the guest's
        self.task = Task("lab", self.world.cpus[-1])
        self.methods: dict[str, AgeingMethod] = {}
        self.t_ns = 0

    # -- commands -----------------------------------------------------------------------------

    def run(self, steps: Generator[Any, Any, Any]) -> Any:
        """Let ``steps`` run to the end; returns what they return."""
        result = self.env.run(self.env.process(steps))
        self.t_ns = max(self.t_ns, int(self.env.now))
        return result

    def touch_all(self) -> None:
        """Every vCPU makes the touches of its pattern (``access``), from time 0."""
        for vcpu in self.vcpus:
            self.start(vcpu)
        for vcpu in self.vcpus:
            self.env.run(vcpu.process)
        self.t_ns = max(vcpu.finished_ns for vcpu in self.vcpus)

    def touch(self, *touches: tuple[int, bool, int]) -> Vcpu:
        """Start a vCPU that touches (page, write, pause afterwards in ns); not yet run."""
        pages, writes, gaps = (np.array(column) for column in zip(*touches, strict=True))
        chunk = Chunk(pages.astype(np.int64), writes.astype(np.bool_), gaps.astype(np.int64))
        index = len(self.kvm.vcpus)
        kind = type(self.vcpus[0])
        return self.start(kind(self.kvm, index, self.world.cpus[index], iter([chunk])))

    def start(self, vcpu: Vcpu) -> Vcpu:
        """Start the thread of a vCPU."""
        self.kvm.vcpus.append(vcpu)
        vcpu.process = self.env.process(vcpu.run())
        return vcpu

    def fill(self, leaves: Iterable[int] | None = None) -> None:
        """Have pages mapped, as write faults leave them, without a fault: for what comes after."""
        kvm = self.kvm
        for leaf in range(kvm.leaves) if leaves is None else leaves:
            if made := kvm.stage2.map_leaf(leaf, WRITE):
                kvm.tables_linked(made, self.t_ns)
            if not kvm.host.state[leaf]:
                kvm.host.install(leaf, True)

    def drop(self, first: int = 0, size: int = 0, blockable: bool = True) -> None:
        """One notifier range over ``size`` bytes at ``first`` (0: to the end of memory)."""
        leaf = self.kvm.stage2.leaf_bytes
        last = (first + size) // leaf if size else self.kvm.leaves
        self.t_ns = self.run(
            self.kvm.notifier.invalidate(self.task, self.t_ns, first // leaf, last, blockable)
        )

    def drop_in_pieces(self, size: int, first: int = 0, length: int = 0) -> None:
        """``length`` bytes at ``first`` (0: to the end), a range of ``size`` each."""
        end = first + length if length else self.kvm.leaves * self.kvm.stage2.leaf_bytes
        for start in range(first, end, size):
            self.drop(start, size)

    def age(self, method: str = "lru_gen") -> Pass:
        """One pass of an ageing method, by the lab's thread, that keeps it for the next one."""
        if method not in self.methods:
            self.methods[method] = METHODS[method](self.kvm, self.task)
        report: Pass = self.run(self.methods[method].run(self.t_ns))
        self.t_ns = max(self.t_ns, report.end_ns)
        return report

    def destroy(self, order: str = "close_vm") -> Teardown:
        """The end of the VM."""
        ends = teardown_of(self.kvm.kernel)
        teardown = ends(self.kvm, self.task, order, self.t_ns)
        self.run(teardown.run())
        return teardown

    # -- what happened ------------------------------------------------------------------------

    def acquisitions(self) -> Counter[tuple[str, str]]:
        """How often the lock was taken since the last call, by site and mode."""
        rows = account(self.kvm.mmu_lock.rows)
        self.kvm.mmu_lock.rows.clear()
        return Counter((NAMES[row["site"]], ("read", "write")[row["mode"]]) for row in rows)

    def lock_rows(self, site: str) -> list[dict[str, int]]:
        """The account of one site."""
        return [row for row in account(self.kvm.mmu_lock.rows) if NAMES[row["site"]] == site]

    def broadcasts(self) -> int:
        """Invalidations issued so far."""
        return self.world.remote_flush.broadcasts

    def young(self) -> int:
        """Leaves that are valid and accessed."""
        return int(np.count_nonzero(self.kvm.stage2.young(0, self.kvm.leaves)))


class Tally:
    """Sums over the unmap walks of one guest."""

    def __init__(self, lab: Lab) -> None:
        self.walks: list[UnmapWalk] = []
        lab.kvm.stage2.on_unmap = self.walks.append

    def take(self) -> dict[str, int]:
        """Calls, visits, leaves and tables since the last look."""
        walks = self.walks.copy()
        self.walks.clear()
        return {
            "calls": len(walks),
            "visits": sum(walk.visits for walk in walks),
            "leaves": sum(walk.leaves for walk in walks),
            "tables": sum(len(walk.tables) for walk in walks),
        }
