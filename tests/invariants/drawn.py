"""Small scenarios, drawn: hosts, kernels, guests and contenders in combinations nobody chose.

Each is drawn from a number, so that neighbours have nothing in common: one that hypothesis
composed itself would mostly differ from the one before in a single detail.
"""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import strategies as st
from worlds import MS, US, scenario

from simkvm.scenario.kernel import POLICIES, kernel_names, load_kernel
from simkvm.scenario.possible import NEEDS, ONLY
from simkvm.scenario.schema import Scenario
from simkvm.units import KIB, MIB

KERNELS = {
    arch: [name for name in kernel_names() if load_kernel(name).arch == arch]
    for arch in ("arm64", "x86")
}
MACHINES = {"arm64": ["ampere-altra-80c", "graviton3-64c"], "x86": ["x86-icelake-64c"]}
DEFERRED = [value for value in POLICIES["table_free"] if value != "inline"]
DURATION = 8 * MS
#: What a policy may be set to: as some arm64 kernel has it, or what the model can do besides.

#: Page size, leaf size and memory that give a few tables and at most some thousand leaves.
SHAPES = [
    *((4 * KIB, 4 * KIB, pages * 4 * KIB) for pages in (37, 511, 513, 1024, 1300, 1536)),
    *((16 * KIB, 16 * KIB, pages * 16 * KIB) for pages in (1000, 2049, 4100)),
    (64 * KIB, 64 * KIB, 900 * 64 * KIB),
    (4 * KIB, 2 * MIB, 96 * MIB),
    (16 * KIB, 32 * MIB, 512 * MIB),
]


#: The same for guests whose leaves differ in size.
SIZED = [
    *((4 * KIB, 4 * KIB, pages * 4 * KIB) for pages in (513, 1300, 2048)),
    *((4 * KIB, 2 * MIB, blocks * 2 * MIB) for blocks in (1, 3, 4, 9)),
    (4 * KIB, 1024 * MIB, 1024 * MIB),
    (16 * KIB, 16 * KIB, 5000 * 16 * KIB),
    (16 * KIB, 32 * MIB, 96 * MIB),
]


def scenarios(
    safe: bool = True,
    teardown: bool | None = None,
    takers: bool = False,
    sized: bool = False,
    arch: str = "arm64",
) -> st.SearchStrategy[Scenario]:
    """One guest and whatever disturbs it for some milliseconds; ``teardown``: with its end.

    ``takers``: what disturbs it does more than drop memory; ``sized``: its leaves have two sizes,
    or it has a dirty log.
    """
    numbers = st.integers(0, 2**32)
    return numbers.map(lambda number: drawn(Random(number), safe, teardown, takers, sized, arch))


def drawn(
    dice: Random,
    safe: bool,
    teardown: bool | None,
    takers: bool = False,
    sized: bool = False,
    arch: str = "arm64",
) -> Scenario:
    """The scenario that ``dice`` gives."""
    disturb = taker if takers else contender
    shapes = SIZED if sized else SHAPES
    page, leaf, memory = dice.choice([s for s in shapes if arch == "arm64" or s[0] == 4 * KIB])
    folio = leaf if leaf > page else page * dice.choice([1, 1, 4, 16])
    memory = max(folio, memory - memory % folio)
    if teardown is None:
        teardown = dice.random() < 0.4
    end = {"order": dice.choice(["process_exit", "close_vm"]), "at": dice.randrange(DURATION)}
    pace = {"interval": dice.choice([0, 0, 300 * US]), "start": dice.randrange(MS)}
    more = Random(pace["start"])  # one of its own, so that the other draws do not shift
    pace["method"] = more.choice(["lru_gen", "lru_gen", "page_idle", "folio_referenced"])
    flags = {"hw_af": more.random() < 0.7}
    slots = more.choice([1, 1, 1, 2, 4])
    slots = slots if memory % (slots * max(leaf, page)) == 0 else 1
    mapped = more.random() < 0.15
    vcpus, disturbers = dice.randint(1, 4), dice.choice([0, 1, 1, 2]) + takers
    variant = kernel(dice, safe, arch)
    others = resizers(dice, page, leaf, load_kernel(variant)["eager_split"]) if sized else {}
    return scenario(
        seed=dice.randrange(100),
        expect="safe" if safe else "unsafe",
        machine={"base": dice.choice(MACHINES[arch]), "set": flags},
        kernel=variant,
        host={
            "cpus": vcpus + 1 + disturbers + len(others) + dice.choice([0, 3]),
            "hz": dice.choice([250, 1000, 1000]),
            "preemption": dice.choice(["none", "full"]),
            "nohz_full": dice.choice(["none", "none", "vcpus"]),
            "rcu": rcu(dice),
        },
        duration=DURATION,
        guest={
            "vcpus": vcpus,
            "memory": memory,
            "page_size": page,
            "mapping": leaf,
            "folio": folio,
            "access": access(dice),
            "memslots": slots,
            "mapped": mapped,
            "teardown": end if teardown else None,
        },
        ageing=pace if dice.random() < 0.8 else None,
        contenders={f"c{n}": disturb(dice, memory, page, leaf) for n in range(disturbers)} | others,
        ties=dice.choice(["fifo", "fifo", "shuffle"]),
    )


