"""Pages that somebody gives up while they are being evicted (mm/vmscan.c, shrink_folio_list())."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
from pressed import Pressed
from simpy import Event

from simkvm.kernel.host_memory import OWN
from simkvm.kernel.swappable import CACHED, SLOT

LEAF = 9
STEPS = 40


def evict(bench: Pressed, began_ns: int, outcomes: list[str]) -> Generator[Event, None, None]:
    """Isolate one folio, and look at it from ``began_ns`` on."""
    bench.lruvec._isolate(np.array([LEAF]))
    yield bench.world.env.timeout(began_ns)
    outcome, _ = yield from bench.reclaimer._shrink_folio(bench.kvms[0], LEAF, began_ns)
    outcomes.append(outcome)


def given_up_after(kind: str, after_ns: int) -> tuple[Pressed, str]:
    """A page is given up so long after its eviction began: the host, and what became of it."""
    bench = Pressed(swap=kind)
    outcomes: list[str] = []
    bench.world.env.process(evict(bench, 1000, outcomes))
    timer = bench.world.env.timeout(1000 + after_ns)
    assert timer.callbacks is not None
    timer.callbacks.append(lambda _: bench.host.zap(LEAF, LEAF + 1))
    bench.world.env.timeout(1_000_000)
    bench.world.env.run(1_000_000)
    return bench, outcomes[0]


@pytest.mark.parametrize(("kind", "span_ns"), [("optane", 6_000), ("zram", 20_000)])
def test_a_page_may_be_given_up_at_any_moment_of_its_eviction(kind: str, span_ns: int) -> None:
    seen = set()
    before = Pressed(swap=kind)
    for after_ns in range(0, span_ns, span_ns // STEPS):
        bench, outcome = given_up_after(kind, after_ns)
        seen.add(outcome)
        host, swap = bench.host, bench.pgdat.swap
        assert swap is not None
        assert not host.fast[LEAF] & OWN
        assert host.swap[LEAF] == 0
        assert swap.used == 0
        assert not host.writing
        assert not host.folio_locked(LEAF)
        assert bench.pgdat.pages.free == before.pgdat.pages.free + 1
        assert host.page_count == before.host.page_count - 1
    assert {"gone", "freed" if kind == "zram" else "writeback"} <= seen


def test_an_eviction_that_nobody_disturbs() -> None:
    bench = Pressed(swap="zram")
    outcomes: list[str] = []
    bench.world.env.process(evict(bench, 1000, outcomes))
    bench.world.env.run(1_000_000)
    assert outcomes == ["freed"]
    assert bench.host.swap[LEAF] & (SLOT | CACHED) == SLOT
