"""Did a change of the code change what runs do? Each fingerprint covers every event of a run.

After a change that is meant to change results: ``python -m pytest tests/golden --update-golden``,
then look at what the diff says of the summaries.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import worlds

from golden.stored import as_they_were
from simkvm.scenario.load import load
from simkvm.units import MIB

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("fingerprints.json")
MS = 1_000_000
DONTNEED = {"kind": "madvise_dontneed", "guest": "vm0", "range": 2 * MIB, "rate": 2000.0}
ZIPF = {"pattern": "zipf", "think": 200, "write_ratio": 0.7}

CASES: dict[str, dict[str, Any]] = {
    "populate, write lock": {
        "guest": {"vcpus": 4, "memory": 8 * MIB, "access": {"pattern": "populate"}},
        "ageing": {},
    },
    "populate, read lock": {
        "guest": {"vcpus": 4, "memory": 8 * MIB, "access": {"pattern": "populate"}},
        "kernel": "linux-7.1-read-locked",
        "ageing": {},
    },
    "populate, no lock, granule of 16 KiB": {
        "guest": {
            "vcpus": 4,
            "memory": 32 * MIB,
            "page_size": 16384,
            "access": {"pattern": "populate"},
        },
        "kernel": "linux-7.1-lockless",
        "ageing": {},
    },
    "windows and frees by RCU": {
        "guest": {"vcpus": 2, "memory": 16 * MIB, "access": ZIPF},
        "kernel": "linux-6.4-yuzhao-v2",
        "ageing": {"interval": MS},
        "contenders": {"vmm": DONTNEED},
        "duration": 30 * MS,
    },
    "free_removed_table": {
        "guest": {"vcpus": 2, "memory": 16 * MIB, "access": ZIPF},
        "kernel": "linux-6.4-upton",
        "host": {"hz": 1000, "nohz_full": "vcpus"},
        "contenders": {"vmm": DONTNEED},
        "duration": 30 * MS,
    },
    "blocks": {
        "guest": {
            "vcpus": 2,
            "memory": 64 * MIB,
            "mapping": 2 * MIB,
            "access": {"pattern": "uniform", "think": 500},
        },
        "machine": "graviton3-64c",
        "ageing": {"interval": MS},
        "contenders": {"vmm": {**DONTNEED, "rate": 500.0}},
        "duration": 20 * MS,
    },
    "blind, then the process exits": {
        "guest": {
            "vcpus": 2,
            "memory": 4 * MIB,
            "access": ZIPF,
            "teardown": {"order": "process_exit", "at": 3 * MS},
        },
        "kernel": "linux-6.4",
        "ageing": {"interval": MS},
        "duration": 6 * MS,
    },
    "x86, write-locked ageing": {
        "guest": {"vcpus": 4, "memory": 8 * MIB, "access": {"pattern": "populate"}},
        "machine": "x86-icelake-64c",
        "kernel": "linux-6.12-x86",
        "ageing": {},
    },
    "x86, lock-free ageing, ranges, then the file is closed": {
        "guest": {
            "vcpus": 4,
            "memory": 16 * MIB,
            "access": ZIPF,
            "teardown": {"order": "close_vm", "at": 12 * MS},
        },
        "machine": "x86-icelake-64c",
        "kernel": "linux-6.15-x86",
        "ageing": {"interval": MS},
        "contenders": {"vmm": {**DONTNEED, "rate": 500.0}},
        "host": {"hz": 1000},
        "duration": 18 * MS,
    },
    "x86, shadow MMU, chains": {
        "guest": {
            "vcpus": 4,
            "memory": 8 * MIB,
            "rmap_chain": 4,
            "access": {"pattern": "populate"},
        },
        "machine": "x86-icelake-64c",
        "kernel": "linux-6.15-x86-shadow",
        "ageing": {},
    },
    "software AF, idle page tracking": {
        "guest": {"vcpus": 2, "memory": 8 * MIB, "access": ZIPF},
        "machine": {"base": "ampere-altra-80c", "set": {"hw_af": False}},
        "ageing": {"method": "page_idle", "interval": MS, "start": 5 * MS},
        "contenders": {"vmm": DONTNEED},
        "duration": 20 * MS,
    },
    "eviction's check with a flush": {
        "guest": {"vcpus": 2, "memory": 4 * MIB, "access": ZIPF},
        "kernel": "linux-6.4",
        "ageing": {"method": "folio_referenced", "start": 4 * MS},
        "duration": 10 * MS,
    },
    "eviction's check that looks around": {
        "guest": {"vcpus": 2, "memory": 4 * MIB, "access": ZIPF},
        "ageing": {"method": "folio_referenced", "start": 4 * MS},
        "duration": 10 * MS,
    },
    "a flush for each call": {
        "guest": {"vcpus": 2, "memory": 4 * MIB, "access": ZIPF},
        "kernel": "linux-6.4-yuzhao-v1-baseline",
        "ageing": {"start": 4 * MS},
        "duration": 10 * MS,
    },
    "balloon and reporting": {
        "guest": {"vcpus": 2, "memory": 16 * MIB, "access": {"pattern": "populate", "repeat": 9}},
        "kernel": "linux-7.1-lockless",
        "ageing": {"interval": MS},
        "contenders": {
            "balloon": {"kind": "balloon", "guest": "vm0", "target": MIB, "rate": 20000.0},
            "reporting": {
                "kind": "free_page_reporting",
                "guest": "vm0",
                "delay": 2 * MS,
                "idle": MS,
            },
        },
    },
    "a mapped VM that ends in chunks": {
        "guest": {
            "memory": 64 * MIB,
            "ipa_bits": 48,
            "mapped": True,
            "access": {"pattern": "uniform", "touches": 100, "think": 1000},
            "teardown": {"order": "close_vm", "at": MS},
        },
        "kernel": "linux-7.1",
        "ageing": {"interval": MS},
    },
}
CASES["many guests, two to a memcg, slots, two nodes"] = {
    "machine": {
        "base": "ampere-altra-80c",
        "set": {"cores": 32, "nodes": 2, "c2c_remote_ns": 350},
    },
    "guests": {
        name: {
            "count": 6,
            "vcpus": 2,
            "memory": 4 * MIB,
            "memslots": 4,
            "memcg": "shared" if name == "pod" else None,
            "access": ZIPF,
        }
        for name in ("pod", "vm")
    },
    "ageing": {"interval": MS},
    "contenders": {"vmm": {**DONTNEED, "guest": "vm", "rate": 20000.0}},
    "duration": 8 * MS,
}
#: The shipped workload of each taker of mmu_lock, reduced.
TAKERS: dict[str, list[str]] = {
    "madvise_dontneed": ["guests.vm0.memory=8 MiB", "contenders.vmm.start=2 ms", "duration=12 ms"],
    "free_page_reporting": [
        *("guests.vm0.memory=32 MiB", "contenders.reporting.delay=5 ms"),
        *("contenders.reporting.idle=2 ms", "duration=30 ms"),
    ],
    "balloon": [
        *("guests.vm0.memory=8 MiB", "contenders.balloon.target=1 MiB"),
        *("contenders.balloon.start=2 ms", "duration=12 ms"),
    ],
    "ksm": ["guests.vm0.memory=2 MiB", "duration=40 ms"],
    "migration": ["guests.vm0.memory=4 MiB", "contenders.mover.start=4 ms", "duration=12 ms"],
    "compaction": [
        *("guests.vm0.memory=4 MiB", "contenders.kcompactd.start=4 ms"),
        *("contenders.kcompactd.pages=96", "duration=15 ms"),
    ],
    "numa_balancing": [
        *("guests.vm0.memory=8 MiB", "contenders.numa.start=0 ns"),
        *("contenders.numa.scan_size=2 MiB", "contenders.numa.delay=2 ms", "duration=40 ms"),
    ],
    "mprotect": ["guests.vm0.memory=4 MiB", "contenders.vmm.start=4 ms", "duration=20 ms"],
    "fork": [
        *("guests.vm0.memory=4 MiB", "contenders.vmm.start=4 ms", "contenders.vmm.child=4 ms"),
        "duration=14 ms",
    ],
    "oom_reaper": [
        *("guests.victim.memory=8 MiB", "contenders.oom.start=3 ms", "contenders.oom.delay=1 ms"),
        "duration=8 ms",
    ],
    "memslot": ["guests.vm0.memory=8 MiB", "contenders.vmm.start=4 ms", "duration=20 ms"],
    "pre_fault": ["guests.vm0.memory=8 MiB", "guests.vm0.access.touches=2000"],
    "dirty_log": [
        *("guests.vm0.memory=16 MiB", "contenders.migration.start=3 ms"),
        *("contenders.migration.interval=2 ms", "contenders.migration.clear_chunk=4 MiB"),
        "duration=20 ms",
    ],
    "khugepaged": ["guests.vm0.memory=8 MiB", "contenders.khugepaged.start=4 ms", "duration=12 ms"],
    "thp_split": ["guests.vm0.memory=16 MiB", "contenders.pressure.start=3 ms", "duration=12 ms"],
}
QUESTIONS: dict[str, list[str]] = {
    "empty-table-walk": [
        *("kernel=linux-6.4-upton", "guests.vm0.page_size=4 KiB", "guests.vm0.memory=16 MiB"),
        *("contenders.vmm.range=8 MiB", "contenders.vmm.start=60 ms", "contenders.vmm.stop=90 ms"),
        *("contenders.vmm.rate=100 / s", "duration=120 ms"),
    ],
    "last-reference": [
        *("kernel=linux-6.3", "guests.vm0.memory=8 MiB", "contenders.migration.interval=6 ms"),
        *("contenders.migration.start=2 ms", "guests.vm0.access.think=4 us", "duration=60 ms"),
    ],
}
SHIPPED = {f"takers/{name}": sets for name, sets in TAKERS.items()}
SHIPPED |= {f"questions/{name}": sets for name, sets in QUESTIONS.items()}
ALL = [*CASES, *SHIPPED]
KEPT = (
    *("sim_ns", "touches", "faults", "fault_retries", "ageing_calls", "young_pages"),
    *("grace_periods", "callbacks", "tables_allocated", "tables_freed", "tlbi_broadcasts"),
    *("unmapped_pages", "mmu_lock_wait_total_ns", "mmu_lock_hold_total_ns", "safety"),
)
ENDS = ("teardown_visits", "teardown_longest_ns", "teardown_walk_ns")


def outcome(case: str) -> dict[str, Any]:
    if case in SHIPPED:
        (point,) = load(str(ROOT / "workloads" / f"{case}.yaml"), SHIPPED[case]).points
        record = worlds.run(point.scenario)
    else:
        record = worlds.run(**CASES[case])
    ends = "mapped" in CASES.get(case, {}).get("guest", {})
    kept = (*KEPT, *ENDS) if ends else KEPT
    return {"fingerprint": record.fingerprint, **{key: record.summary[key] for key in kept}}


def test_fingerprints_are_as_they_were(request: pytest.FixtureRequest) -> None:
    found = {case: outcome(case) for case in ALL}
    as_they_were(request, GOLDEN, found)
    assert len({values["fingerprint"] for values in found.values()}) == len(ALL)


def test_a_second_run_in_the_process_feels_nothing_of_the_first() -> None:
    case = "windows and frees by RCU"
    assert outcome(case) == outcome(case)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from golden.test_fingerprints import outcome
print(outcome(sys.argv[2])["fingerprint"])
"""


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_another_process_with_another_hash_seed_gives_the_same(hash_seed: str) -> None:
    case = "balloon and reporting"
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tests, case],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == outcome(case)["fingerprint"]
