"""What actors of the simulated kernel share: a CPU, and time that may run ahead of the clock.

An actor computes its steps with explicit times and meets the clock only where somebody else
could interfere: if no other event comes before a step, the step costs no event of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from simpy import Environment, Event

from simkvm.kernel.cpu import Cpu


@dataclass(eq=False)
class Task:
    """An actor: its name for people, and the CPU that it runs on, or ran on last.

    ``on_cpu``: it has the CPU; ``need_resched``: it has to give it up at its next checkpoint. Both
    are the scheduler's to change (:mod:`simkvm.kernel.sched`).
    """

    name: str
    cpu: Cpu
    #: What functions took of its time, for those that are accounted; names as a profile has them.
    functions: dict[str, int] | None = None
    on_cpu: bool = True
    need_resched: bool = False

    def spend(self, function: str, ns: int) -> None:
        """``function`` took ``ns`` of this task's time, what it called included."""
        if self.functions is not None:
            self.functions[function] = self.functions.get(function, 0) + ns


def reach(env: Environment, t_ns: int) -> Generator[Event, Any, int]:
    """Let everything happen that comes before ``t_ns``; returns ``t_ns``.

    A time that has come is not waited for again: others due in the same nanosecond come later.
    """
    if t_ns > env.now and t_ns >= env.peek():
        yield env.timeout(t_ns - int(env.now))
    return t_ns


def acquired(grant: int | Event) -> Generator[Event, Any, int]:
    """When the section of a lock request is over and its caller goes on."""
    if isinstance(grant, int):
        return grant
    at: int = yield grant
    return at
