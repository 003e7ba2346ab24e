"""A host whose memory can run out, with guests that lie still: eviction by hand."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import worlds
from simpy import Event
from worlds import MS

from simkvm.kernel.listed import ANON
from simkvm.kernel.lrugen import ListedLruvec
from simkvm.kernel.mglru import MAX_NR_GENS
from simkvm.kernel.pgdat import Pgdat
from simkvm.kernel.scan_control import ScanControl
from simkvm.kernel.stage2 import AF
from simkvm.kernel.swappable import SwappableMemory
from simkvm.kernel.task import Task
from simkvm.kernel.vmscan import Reclaimer
from simkvm.kernel.world import World
from simkvm.units import MIB

IDLE = {"pattern": "phases", "phases": [{"pattern": "uniform", "touches": 1, "think": 10**12}]}


class Pressed:
    """Guests, all mapped and old; ``memory``: of each."""

    def __init__(
        self,
        memory: int = 2 * MIB,
        kernel: Any = "linux-6.12",
        guests: int = 1,
        host: dict[str, Any] | None = None,
        swap: str = "zram",
        **keys: Any,
    ) -> None:
        guest = {"memory": memory, "mapped": True, "access": IDLE, **keys}
        self.world: World = worlds.world(
            guests={f"vm{n}": guest for n in range(guests)},
            kernel=kernel,
            host={"memory": {"size": 256 * MIB, **(host or {})}, "swap": {"kind": swap}},
        )
        assert self.world.pgdat is not None
        self.pgdat: Pgdat = self.world.pgdat
        self.kvms = self.world.kvms
        self.task = Task("test", self.world.cpus[-1], {})
        self.reclaimer = Reclaimer(self.pgdat, self.task)
        for kvm in self.kvms:
            kvm.stage2.leaf.entries[:] &= np.uint8(~AF & 0xFF)

    @property
    def lruvec(self) -> ListedLruvec:
        return self.pgdat.generations[0]

    @property
    def host(self) -> SwappableMemory:
        return self.pgdat.memory(0, 0)

    def use(self, *leaves: int, guest: int = 0) -> None:
        self.kvms[guest].stage2.leaf.entries[list(leaves)] |= np.uint8(AF)

    def do(self, steps: Generator[Event, Any, Any]) -> Any:
        """Run a piece of the kernel to its end; returns what it returns."""
        env = self.world.env
        return env.run(env.process(steps))

    def now(self) -> int:
        return int(self.world.env.now)

    def evict(self, nr: int, min_seq: int | None = None, swappiness: int = 60) -> int:
        """The number of the error of an eviction command."""
        seq = self.lruvec.max_seq - 2 if min_seq is None else min_seq
        steps = self.reclaimer.evict_on_command(self.lruvec, seq, nr, self.now(), swappiness)
        return int(self.do(steps)[0])

    def age(self, seq: int | None = None, forced: bool = True) -> int:
        """The number of the error of an ageing command."""
        at = self.lruvec.max_seq if seq is None else seq
        steps = self.reclaimer.age_on_command(self.lruvec, at, self.now(), 60, forced)
        return int(self.do(steps)[0])

    def shrink(self, sc: ScanControl) -> None:
        """One go over the memcgs."""
        self.do(self.reclaimer.shrink_node(sc, self.now()))

    def by_age(self, lruvec: ListedLruvec | None = None, of_type: int = ANON) -> list[int]:
        """Folios by age, the youngest generation first."""
        lruvec = lruvec or self.lruvec
        sizes = lruvec.sizes_of(of_type)
        return [sizes[(lruvec.max_seq - age) % MAX_NR_GENS] for age in range(MAX_NR_GENS)]


__all__ = ["MIB", "MS", "Pressed", "ScanControl"]
