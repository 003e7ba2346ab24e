"""Does every page of a host under memory pressure stay accounted for, whatever happens?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from worlds import MS, after_every_event, world

from simkvm.kernel.host_memory import OWN
from simkvm.kernel.listed import ABSENT, FolioLists
from simkvm.kernel.swap_fault import SwapFaultPath
from simkvm.kernel.swappable import CACHED, SwappableMemory
from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.units import MIB

UNIFORM = {"pattern": "uniform", "touches": 3000, "think": 2000, "write_ratio": 0.6}
SERVER = {
    "pattern": "memcached",
    "clients": 12,
    "threads": 2,
    "keys": 4000,
    "value_size": 900,
    "get_ratio": 0.5,
    "service": 2000,
    "network": 5000,
}
KINDS: dict[str, dict[str, Any]] = {
    "optane": {},
    "zram": {"swap": {"kind": "zram"}},
    "classic": {"memory": {"lru_gen": 0}},
    "no walks": {"memory": {"lru_gen": 1}},
    "two steps": {"kernel": "linux-7.1"},
    "windows": {"kernel": "linux-6.4-yuzhao-v2"},
    "memcgs": {"guests": 3},
    "file": {"backing": ("file",)},
    "file, classic": {"backing": ("file",), "memory": {"lru_gen": 0}},
    "both types": {"guests": 2, "backing": ("file", "anonymous"), "memcg": "vms"},
    "both types, two steps": {
        "guests": 2,
        "backing": ("file", "anonymous"),
        "memcg": "vms",
        "kernel": "linux-7.1",
    },
    "little swap": {"swap": {"kind": "nvme", "size": 3 * MIB}},
    "async page faults": {"access": SERVER, "async_pf": True},
    "async page faults, file": {"access": SERVER, "async_pf": True, "backing": ("file",)},
    "balloon": {"contender": {"kind": "madvise_dontneed", "guest": "vm0", "range": 65536}},
}


def pressed(
    kernel: str = "linux-6.12",
    memory: dict[str, Any] | None = None,
    swap: dict[str, Any] | None = None,
    guests: int = 1,
    contender: dict[str, Any] | None = None,
    backing: tuple[str, ...] = ("anonymous",),
    memcg: str | None = None,
    access: dict[str, Any] = UNIFORM,
    async_pf: bool = False,
) -> World:
    """Guests of 6 MiB in all on a host that has 4 MiB for them."""
    guest = {"vcpus": 3, "memory": 6 * MIB // guests, "access": access, "memcg": memcg}
    guest["async_pf"] = async_pf
    kinds = backing * guests
    return world(
        guests={f"vm{n}": {**guest, "backing": kinds[n]} for n in range(guests)},
        kernel=kernel,
        contenders={"vmm": {"rate": 2000.0, **contender}} if contender else {},
        host={
            "memory": {
                "size": 5 * MIB + guests * MIB // 2,
                "min_free": 64 * 4096,
                **(memory or {}),
            },
            "swap": swap or {"kind": "optane"},
        },
        duration=40 * MS,
    )


class Ledger:
    """Where the host's pages are: what no fault has in its hands must add up at all times."""

    def __init__(self, made: World) -> None:
        assert made.pgdat is not None
        self.made, self.pgdat = made, made.pgdat
        self.checks = 0

    def missing(self) -> int:
        """Pages that are not free, and that nobody is known to have."""
        pages = self.pgdat.pages
        held = sum(
            kvm.host.page_count  # type: ignore[attr-defined]
            + kvm.host.table_pages  # type: ignore[attr-defined]
            + kvm.tables_allocated
            - kvm.tables_freed
            + kvm.stage2.geometry.root_pages
            + sum(vcpu.fault.cached for vcpu in kvm.vcpus)
            for kvm in self.made.kvms
        )
        pool = self.pgdat.swap.pool_pages if self.pgdat.swap else 0
        return pages.total - pages.free - held - pool

    def check(self) -> None:
        self.checks += 1
        faults = [path for kvm in self.made.kvms for path in kvm.host_faults()]
        assert self.missing() == sum(fault.in_flight for fault in faults)  # type: ignore[attr-defined]
        for lruvec in self.pgdat.lruvecs:
            self.lists_hold_what_is_there(lruvec)

    def lists_hold_what_is_there(self, lruvec: FolioLists) -> None:
        """A page is on a list, or isolated, if and only if the host has it."""
        assert sum(map(sum, lruvec.on_list)) == np.count_nonzero(lruvec.listed < 254)
        assert sum(sum(lru.sizes) for lru in lruvec.listed_guests) == sum(map(sum, lruvec.on_list))
        place = self.pgdat.lruvecs.index(lruvec)
        for kvm, lru in zip(self.pgdat.kvms[place], lruvec.listed_guests, strict=True):
            there = (kvm.host.state & OWN).astype(bool)
            there |= (self.pgdat.memory_of(kvm).swap & CACHED).astype(bool)
            listed = lruvec.listed[lru.base : lru.base + len(there)] != ABSENT
            assert np.array_equal(there, listed)


