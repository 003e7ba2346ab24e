"""Do the rules hold for several guests on one host, in one memcg, under one contender?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from worlds import MS, after_every_event, journal, scenario, world

from invariants import rules
from simkvm.kernel.mglru import MAX_NR_GENS, MIN_NR_GENS
from simkvm.units import MIB


def shared(kernel: str, **keys: Any) -> Any:
    access = {"pattern": "uniform", "think": 2000, "write_ratio": 0.8}
    return scenario(
        kernel=kernel,
        guests={
            "pod": {
                **{"count": 4, "vcpus": 2, "memory": 2 * MIB, "memslots": 4, "memcg": "pods"},
                "access": access,
            },
            "vm": {"memory": 2 * MIB, "access": access},
        },
        ageing={"interval": MS // 2},
        contenders={
            "vmm": {
                **{"kind": "madvise_dontneed", "guest": "pod", "range": MIB},
                **{"rate": 8000.0, "arrivals": "poisson"},
            }
        },
        duration=6 * MS,
        **keys,
    )


@pytest.mark.parametrize("kernel", ["linux-6.12", "linux-7.1-read-locked", "linux-6.4-yuzhao-v2"])
@pytest.mark.parametrize("ties", ["fifo", "shuffle"])
def test_every_rule_holds_for_each_guest_and_for_the_memcg_as_a_whole(
    kernel: str, ties: str
) -> None:
    with journal() as notes:
        made = world(shared(kernel, ties=ties))
        pods, seen = made.kvms[:4], -1
        lruvec = pods[0].host.lru.lruvec

        def check() -> None:
            nonlocal seen
            for kvm in made.kvms:
                rules.notifier_counts(kvm, notes)
            if notes.changes == seen:
                return
            seen = notes.changes
            for kvm in made.kvms:
                rules.counts_are_entries(kvm.stage2)
                rules.nothing_maps_what_the_host_took(kvm)
                rules.host_counts_its_entries(kvm)
                rules.generations_hold(kvm)
            assert MIN_NR_GENS <= lruvec.max_seq - lruvec.min_seq + 1 <= MAX_NR_GENS
            assert sum(lruvec.sizes) == sum(kvm.host.lru.total for kvm in pods)

        after_every_event(made, check)
        record = made.run()
    assert record.violations == []
    assert made.kvms[4].host.lru.lruvec is not lruvec
    assert made.ageing is not None
    walks = [p.guest for p in made.ageing.passes]
    whole = ["pod0", "pod1", "pod2", "pod3", "vm"]
    assert walks == (whole * len(walks))[: len(walks)], "every mm of every memcg, each time"
    opened = sum(guest == "pod3" for guest in walks)
    assert lruvec.max_seq - (MAX_NR_GENS - 1) == opened, "one generation a command"
    calls = [contender.calls for contender in made.contenders]
    assert min(calls) > 0
    assert np.all([a.end_ns <= b.start_ns for a, b in pairwise(made.ageing.passes)])