def rcu(dice: Random) -> dict[str, Any]:
    """Offloaded callbacks or not; lazy ones outlast the run."""
    nocbs = dice.choice(["none", "none", "vcpus", "all"])
    lazy = nocbs != "none" and dice.random() < 0.3
    return {"nocbs": nocbs, "lazy": lazy, "preemptible": dice.choice([None, True])}


def resizers(dice: Random, page: int, leaf: int, split: str) -> dict[str, Any]:
    """Who logs writes, splits huge pages or makes some."""
    made: dict[str, Any] = {}
    common = {"guest": "vm0", "start": dice.randrange(2 * MS)}
    huge = leaf if leaf > page else page * (page // 8)
    manual = dice.random() < 0.7
    if dice.random() < 0.7:
        made["log"] = common | {
            "kind": "dirty_log",
            "interval": dice.choice([0, 300 * US, MS]),
            "rounds": dice.choice([None, 1, 2, 4]),
            "manual_protect": manual,
            "initially_set": manual and dice.random() < 0.4,
            "clear_chunk": dice.choice([None, 64 * page, 512 * page]) if manual else None,
            "eager_split_chunk": huge if split == "chunked" and dice.random() < 0.4 else None,
        }
    if huge < 1024 * MIB and (not made or dice.random() < 0.5):
        made["thp"] = common | {
            "kind": "khugepaged",
            "pages_to_scan": 4096,
            "scan_sleep": dice.choice([200 * US, MS]),
            "max_ptes_none": dice.choice([0, 100, 511]),
        }
    if huge < 1024 * MIB and (leaf > page or "thp" in made) and dice.random() < 0.5:
        made["split"] = common | {
            "kind": "thp_split",
            "rate": dice.choice([500.0, 3000.0]),
            "order": dice.choice(["random", "sequential"]),
        }
    return made or resizers(dice, page, leaf, split)


def kernel(dice: Random, safe: bool, arch: str) -> dict[str, Any]:
    """A shipped kernel with some policies changed; if not ``safe``, lock-free and freed at once."""
    base = dice.choice(KERNELS[arch])
    drawn = {
        policy: dice.choice([*values]) for policy, values in POLICIES.items() if dice.random() < 0.3
    }
    changes = {policy: value for policy, value in drawn.items() if may_have(arch, policy, value)}
    if arch == "x86":
        return {"base": base, "set": changes}
    made = load_kernel({"base": base, "set": changes})
    if made["ageing_call"] == "bitmap" or not safe:
        changes["ageing_lock"] = "none"  # windows take no lock
    lock_free = changes.get("ageing_lock", made["ageing_lock"]) == "none"
    if safe and lock_free:
        changes["root_free"] = "after_unregister"
        changes["collapse_free"] = "subtree"
        if made["table_free"] == "inline":
            changes["table_free"] = dice.choice(DEFERRED)
    if not safe:
        changes |= {"root_free": "in_release", "table_free": "inline", "unmap_tables": "free"}
        if made["ageing_call"] == "blind":
            changes["ageing_call"] = "per_pte"
    return {"base": base, "set": changes}


def may_have(arch: str, policy: str, value: str) -> bool:
    """Whether a kernel of ``arch`` may change that, on any machine and with anything else.

    On x86 the locks of ageing and faults hang together with the MMU: there they stay as they are.
    """
    if arch == "x86" and policy in ("mmu", "fault_lock", "ageing_lock", "ageing_call"):
        return False
    if arch == "x86" and (policy, value) in [("table_free", "inline"), ("collapse_free", "inline")]:
        return False
    return (policy, value) not in NEEDS and ONLY.get((policy, value), (arch, ""))[0] == arch


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


def taker(dice: Random, memory: int, page: int, leaf: int) -> dict[str, Any]:
    """One that changes host pages in another way, or the memory slot, or maps ahead."""
    part = min(memory, leaf * dice.choice([1, 7, 64, 600]))
    kinds: list[dict[str, Any]] = [
        {"kind": "migration", "range": part, "batch": dice.choice([1, 64, 512]), "interval": MS},
        {
            "kind": "compaction",
            "pages": min(dice.choice([5, 70]), memory // page),
            "interval": 500 * US,
        },
        {"kind": "numa_balancing", "scan_size": part, "period": 300 * US, "delay": 0},
        {"kind": "mprotect", "range": part, "read_only": 200 * US, "writable": 400 * US},
        {"kind": "fork", "child": dice.choice([0, 300 * US]), "interval": MS},
        {"kind": "memslot", "operation": dice.choice(["delete", "move"]), "interval": MS},
        {"kind": "memslot", "pause": 300 * US},
        {"kind": "pre_fault", "populated": dice.random() < 0.5, "call": dice.choice([None, part])},
    ]
    if leaf == page:
        kinds += 3 * [
            {
                "kind": "ksm",
                "sleep": 50 * US,
                "duplicates": dice.choice([0.1, 0.9]),
                "copies": dice.choice([2, 30]),
                "smart_scan": dice.random() < 0.5,
            }
        ]
    if dice.random() < 0.15:
        kinds = [{"kind": "oom_reaper", "delay": dice.choice([0, MS])}]
    if dice.random() < 0.25:
        return contender(dice, memory, page, leaf)
    return {"guest": "vm0", "start": dice.randrange(2 * MS), **dice.choice(kinds)}
