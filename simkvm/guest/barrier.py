"""A barrier in the guest, between the stages of a parallel job."""

from __future__ import annotations

from simpy import Environment, Event


class Barrier:
    """For ``parties`` threads, again and again."""

    def __init__(self, env: Environment, parties: int) -> None:
        self._env = env
        self._parties = parties
        self._last_ns = 0
        self._waiting: list[Event] = []

    def arrive(self, t_ns: int) -> int | Event:
        """One thread is there at ``t_ns``.

        Returns when it goes on, if it is the last one to tell, else an event whose value is when
        the last one came.
        """
        self._last_ns = max(self._last_ns, t_ns)
        if len(self._waiting) + 1 < self._parties:
            met = Event(self._env)
            self._waiting.append(met)
            return met
        last_ns = self._last_ns
        self._release(last_ns)
        return last_ns

    def abandon(self, t_ns: int) -> None:
        """Nobody else will come: let those go who wait."""
        self._release(t_ns)

    def _release(self, t_ns: int) -> None:
        waiting, self._waiting = self._waiting, []
        self._last_ns = 0
        for met in waiting:
            met._ok = True
            met._value = t_ns
            self._env.schedule(met, delay=max(0, t_ns - int(self._env.now)))
