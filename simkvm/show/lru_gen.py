"""What /sys/kernel/debug/lru_gen read at the end of a run, and what became of writes to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from simkvm.scenario.errors import InputError

if TYPE_CHECKING:
    from simkvm.scenario.load import Study
    from simkvm.study.result import Result

FILE: Final = "lru_gen"
WRITE: Final = "lru_gen_write"
NAMES: Final = (FILE, WRITE)
"""Of the phases that hold the lines."""


def require_generations(study: Study) -> None:
    """Raise InputError if the study's one host has no such file."""
    memory = study.points[0].scenario.host.memory
    if memory is None:
        message = "--lru-gen needs memory that can run out, such as --set host.memory.size=64MiB"
        raise InputError(message, file=study.path, key="host.memory")
    if not memory.lru_gen & 1:
        message = "--lru-gen needs the multi-gen LRU, which is off"
        raise InputError(message, file=study.path, key="host.memory.lru_gen")


def text(result: Result) -> str:
    """Failed writes first, then the file; empty of a host that never is short of memory."""
    phases = result.phases
    lines = [
        *phases[(phases["name"] == WRITE) & (phases["line"] != "")]["line"],
        *phases[phases["name"] == FILE]["line"],
    ]
    return "\n".join(lines)
