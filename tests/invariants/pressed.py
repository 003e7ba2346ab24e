"""Small hosts that run out of memory, drawn; and what must hold in them after every event.

Each is drawn from a number, as in :mod:`invariants.drawn`.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
from worlds import MS, US, scenario

from simkvm.kernel.host_memory import OWN, PRESENT, WRPROTECT
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.lrugen import ABSENT
from simkvm.kernel.stage2 import VALID, WRITE
from simkvm.kernel.swap_fault import SwapFaultPath
from simkvm.kernel.swappable import CACHED, DIRTY, SLOT, SwappableMemory
from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.scenario.memory import CACHE_PAGES
from simkvm.scenario.schema import Scenario
from simkvm.units import KIB, MIB

KERNELS = {
    "arm64": ["linux-6.12", "linux-6.1", "linux-6.4-yuzhao-v2", "linux-7.1", "linux-7.1-lockless"],
    "x86": ["linux-6.12-x86", "linux-6.15-x86", "linux-6.12-x86-shadow"],
}
MACHINES = {"arm64": ["ampere-altra-80c", "graviton3-64c"], "x86": ["x86-icelake-64c"]}
PLACES = (0, SLOT, SLOT | CACHED)  #: of a page that is not mapped: nowhere, in swap, in its cache
TIGHT = 0.9  #: share of a page that one takes in a compressed pool that gains little
PATTERNS = ("memcached", "chase", "sort", "interactive")
STEPS = 400_000  #: events after which a run is taken for one that never ends
DURATION = 10 * MS


def pressed(dice: Random) -> Scenario:
    """The scenario that ``dice`` gives: guests that do not fit."""
    arch = dice.choice(["arm64", "arm64", "x86"])
    page = dice.choice([4 * KIB, 4 * KIB, 4 * KIB, 16 * KIB, 64 * KIB]) if arch == "arm64" else 4096
    software = arch == "arm64" and dice.random() < 0.25
    names = [f"vm{number}" for number in range(dice.choice([1, 1, 2, 3]))]
    together = dice.random() < 0.5
    guests = {name: guest(dice, page, software) for name in names}
    for one in guests.values():
        one["memcg"] = "all" if together else None
    pages = sum(one["memory"] // page for one in guests.values())
    vcpus = sum(one["vcpus"] for one in guests.values())
    fixed = vcpus * CACHE_PAGES + sum(
        2 * (one["memory"] // page // (page // 8) + 2) + 16 for one in guests.values()
    )
    reserve, scale = dice.randrange(8, 40), dice.choice([1, 10, 300])
    ample = pages + vcpus * CACHE_PAGES + 8 * len(names) + 2 * reserve
    least = fixed + 3 * reserve + 64
    total = max(least + least * scale // 4000, int(ample * dice.choice([0.3, 0.5, 0.7, 0.8])))
    high = reserve + 2 * max(reserve // 4, total * scale // 10_000)
    over = max(0, sum(one["memory"] // page for one in guests.values()) + fixed + high - total)
    swap = device(dice, page, over)
    mapped = sum(one["memory"] // page for one in guests.values() if one["mapped"])
    stored = swap.get("ratio", 0.0) if swap else 1.0
    if over > (mapped - 1) * (1 - stored) or (swap or {}).get("size") is not None:
        for one in guests.values():
            one["mapped"] = False
    fair = dice.random() < 0.3
    classic = pages % 4 == 0  # the two lists in place of generations
    takers = {f"c{number}": taker(dice, guests, page) for number in range(dice.choice([0, 1, 2]))}
    cpus = vcpus + 2 + len(takers)
    if swap is not None and not fair:
        sleep_for_themselves(guests, Random(total))
    return scenario(
        seed=dice.randrange(1000),
        machine={"base": dice.choice(MACHINES[arch]), "set": {"hw_af": not software}},
        kernel=dice.choice(KERNELS[arch]),
        host={
            "cpus": dice.randint(1, cpus) if fair else cpus,
            "scheduler": "fair" if fair else "none",
            "nohz_full": "none" if fair else dice.choice(["none", "none", "vcpus"]),
            "memory": {
                "size": total * page,
                "min_free": reserve * page,
                "watermark_scale": scale,
                **({"lru_gen": 0} if classic else {}),
            },
            "swap": swap,
        },
        guests=guests,
        duration=DURATION if takers or dice.random() < 0.5 else None,
        ageing={"interval": dice.choice([0, 300 * US]), "passes": 3}
        if dice.random() < 0.2 and not classic
        else None,
        contenders=takers,
        ties=dice.choice(["fifo", "shuffle"]),
    )


def sleep_for_themselves(guests: dict[str, Any], dice: Random) -> None:
    """Some of the vCPUs that work off jobs go on while a page is read."""
    for one in guests.values():
        if one["access"]["pattern"] in PATTERNS:
            one["async_pf"] = dice.random() < 0.7
        if one["access"]["pattern"] == "memcached":
            one["access"]["threads"] = dice.choice([1, 2, 5])


def guest(dice: Random, page: int, software: bool) -> dict[str, Any]:
    """One that touches its memory over and over."""
    vcpus = dice.randint(1, 3)
    pages = dice.randrange(200, 700) // vcpus * vcpus
    touches = dice.choice([500, 1500])
    ratio = dice.choice([0.0, 0.1, 0.5, 1.0])
    random = {"touches": touches, "write_ratio": ratio, "think": dice.choice([0, 500, 5000])}
    access: dict[str, Any] = dice.choice(
        [
            {"pattern": "populate", "repeat": 3},
            {"pattern": "uniform"} | random,
            {"pattern": "zipf"} | random,
            {"pattern": "hot_cold"} | random,
        ]
    )
    if not software and dice.random() < 0.25:
        access = workload(dice, pages, page)
    lazy = (
        not software
        and access["pattern"] in ("uniform", "zipf", "hot_cold")
        and dice.random() < 0.3
    )
    return {
        "vcpus": vcpus,
        "memory": pages * page,
        "page_size": page,
        "access": access,
        "engine": "lazy" if lazy else "explicit",
        "mapped": dice.random() < 0.6,
    }


def workload(dice: Random, pages: int, page: int) -> dict[str, Any]:
    """Jobs in a closed loop, few enough to come to an end."""
    memcached = {"pattern": "memcached", "clients": 6, "keys": 200, "value_size": 1024}
    memcached |= {"requests": 60, "get_ratio": dice.choice([0.0, 0.5, 1.0])}
    made: list[dict[str, Any]] = [
        {"pattern": "chase", "loads": 1000, "span": dice.choice(["vcpu", "guest"])},
        {"pattern": "sort", "data": pages // 2 * page, "block": 4 * page},
        {"pattern": "interactive", "tabs": 3, "tab_size": pages // 4 * page, "visits": 4}
        | {"bursts": 2, "burst_cpu": 20 * US, "pause": 50 * US},
    ]
    return dice.choice(made if pages * page < 3 * MIB else [*made, memcached])


def device(dice: Random, page: int, over: int) -> dict[str, Any] | None:
    """Where pages go; none in some worlds, too little in others."""
    kind = dice.choice(["optane", "nvme", "optane", "zram", "zram", "zram", "none"])
    if kind == "none":
        return None
    size = {"size": max(1, int(over * dice.choice([0.3, 0.9, 1.1, 1.5]))) * page}
    spec: dict[str, Any] = {"kind": kind} | (size if dice.random() < 0.4 else {})
    if kind == "zram":
        spec["ratio"] = dice.choice([0.1, 0.35, TIGHT])
    elif dice.random() < 0.3:
        spec |= {"queue_depth": dice.choice([1, 4]), "channels": dice.choice([1, 3])}
    return spec


def taker(dice: Random, guests: dict[str, Any], page: int) -> dict[str, Any]:
    """Somebody who takes memory back while it is being reclaimed."""
    name = dice.choice(list(guests))
    pages = guests[name]["memory"] // page
    start = dice.randrange(2 * MS)
    common = {"guest": name, "start": start}
    return common | dice.choice(
        [
            {
                "kind": "madvise_dontneed",
                "range": dice.choice([1, 7, pages]) * page,
                "rate": dice.choice([2000, 50_000]),
                "order": dice.choice(["random", "sequential"]),
            },
            {"kind": "balloon", "target": pages // 2 * page, "rate": 100_000},
        ]
    )


class Watch:
    """Looks at a world after each of its events."""

    def __init__(self, world: World) -> None:
        assert world.pgdat is not None
        self.world = world
        self.pgdat = world.pgdat
        self.hosts: list[SwappableMemory] = []
        for kvm in world.kvms:
            assert isinstance(kvm.host, SwappableMemory)
            self.hosts.append(kvm.host)
        self.contents = [Contents(kvm) for kvm in world.kvms]
        self.steps = 0

    def after_event(self) -> None:
        """What must hold now."""
        self.steps += 1
        assert self.steps < STEPS, "no end in sight"
        self.pages_are_conserved()
        self.slots_are_those_of_leaves()
        for kvm, contents in zip(self.world.kvms, self.contents, strict=True):
            mapped_pages_are_there(kvm)
            pages_are_on_lists(kvm)
            contents.follow()

    def pages_are_conserved(self) -> None:
        """Every page that is not free is somewhere, once."""
        pages = self.pgdat.pages
        held = sum(host.page_count + host.table_pages for host in self.hosts)
        for kvm in self.world.kvms:
            held += kvm.tables_allocated - kvm.tables_freed  # with those that wait for RCU
            for vcpu in kvm.vcpus:
                assert isinstance(vcpu.fault, SwapFaultPath)
                assert vcpu.fault.cached >= 0
                held += vcpu.fault.cached + vcpu.fault.in_flight
            held += sum(work.in_flight for work in kvm.kworkers)  # type: ignore[attr-defined]
            if kvm.alive or any(vcpu.fault.cached for vcpu in kvm.vcpus):
                held += kvm.stage2.geometry.root_pages
        pool = 0 if self.pgdat.swap is None else self.pgdat.swap.pool_pages
        assert pages.total - pages.free == held + pool, "a page is lost, or there twice"
        assert pages.free >= 0, "more was taken than there is"

    def quiet(self) -> bool:
        """Whether nobody gives pages up and the run came to its end."""
        scenario = self.world.scenario
        killed = self.pgdat.vmstat.oom_kills
        return scenario.duration is None and not scenario.contenders and not killed

    def slots_are_those_of_leaves(self) -> None:
        """Slots in use are those that leaves have."""
        slots = sum(int(np.count_nonzero(host.swap & SLOT)) for host in self.hosts)
        assert slots == (0 if self.pgdat.swap is None else self.pgdat.swap.used)

    def at_end(self, record: Record) -> None:
        """What must hold of the whole run."""
        vmstat, contents = self.pgdat.vmstat, self.contents
        fresh, read, cached = (sum(each.came[where] for each in contents) for where in PLACES)
        assert (vmstat.first_faults, vmstat.swap_cache_hits) == (fresh, cached)
        in_vain = vmstat.pgmajfault - read  # given up while they were read, or not yet there
        assert in_vain >= 0
        assert in_vain == 0 or not self.quiet()
        stalls = np.array(self.pgdat.stalls, np.int64).reshape(-1, 2)
        assert (stalls[:, 0] < stalls[:, 1]).all()
        assert 0 <= record.summary["psi_full_ratio"] <= record.summary["psi_some_ratio"] <= 1
        if self.world.scenario.duration is None:
            assert all(vcpu.finished_ns >= 0 for kvm in self.world.kvms for vcpu in kvm.vcpus)


def mapped_pages_are_there(kvm: Kvm) -> None:
    """Stage 2 maps no page that the host has not mapped, but for a range that is going."""
    host = kvm.host
    assert isinstance(host, SwappableMemory)
    if not kvm.alive:
        return
    entries = kvm.stage2.leaf.entries[: kvm.leaves]
    absent = ((entries & VALID) != 0) & ((host.state & PRESENT) == 0)
    readonly = ((host.state & OWN) == 0) | ((host.state & WRPROTECT) != 0)
    bad = np.flatnonzero(absent | (((entries & WRITE) != 0) & readonly))
    assert kvm.notifier.in_progress or not len(bad), f"leaves {bad}"
    clean = ((host.swap & SLOT) != 0) & ((host.swap & DIRTY) == 0)
    lost = np.flatnonzero(((entries & WRITE) != 0) & clean & ~readonly)
    assert not len(lost), f"writes to leaves {lost} would be lost"


def pages_are_on_lists(kvm: Kvm) -> None:
    """A page is on the LRU, or somebody looks at it; what is no page is on no list."""
    host = kvm.host
    assert isinstance(host, SwappableMemory)
    there = ((host.state & OWN) | (host.swap & CACHED)) != 0
    listed = host.lru._listed != ABSENT  # type: ignore[attr-defined]
    assert np.array_equal(there, listed), np.flatnonzero(there != listed)
    assert not ((host.swap & (CACHED | DIRTY)) != 0)[(host.swap & SLOT) == 0].any()


class Contents:
    """What is in each page of a guest: how often it has been written, by whom is all one.

    A page that stage 2 lets the guest write is taken for written.
    """

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        assert isinstance(kvm.host, SwappableMemory)
        self.host = kvm.host
        self.versions = np.zeros(kvm.leaves, np.int64)
        self.stored = np.zeros(kvm.leaves, np.int64)
        self.swap = self.host.swap.copy()
        self.writable = np.zeros(kvm.leaves, np.bool_)
        self.written = 0
        self.came = dict.fromkeys(PLACES, 0)  # pages that faults mapped, by their places
        self.install = self.host.install
        self.host.install = self.installed  # type: ignore[method-assign]

    def installed(self, leaf: int, own: bool) -> None:
        """A fault maps a page."""
        if own and not self.host.fast[leaf] & OWN:
            self.came[self.host.fast_swap[leaf] & (SLOT | CACHED)] += 1
        self.install(leaf, own)

    def follow(self) -> None:
        """What the last event did."""
        host, swap = self.host, self.swap
        state, now = host.state, host.swap
        written = ((swap & (SLOT | DIRTY)) != SLOT) & ((now & (SLOT | DIRTY)) == SLOT)
        self.stored[written] = self.versions[written]
        self.written += int(np.count_nonzero(written))
        alone = ((now & (SLOT | CACHED)) == SLOT) & ((state & OWN) == 0)
        lost = np.flatnonzero(alone & (self.stored != self.versions))
        assert not len(lost), f"leaves {lost} are in swap as they were before"
        nothing = (state == 0) & (now == 0)
        self.versions[nothing] = self.stored[nothing] = 0
        writable = (self.kvm.stage2.leaf.entries[: self.kvm.leaves] & WRITE) != 0
        self.versions[writable & ~self.writable] += 1
        self.writable = writable
        self.swap = now.copy()


def run_watched(spec: Scenario) -> tuple[World, Record]:
    """Run it, and look at it after every event."""
    from worlds import after_every_event, world

    made = world(spec)
    watch = Watch(made)
    after_every_event(made, watch.after_event)
    record = made.run()
    watch.at_end(record)
    return made, record
