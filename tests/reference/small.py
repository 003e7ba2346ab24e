"""Small scenarios for both models, drawn from a number, with machines of odd costs."""

from __future__ import annotations

from random import Random
from typing import Any

from worlds import MS, US, scenario

from simkvm.scenario.schema import Scenario
from simkvm.units import GIB, KIB, MIB

#: Page size, leaf size, and how many leaves a guest may have.
SHAPES = [
    *2 * [(4 * KIB, 4 * KIB, (16, 64, 130, 300, 513, 700))],
    (16 * KIB, 16 * KIB, (64, 300, 2100)),
    (64 * KIB, 64 * KIB, (100, 300)),
    (4 * KIB, 2 * MIB, (3, 16)),
    (16 * KIB, 32 * MIB, (3, 9)),
    (4 * KIB, GIB, (2, 5)),
]
#: Costs that differ from machine to machine here: parameter, least, most.
COSTS = [
    ("page_touch_ns", 1, 50),
    ("atomic_contended_service_ns", 20, 200),
    ("atomic_uncontended_ns", 1, 20),
    ("lock_handoff_ns", 20, 300),
    ("c2c_same_ns", 20, 150),
    ("fault_hold_ns", 100, 900),
    ("host_ptl_hold_ns", 10, 300),
    ("range_bookkeeping_ns", 50, 900),
    ("age_walk_ns", 5, 200),
    ("tlb_miss_nested_warm_ns", 0, 40),
]


def drawn(number: int) -> Scenario:
    """The scenario of ``number``."""
    dice, more = Random(number), Random(number + 1)
    guests, sizes = {}, {}
    for name in ["vm0"] if dice.random() < 0.75 else ["vm0", "vm1"]:
        guests[name], *sizes[name] = guest(dice)
    others = {
        f"c{n}": contender(dice, *dice.choice([*sizes.items()]))
        for n in range(dice.choice([0, 0, 1, 1, 2]))
    }
    pace = {
        "interval": dice.choice([0, 0, 7 * US, 150 * US]),
        "start": dice.choice([0, 11 * US, 100 * US]),
        "passes": dice.choice([1, 3, 5]),
        "method": more.choice(["lru_gen", "lru_gen", "page_idle", "folio_referenced"]),
    }
    costs = {"tlb_l2_entries": dice.choice([4, 16, 100, 1280])}
    costs |= {name: dice.randint(low, high) for name, low, high in COSTS if dice.random() < 0.5}
    costs["hw_af"] = more.random() < 0.6
    seed = dice.randrange(1000)
    base = dice.choice(["ampere-altra-80c", "graviton3-64c"])
    chosen = policies(dice, base == "graviton3-64c") | ageing_policies(more)
    return scenario(
        seed=seed,
        expect="unsafe",  # or not: the models agree on what happens, not on what is wrong with it
        machine={"base": base, "set": costs},
        kernel={"base": "linux-6.12", "set": chosen},
        host={"hz": 1000, "preemption": dice.choice(["none", "full"]), "cpus": 16},
        guests=guests,
        ageing=pace if dice.random() < 0.7 else None,
        contenders=others,
        duration=dice.randrange(200 * US, 2 * MS),
    )


def policies(dice: Random, deferral: bool) -> dict[str, str]:
    """A kernel, safe or not; ``deferral``: whether the machine can leave leaves' flushes."""
    call = dice.choice(["blind", "per_pte", "per_pte", "per_folio", "bitmap"])
    drawn = {
        "fault_lock": dice.choice(["read", "read", "write"]),
        "table_free": dice.choice(["inline", "inline", "inline", "put_page_rcu"]),
        "ageing_call": call,
        "ageing_lock": "none"
        if call == "bitmap"
        else dice.choice(["write", "write", "read", "none"]),
        "unmap_tlbi": dice.choice(["per_leaf", "deferred"]),
        "lock_break": dice.choice(["build", "runtime"]),
        "promotion": dice.choice(["direct", "two_step"]),
    }
    if not deferral and drawn["unmap_tlbi"] == "deferred":
        del drawn["unmap_tlbi"]  # what the kernel has falls back
    return drawn


def ageing_policies(dice: Random) -> dict[str, str]:
    """How that kernel handles the accessed flag."""
    return {
        "access_fault_lock": dice.choice(["read", "read", "write"]),
        "eviction_young": dice.choice(["clear_flush_young", "look_around"]),
        "ageing_flush": dice.choice(["none", "none", "per_call"]),
    }


def guest(dice: Random) -> tuple[dict[str, Any], int, int]:
    """A guest, its leaves and their size."""
    page, leaf, counts = dice.choice(SHAPES)
    vcpus = dice.choice([1, 2, 3, 4, 6])
    folio = leaf if leaf > page else page * dice.choice([1, 1, 4, 16])
    leaves = max(1, dice.choice(counts) * leaf // folio) * folio // leaf
    pages = leaves * (leaf // page)
    made = {
        "vcpus": vcpus,
        "memory": leaves * leaf,
        "page_size": page,
        "mapping": leaf,
        "folio": folio,
        "access": access(dice, pages, vcpus),
        "ipa_bits": dice.choice([36, 40, 40, 48]),
        "ipa_base": dice.choice([GIB, 4 * GIB]) if page == 4 * KIB else GIB,
    }
    return made, leaves, leaf


def access(dice: Random, pages: int, vcpus: int, within: bool = False) -> dict[str, Any]:
    """What the vCPUs do; not too much of it."""
    kinds = ["uniform", "uniform"]
    if pages // vcpus < 2500:
        kinds += ["populate", "populate"]
    if pages < 100_000:
        kinds += ["zipf", "hot_cold"]
    kind = dice.choice(kinds if within else [*kinds, "phases"])
    if kind == "phases":
        return {
            "pattern": kind,
            "phases": [access(dice, pages, vcpus, within=True) for _ in range(2)],
        }
    think = dice.choice([0, 3, 40, 250, 1500])
    if kind == "populate":
        rounds = max(1, min(dice.choice([1, 2, 5, 20]), 1500 // max(1, pages // vcpus)))
        return {"pattern": kind, "write": dice.random() < 0.7, "repeat": rounds, "think": think}
    return {
        "pattern": kind,
        "touches": dice.choice([30, 200, 600]),
        "write_ratio": dice.choice([0.0, 0.3, 0.5, 1.0]),
        "think": think,
    }


def contender(dice: Random, name: str, size: list[int]) -> dict[str, Any]:
    """A thread that takes memory of ``name`` back; ``size``: its leaves and their size."""
    leaves, leaf = size
    length = min(leaves, dice.choice([1, 1, 2, 7, max(1, leaves // 3), leaves]))
    return {
        "kind": "madvise_dontneed",
        "guest": name,
        "range": length * leaf,
        "align": leaf if dice.random() < 0.3 else None,
        "rate": dice.choice([2e3, 1e4, 5e4, 2e5]),
        "order": dice.choice(["random", "sequential"]),
        "arrivals": dice.choice(["periodic", "poisson"]),
        "start": dice.choice([0, 20 * US, 133 * US]),
        "stop": dice.choice([None, MS]),
    }
