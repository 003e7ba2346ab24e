"""In which order the vCPUs of a guest touch memory, if each does so at equal distances.

A vCPU that started at time s touches at s, s + step, s + 2 step... All have the same step, so the
touches of those that run come in one cyclic order, by phase (s modulo step) and then by number of
the vCPU. Counting the touches up to a time, and finding the time of the n-th one, is a search in
the sorted phases, whatever n is. Those that start later join the cycle then.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple


class Place(NamedTuple):
    """In the order of all touches: the one that vCPU ``vcpu`` makes, or would make, at ``t_ns``."""

    t_ns: int
    vcpu: int


class TouchOrder:
    """The vCPUs that run. ``here``: what lies before is past, and nobody asks for it again."""

    def __init__(self, step_ns: int) -> None:
        self._step_ns = step_ns
        self.here = Place(0, 0)
        self.made = 0  #: touches before ``here``, of all vCPUs that ever ran
        self._phases: list[tuple[int, int]] = []  #: (phase, vCPU) of those that touch, sorted
        self._periods = 0  #: their starting times in whole steps, summed
        self._coming: list[tuple[int, int]] = []  #: (start, vCPU) of those that begin later
        self._starts: dict[int, int] = {}

    def __contains__(self, vcpu: int) -> bool:
        return vcpu in self._starts

    def __len__(self) -> int:
        return len(self._starts)

    def join(self, vcpu: int, start_ns: int) -> None:
        """``vcpu`` touches from ``start_ns`` on, which lies not before ``here``."""
        self._starts[vcpu] = start_ns
        insort(self._coming, (start_ns, vcpu))
        self._absorb()

    def leave(self, vcpu: int) -> int:
        """``vcpu`` makes no more touches from ``here`` on; returns those made since it joined."""
        start_ns = self._starts[vcpu]
        made = self.made_by(vcpu, self.here.t_ns)
        del self._starts[vcpu]
        period, phase = divmod(start_ns, self._step_ns)
        where = bisect_left(self._phases, (phase, vcpu))
        if where < len(self._phases) and self._phases[where] == (phase, vcpu):
            del self._phases[where]
            self._periods -= period
        else:
            self._coming.remove((start_ns, vcpu))
        return made

    def made_by(self, vcpu: int, t_ns: int) -> int:
        """Touches that ``vcpu`` makes from its start up to ``t_ns``."""
        return max(0, -((self._starts[vcpu] - t_ns) // self._step_ns))

    def next_ns(self, vcpu: int, t_ns: int) -> int:
        """When ``vcpu`` touches next from ``t_ns`` on."""
        return self._starts[vcpu] + self.made_by(vcpu, t_ns) * self._step_ns

    def total(self, t_ns: int) -> int:
        """Touches of all vCPUs before ``t_ns``, or before ``here`` if that is later."""
        return self.made + (self.between(Place(t_ns, 0)) if t_ns > self.here.t_ns else 0)

    def between(self, there: Place) -> int:
        """Touches from ``here`` up to ``there``."""
        count = self._before(there) - self._before(self.here)
        for start_ns, vcpu in self._coming:
            if start_ns > there.t_ns:
                break
            count += self.made_by(vcpu, there.t_ns)
            if vcpu < there.vcpu and self.next_ns(vcpu, there.t_ns) == there.t_ns:
                count += 1
        return count

    def go_to(self, there: Place) -> int:
        """Everything before ``there`` is past; returns how many touches that was."""
        if there <= self.here:
            return 0
        passed = self.between(there)
        self.made += passed
        self.here = there
        self._absorb()
        return passed

    def nth(self, number: int) -> Place:
        """The ``number``-th touch from ``here`` on, from 1; somebody has to run."""
        phases, here = self._phases, self.here
        if self._coming:
            phases = phases.copy()
            for start_ns, vcpu in self._coming:
                if phases:
                    place = self._nth(phases, here, number)
                    if place < (start_ns, vcpu):
                        return place
                    joined = Place(start_ns, vcpu)
                    number -= self._rank(phases, joined) - self._rank(phases, here)
                    here = joined
                else:
                    here = Place(start_ns, vcpu)
                insort(phases, (start_ns % self._step_ns, vcpu))
        return self._nth(phases, here, number)

    def _nth(self, phases: list[tuple[int, int]], here: Place, number: int) -> Place:
        period, phase = divmod(here.t_ns, self._step_ns)
        ahead = bisect_left(phases, (phase, here.vcpu)) + number - 1
        periods, which = divmod(ahead, len(phases))
        phase, vcpu = phases[which]
        return Place((period + periods) * self._step_ns + phase, vcpu)

    def _rank(self, phases: list[tuple[int, int]], place: Place) -> int:
        """Touches of a cycle of ``phases`` before ``place``, since time 0."""
        period, phase = divmod(place.t_ns, self._step_ns)
        return period * len(phases) + bisect_left(phases, (phase, place.vcpu))

    def _before(self, place: Place) -> int:
        """Touches before ``place`` of those that have started."""
        return self._rank(self._phases, place) - self._periods

    def _absorb(self) -> None:
        """Who has started by ``here`` is part of the cycle."""
        while self._coming and self._coming[0][0] <= self.here.t_ns:
            start_ns, vcpu = self._coming.pop(0)
            period, phase = divmod(start_ns, self._step_ns)
            insort(self._phases, (phase, vcpu))
            self._periods += period
