"""Small worlds whose vCPUs work off jobs: given by hand, or of each workload."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from worlds import MS, US, world

from simkvm.guest import workloads
from simkvm.guest.jobs import Jobs, Seat, Stage
from simkvm.kernel.world import World
from simkvm.scenario.machine import load_machine
from simkvm.scenario.workloads import Memcached
from simkvm.units import MIB

MACHINE = load_machine("ampere-altra-80c")
WAKEUP_NS = round(MACHINE["wakeup_ns"])
REFILL_NS = round(MACHINE["tlb_miss_nested_warm_ns"])
FOUR_KIB = 4096

SERVER: dict[str, Any] = {
    "pattern": "memcached",
    "clients": 13,
    "keys": 20_000,
    "value_size": 900,
    "service": 9 * US,
    "network": 30 * US,
    "think": 20 * US,
    "think_law": "exponential",
    "get_ratio": 0.7,
    "keys_drawn": "zipf",
}
PROGRAMS: dict[str, dict[str, Any]] = {
    "memcached": SERVER,
    "sort": {"pattern": "sort", "data": 8 * MIB, "block": 65536, "page_cpu": 3 * US},
    "chase": {"pattern": "chase", "span": "guest"},
    "interactive": {
        "pattern": "interactive",
        "tabs": 4,
        "tab_size": 4 * MIB,
        "pause": MS,
        "burst_cpu": 200 * US,
    },
}


def jobs(*each: tuple[list[int], int, int], step: int = US) -> Jobs:
    """Jobs of (pages, CPU time, gap), each touching its pages, for write, from its start on."""
    counts = [len(pages) for pages, _, _ in each]
    pages = [page for pages, _, _ in each for page in pages]
    return Jobs(
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        pages=np.array(pages, np.int64),
        writes=np.ones(len(pages), np.bool_),
        at_ns=np.concatenate([np.arange(count) * step for count in counts]).astype(np.int64),
        total_ns=np.array([total for _, total, _ in each], np.int64),
        gap_ns=np.array([gap for _, _, gap in each], np.int64),
        work=np.ones(len(each), np.int64),
        last=True,
    )


def given(
    patch: pytest.MonkeyPatch,
    *stages: list[Stage],
    warmup: int = 0,
    host: dict[str, Any] | None = None,
    **guest: Any,
) -> World:
    """A world in which vCPU n goes through the n-th list of stages."""

    class Given:
        def __init__(self, _: Memcached, seat: Seat) -> None:
            self.vcpu = seat.vcpu

        def stages(self) -> Iterator[Stage]:
            return iter(stages[self.vcpu])

    patch.setitem(workloads.PROGRAMS, "memcached", Given)
    access = {"pattern": "memcached", "keys": 10, "requests": 1, "warmup": warmup}
    keys = {"vcpus": len(stages), "memory": 8 * MIB, "mapped": True, "access": access, **guest}
    return world(guest=keys, host=host or {})


def seat(
    vcpu: int, vcpus: int, pages: int, rng: np.random.Generator, layout: np.random.Generator
) -> Seat:
    """A place in a guest of pages of 4 KiB that has all its memory."""
    touch_ns = round(MACHINE["page_touch_ns"])
    return Seat(vcpu, vcpus, pages, FOUR_KIB, rng, layout, touch_ns, MACHINE, mapped=True)


def unmap(made: World, *pages: int) -> None:
    """Have nothing mapped at ``pages`` when the run begins."""
    kvm = made.kvms[0]
    for page in pages:
        kvm.host.zap(page, page + 1)
        kvm.stage2.leaf.entries[page] = 0


def answered(made: World, vcpu: int = 0) -> list[tuple[int, int]]:
    """(end, latency) of all requests of a vCPU, in order."""
    found: list[tuple[int, int]] = []
    answers = made.kvms[0].vcpus[vcpu].answers
    assert answers is not None
    add = answers.add

    def noted(ends_ns: list[int], latencies_ns: list[int]) -> None:
        found.extend(zip(ends_ns, latencies_ns, strict=True))
        add(ends_ns, latencies_ns)

    answers.add = noted  # type: ignore[method-assign,assignment]
    made.run()
    return found