def run(kind: str) -> tuple[Ledger, Record]:
    ledger = Ledger(pressed(**KINDS[kind]))
    after_every_event(ledger.made, ledger.check)
    return ledger, ledger.made.run()


@pytest.mark.parametrize("kind", KINDS)
def test_no_page_is_lost_or_counted_twice(kind: str) -> None:
    """After every event: all pages but the free ones are mapped, in the swap cache, page tables,
    in caches of vCPUs, in the pool of compressed swap, or on their way in a fault.
    """
    ledger, record = run(kind)
    made, summary = ledger.made, record.summary
    assert ledger.checks > 1000
    assert int(summary["pgsteal_kswapd"]) + int(summary["pgsteal_direct"]) > 200
    assert summary["violations"] == 0
    assert (int(summary["async_page_faults"]) > 100) == ("async" in kind)
    assert made.pgdat is not None
    swap = made.pgdat.swap
    assert swap is not None
    memories = [made.pgdat.memory_of(kvm) for kvm in made.kvms]
    used = sum(int(np.count_nonzero(m.swap & 1)) for m in memories if not m.file)
    assert swap.used == used, "a slot belongs to a page"


@pytest.mark.parametrize("kind", ["optane", "zram", "classic", "two steps"])
def test_every_fault_that_lacks_a_page_is_of_one_kind(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First faults, reads from swap, hits of the swap cache; a refault is one that reads."""
    mapped = given_back = 0
    install, give_back = SwappableMemory.install, SwapFaultPath._give_back

    def installed(memory: SwappableMemory, leaf: int, own: bool) -> None:
        nonlocal mapped
        mapped += own and not memory.fast[leaf] & OWN
        install(memory, leaf, own)

    def given(path: SwapFaultPath) -> None:
        nonlocal given_back
        given_back += path.in_flight
        give_back(path)

    monkeypatch.setattr(SwappableMemory, "install", installed)
    monkeypatch.setattr(SwapFaultPath, "_give_back", given)
    _, record = run(kind)
    summary = record.summary
    first, read, hit = (
        int(summary[name]) for name in ("first_faults", "pgmajfault", "swap_cache_hits")
    )
    assert mapped <= first + read + hit <= mapped + given_back + 3, "three vCPUs may be about to"
    assert read - 3 <= int(summary["workingset_refault"]) <= read
    assert read > 100


def test_without_reuse_eviction_follows_the_faults() -> None:
    """An idle guest's pages are taken in the order in which they came, whoever takes them."""
    idle = {"pattern": "phases", "phases": [{"pattern": "uniform", "touches": 1, "think": 10**12}]}
    made = world(
        guests={
            "idle": {"memory": 4 * MIB, "mapped": True, "access": idle},
            "vm0": {"memory": 4 * MIB, "access": {"pattern": "populate", "write": True}},
        },
        host={"memory": {"size": 6 * MIB, "min_free": 64 * 4096}, "swap": {"kind": "zram"}},
        duration=60 * MS,
    )
    assert made.pgdat is not None
    lruvec = made.pgdat.generations[0]
    order: list[int] = []
    scan = lruvec.scan

    def noted(of_type: int, tier: int = 3, most: int = 4096) -> tuple[Any, int]:
        ids, examined = scan(of_type, tier, most)
        order.extend(ids.tolist())
        return ids, examined

    lruvec.scan = noted  # type: ignore[method-assign]
    made.run()
    assert len(order) > 256
    assert order == list(range(len(order)))
