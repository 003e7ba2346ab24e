"""Which guests have leaves of more than one size, and whose writes are logged.

Both follow from what works on a guest, contenders or the selftest that made it; for all others the
model keeps one place a leaf.
"""

from __future__ import annotations

from collections.abc import Sequence

from simkvm.scenario.contenders import ContenderModel
from simkvm.scenario.groups import meant
from simkvm.scenario.schema import BLOCK_BYTES, Guest, Scenario
from simkvm.scenario.selftest import Selftest

Worker = ContenderModel | Selftest


def workers(scenario: Scenario, guest: str) -> list[Worker]:
    """Everybody who works on ``guest``."""
    theirs: list[Worker] = [
        contender
        for contender in scenario.contenders.values()
        if guest in meant(scenario, contender.guest)
    ]
    return theirs if scenario.selftest is None else [*theirs, scenario.selftest]


def block_bytes(guest: Guest, workers: Sequence[Worker]) -> int | None:
    """Size of the blocks of a guest that may have blocks and pages; None if all are alike.

    A guest mapped by blocks has pages too once its writes are logged or its huge pages split; one
    mapped by pages has blocks once khugepaged is at work.
    """
    if guest.mapping > guest.page_size:
        return guest.mapping if any(w.resizes or w.logs for w in workers) else None
    return BLOCK_BYTES[guest.page_size][0] if any(w.resizes for w in workers) else None


def logs_writes(workers: Sequence[Worker]) -> bool:
    """Whether one of them logs the guest's writes."""
    return any(w.logs for w in workers)
