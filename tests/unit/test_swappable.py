"""Pages and slots of guests that are mapped from the start, and of ranges that are given up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import worlds

from simkvm.kernel.fault import CACHE_CAPACITY
from simkvm.kernel.host_memory import OWN, YOUNG
from simkvm.kernel.stage2 import AF, VALID
from simkvm.kernel.swappable import CACHED, DIRTY, SLOT, WRITEBACK, SwappableMemory
from simkvm.kernel.world import World
from simkvm.units import MIB


def world(swap: dict[str, Any], guests: int, size: int = 8 * MIB) -> World:
    """Guests of 6 MiB each, mapped from the start."""
    guest = {"memory": 6 * MIB, "vcpus": 2, "mapped": True, "access": {"pattern": "populate"}}
    return worlds.world(
        host={"memory": {"size": size}, "swap": swap},
        guests={f"vm{number}": guest for number in range(guests)},
    )


def hosts(made: World) -> list[SwappableMemory]:
    found = [kvm.host for kvm in made.kvms]
    assert all(isinstance(host, SwappableMemory) for host in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("guests", [1, 2, 3])
@pytest.mark.parametrize(
    "swap", [{"kind": "optane"}, {"kind": "zram", "ratio": 0.1}, {"kind": "zram", "ratio": 0.5}]
)
def test_what_has_no_room_above_the_high_mark_is_in_swap(swap: dict[str, Any], guests: int) -> None:
    """Tables and memory caches of all guests come first, and a compressed pool takes its part."""
    size = 8 * MIB if swap["kind"] == "optane" or guests < 3 else 14 * MIB
    made = world(swap, guests, size)
    assert made.pgdat is not None
    pages, device = made.pgdat.pages, made.pgdat.swap
    assert device is not None
    out = sum(int(np.count_nonzero(host.swap == SLOT)) for host in hosts(made))
    fits = size // 4096 - guests * (1536 + 2 * CACHE_CAPACITY + 3 + 4 + 2) - pages.marks.high
    assert device.used == out
    assert pages.spoken_for == 0
    if fits >= 0:
        assert out == 0
    else:
        assert 0 <= pages.free - pages.marks.high <= guests  # roundings
        shares = [int(np.count_nonzero(host.swap == SLOT)) for host in hosts(made)]
        assert max(shares) - min(shares) <= guests
    held = sum(host.page_count + host.table_pages for host in hosts(made))
    held += sum(kvm.tables_allocated + kvm.stage2.geometry.root_pages for kvm in made.kvms)
    held += guests * 2 * CACHE_CAPACITY
    assert pages.total - pages.free == held + device.pool_pages


def test_the_lowest_addresses_are_out_and_nothing_is_young() -> None:
    made = world({"kind": "optane"}, 2)
    second = hosts(made)[1]
    runs = second.swapped_out()
    assert [first for first, _ in runs] == [0]
    out = runs[0][1]
    assert 0 < out < 1536
    entries = made.kvms[1].stage2.leaf.entries
    assert not (entries[:out] & VALID).any()
    assert (entries[out:1536] & (VALID | AF) == VALID).all()
    assert not (second.state & YOUNG).any()
    assert (
        second.present == np.add.reduceat(second.state & OWN, [0, 512, 1024]).tolist()
        or sum(second.present) == 1536 - out
    )


def test_a_range_that_is_given_up_takes_all_its_places_along() -> None:
    """A mapped page, one in the swap cache, one mapped from it, one in swap alone, and none."""
    made = worlds.world(
        host={"memory": {"size": 16 * MIB}, "swap": {"kind": "optane"}},
        guest={"memory": 4 * MIB, "access": {"pattern": "populate"}},
    )
    host = hosts(made)[0]
    device, pages = host.device, host.pages
    assert device is not None
    for leaf in (0, 2):
        host.install(leaf, own=True)
    for leaf, state in ((1, SLOT | CACHED | DIRTY), (2, SLOT | CACHED | WRITEBACK), (3, SLOT)):
        host.swap[leaf] = state
    host.lru.add(1)
    host.writing[2] = object()
    device.allocate(3)
    pages.take(3)
    free = pages.free
    host.zap(0, 5)
    assert pages.free == free + 3
    assert device.used == 0
    assert not host.state.any()
    assert not host.swap.any()
    assert not host.writing  # the end of the write is nobody's business any more
    assert host.present[0] == 0
    host.zap(0, 5)
    assert pages.free == free + 3
