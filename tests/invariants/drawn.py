"""Small scenarios, drawn: hosts, kernels, guests and contenders in combinations nobody chose.

Each is drawn from a number, so that neighbours have nothing in common: one that hypothesis
composed itself would mostly differ from the one before in a single detail.
"""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import strategies as st
from worlds import KIB, MIB, MS, US, scenario

from simkvm.scenario.kernel import POLICIES, kernel_names, load_kernel
from simkvm.scenario.schema import Scenario

KERNELS = [name for name in kernel_names() if load_kernel(name).arch == "arm64"]
DEFERRED = [value for value in POLICIES["table_free"] if value != "inline"]
DURATION = 8 * MS

#: Page size, leaf size and memory that give a few tables and at most some thousand leaves.
SHAPES = [
    *((4 * KIB, 4 * KIB, pages * 4 * KIB) for pages in (37, 511, 513, 1024, 1300, 1536)),
    *((16 * KIB, 16 * KIB, pages * 16 * KIB) for pages in (1000, 2049, 4100)),
    (64 * KIB, 64 * KIB, 900 * 64 * KIB),
    (4 * KIB, 2 * MIB, 96 * MIB),
    (16 * KIB, 32 * MIB, 512 * MIB),
]


def scenarios(safe: bool = True, teardown: bool | None = None) -> st.SearchStrategy[Scenario]:
    """One guest and whatever disturbs it for some milliseconds; ``teardown``: with its end."""
    return st.integers(0, 2**32).map(lambda number: drawn(Random(number), safe, teardown))


def drawn(dice: Random, safe: bool, teardown: bool | None) -> Scenario:
    """The scenario that ``dice`` gives."""
    page, leaf, memory = dice.choice(SHAPES)
    folio = leaf if leaf > page else page * dice.choice([1, 1, 4, 16])
    memory = max(folio, memory - memory % folio)
    if teardown is None:
        teardown = dice.random() < 0.4
    end = {"order": dice.choice(["process_exit", "close_vm"]), "at": dice.randrange(DURATION)}
    pace = {"interval": dice.choice([0, 0, 300 * US]), "start": dice.randrange(MS)}
    more = Random(pace["start"])  # one of its own, so that the other draws do not shift
    pace["method"] = more.choice(["lru_gen", "lru_gen", "page_idle", "folio_referenced"])
    flags = {"hw_af": more.random() < 0.7}
    vcpus, takers = dice.randint(1, 4), dice.choice([0, 1, 1, 2])
    return scenario(
        seed=dice.randrange(100),
        machine={"base": dice.choice(["ampere-altra-80c", "graviton3-64c"]), "set": flags},
        kernel=kernel(dice, safe),
        host={
            "cpus": vcpus + 1 + takers + dice.choice([0, 3]),
            "hz": dice.choice([250, 1000, 1000]),
            "preemption": dice.choice(["none", "full"]),
            "nohz_full": dice.choice(["none", "none", "vcpus"]),
        },
        duration=DURATION,
        guest={
            "vcpus": vcpus,
            "memory": memory,
            "page_size": page,
            "mapping": leaf,
            "folio": folio,
            "access": access(dice),
            "teardown": end if teardown else None,
        },
        ageing=pace if dice.random() < 0.8 else None,
        contenders={f"c{number}": contender(dice, memory, page, leaf) for number in range(takers)},
        ties=dice.choice(["fifo", "fifo", "shuffle"]),
    )


def kernel(dice: Random, safe: bool) -> dict[str, Any]:
    """A shipped kernel with some policies changed; if not ``safe``, lock-free and freed at once."""
    base = dice.choice(KERNELS)
    changes = {
        policy: dice.choice([*values]) for policy, values in POLICIES.items() if dice.random() < 0.3
    }
    made = load_kernel({"base": base, "set": changes})
    if made["ageing_call"] == "bitmap" or not safe:
        changes["ageing_lock"] = "none"  # windows take no lock
    lock_free = changes.get("ageing_lock", made["ageing_lock"]) == "none"
    if safe and lock_free:
        changes["root_free"] = "after_unregister"
        if made["table_free"] == "inline":
            changes["table_free"] = dice.choice(DEFERRED)
    if not safe:
        changes |= {"root_free": "in_release", "table_free": "inline"}
        if made["ageing_call"] == "blind":
            changes["ageing_call"] = "per_pte"
    return {"base": base, "set": changes}


def access(dice: Random) -> dict[str, Any]:
    """What vCPUs do, with pauses that keep the number of events small."""
    think = dice.choice([200, 500, 2 * US])
    if dice.random() < 0.3:
        repeat, write = dice.choice([3, 50, 1000]), dice.random() < 0.7
        return {"pattern": "populate", "repeat": repeat, "write": write, "think": think}
    pattern = dice.choice(["uniform", "uniform", "zipf", "hot_cold"])
    return {"pattern": pattern, "write_ratio": dice.choice([0.0, 0.5, 1.0]), "think": think}


def contender(dice: Random, memory: int, page: int, leaf: int) -> dict[str, Any]:
    """One that takes memory back, often."""
    size = min(memory, leaf * dice.choice([1, 7, 64, 512, 512, 600]))
    common = {"guest": "vm0", "start": dice.randrange(2 * MS)}
    kind = dice.choice(["madvise_dontneed", "madvise_dontneed", "free_page_reporting", "balloon"])
    if kind == "madvise_dontneed":
        return common | {
            "kind": kind,
            "range": size,
            "align": min(size, page * dice.choice([1, 3, 512])),
            "rate": dice.choice([500.0, 3000.0]),
            "order": dice.choice(["random", "sequential"]),
            "arrivals": dice.choice(["periodic", "poisson"]),
        }
    if kind == "balloon":
        merge = dice.random() < 0.5
        return common | {"kind": kind, "target": size, "rate": 1e5, "batch": 64, "merge": merge}
    return common | {
        "kind": kind,
        "block": page * dice.choice([n for n in (1, 64, 512, 512) if n * page <= memory]),
        "delay": dice.choice([300 * US, 2 * MS]),
        "idle": dice.choice([0, 500 * US]),
        "batch": 2,
    }
