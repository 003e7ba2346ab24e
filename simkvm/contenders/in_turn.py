"""One thread of the host that works on many guests: it does what is due first, whosever it is.

Each guest has a contender of its own, with its own place in its own memory and its own random
stream. They share a CPU, so only one of them runs at a time: where a thread for one guest would
sleep, this one goes on with the guest whose next call is due first, late or not.
"""

from __future__ import annotations

from collections.abc import Generator
from heapq import heappop, heappush
from typing import Any

from simpy import Environment, Event

from simkvm.kernel.sched import Scheduler
from simkvm.kernel.task import Task


class Turns:
    """Who of ``parts`` contenders may go on: the one that is due first, in order of guests."""

    def __init__(self, env: Environment, task: Task, parts: int, sched: Scheduler) -> None:
        self._env = env
        self._sched = sched
        self._task = task
        self._to_come = parts  #: contenders that have not asked yet: they all ask before any runs
        self._waiting: list[tuple[int, int, Event]] = []  # a heap: due, number of the guest

    def wait(self, number: int, t_ns: int, due_ns: int) -> Generator[Event, Any, int]:
        """Guest ``number`` has nothing to do from ``t_ns`` on; returns when its turn comes."""
        turn = Event(self._env)
        heappush(self._waiting, (due_ns, number, turn))
        self._to_come = max(0, self._to_come - 1)
        self._next(t_ns)
        at_ns: int = yield turn
        return at_ns

    def finished(self, t_ns: int) -> None:
        """A guest has no more calls after ``t_ns``: the others go on without it."""
        self._to_come = max(0, self._to_come - 1)
        if self._waiting:
            self._next(t_ns)
        else:
            self._sched.sleep(self._task, t_ns)

    def _next(self, t_ns: int) -> None:
        if self._to_come:
            return
        due_ns, _, turn = heappop(self._waiting)
        if due_ns > t_ns:
            self._sched.sleep(self._task, t_ns)
            t_ns = due_ns
        turn._ok = True
        turn._value = t_ns
        self._env.schedule(turn, delay=max(0, t_ns - int(self._env.now)))
