"""Which guests have leaves of more than one size, and whose writes are logged.

Both follow from what works on a guest; for all others the model keeps one place a leaf.
"""

from __future__ import annotations

from collections.abc import Sequence

from simkvm.scenario.contenders import ContenderModel
from simkvm.scenario.schema import BLOCK_BYTES, Guest


def block_bytes(guest: Guest, contenders: Sequence[ContenderModel]) -> int | None:
    """Size of the blocks of a guest that may have blocks and pages; None if all are alike.

    A guest mapped by blocks has pages too once its writes are logged or its huge pages split; one
    mapped by pages has blocks once khugepaged is at work.
    """
    if guest.mapping > guest.page_size:
        return guest.mapping if any(c.resizes or c.logs for c in contenders) else None
    return BLOCK_BYTES[guest.page_size][0] if any(c.resizes for c in contenders) else None


def logs_writes(contenders: Sequence[ContenderModel]) -> bool:
    """Whether one of them logs the guest's writes."""
    return any(c.logs for c in contenders)
