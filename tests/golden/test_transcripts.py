"""What happened in two tiny worlds, line by line: a fingerprint says *that*, this says *what*.

After a change that is meant to change it: ``python -m pytest tests/golden --update-golden``.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import unified_diff
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from worlds import MS, US, Journal, journal, world

from simkvm.kernel.qrwlock import FAST
from simkvm.kernel.sites import NAMES
from simkvm.kernel.world import World
from simkvm.observe.oracle import ROOT, name
from simkvm.units import KIB

FOLDER = Path(__file__).with_name("transcripts")
UPDATE = "python -m pytest tests/golden --update-golden"

#: Six pages, taken back once, aged twice, and the VM's end: everything that there is, once.
LIFE: dict[str, Any] = {
    "host": {"hz": 1000, "cpus": 5},
    "guest": {
        "vcpus": 2,
        "memory": 24 * KIB,
        "access": {"pattern": "populate", "repeat": 4000, "think": 1 * US},
        "teardown": {"order": "close_vm", "at": 9 * MS},
    },
    "ageing": {"start": 30 * US, "interval": 700 * US, "passes": 2},
    "contenders": {
        "vmm": {
            "kind": "madvise_dontneed",
            "guest": "vm0",
            "range": 24 * KIB,
            "rate": 100.0,
            "start": 1 * MS,
            "stop": 2 * MS,
        }
    },
    "duration": 12 * MS,
}
CASES: dict[str, dict[str, Any]] = {
    "ageing-under-the-write-lock": {"kernel": "linux-6.12", **LIFE},
    "lock-free-windows-and-frees-by-rcu": {"kernel": "linux-6.4-yuzhao-v2", **LIFE},
}


def told(made: World, notes: Journal) -> Iterator[tuple[int, str]]:
    """Everything that was recorded or told, each with its time."""
    for row in notes.rows():
        met = "" if row.met == FAST else f", {row.met} waited before it"
        mode = ("read", "write")[row.mode]
        yield row.arrival, f"{NAMES[row.site]}: {mode} lock, {row.wait} + {row.hold} ns{met}"
    for what, tables in (
        ("linked", notes.linked),
        ("unlinked", notes.unlinked),
        ("freed", notes.freed),
    ):
        for _, table, t_ns in tables:
            yield t_ns, f"{name(table)} {what}"
    for _, t_ns in notes.roots_freed:
        yield t_ns, f"{name(ROOT)} freed"
    for _, walk in notes.walks:
        path = ", ".join(name(table) for table in sorted(walk.tables))
        yield walk.start_ns, f"{walk.walker} walks for {walk.busy_ns} ns: {path}"
    for number, start, end, scans in made.recorder.grace_periods:
        yield start, f"grace period {number} starts"
        yield end, f"grace period {number} ends after {scans} scans"
    assert made.ageing is not None
    for one in made.ageing.passes:
        yield one.start_ns, "ageing pass starts"
        found = f"{one.young} young of {one.scanned}, {one.calls} calls"
        yield one.end_ns, f"ageing pass ends: {found}"
    for vcpu in made.kvms[0].vcpus:
        yield vcpu.finished_ns, f"{vcpu.task.name} stops after {vcpu.touches} touches"


@pytest.mark.parametrize("case", CASES)
def test_transcripts_are_as_they_were(case: str, request: pytest.FixtureRequest) -> None:
    with journal() as notes:
        made = world(**CASES[case])
        record = made.run()
    assert record.violations == []
    lines = [f"{t_ns:>9} ns  {what}" for t_ns, what in sorted(told(made, notes), key=itemgetter(0))]
    path = FOLDER / f"{case}.txt"
    if request.config.getoption("--update-golden"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    stored = path.read_text().splitlines()
    changed = list(unified_diff(stored, lines, "stored", "now", n=1, lineterm=""))
    assert not changed, "\n".join([*changed, f"if that is meant: {UPDATE}"])
