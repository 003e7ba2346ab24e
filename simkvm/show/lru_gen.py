"""What /sys/kernel/debug/lru_gen read at the end of a run, and what became of writes to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from simkvm.study.result import Result

FILE: Final = "lru_gen"
WRITE: Final = "lru_gen_write"
NAMES: Final = (FILE, WRITE)
"""Of the phases that hold the lines."""


def text(result: Result) -> str:
    """Failed writes first, then the file; empty of a host that never is short of memory."""
    phases = result.phases
    lines = [
        *phases[(phases["name"] == WRITE) & (phases["line"] != "")]["line"],
        *phases[phases["name"] == FILE]["line"],
    ]
    return "\n".join(lines)
