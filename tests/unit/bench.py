"""A contender on a guest of its own, as the tests of contenders run it."""

from __future__ import annotations

from typing import Any

import numpy as np
from lab import Lab

from simkvm import contenders
from simkvm.contenders.contender import Contender
from simkvm.units import MIB

Call = tuple[int, int, int]  # when it began, first leaf, last leaf (not included)


class Bench:
    """A contender on a guest of its own; the ranges that it takes back are written down."""

    def __init__(self, spec: Any, memory: int = 16 * MIB, fill: bool = True, **guest: Any) -> None:
        self.lab = self.lab_of(memory, guest)
        if fill:
            self.lab.fill()
        self.calls: list[Call] = []
        notifier = self.lab.kvm.notifier
        invalidate = notifier.invalidate

        def heard(task: Any, t_ns: int, first: int, last: int, *more: Any, **keys: Any) -> Any:
            self.calls.append((t_ns, first, last))
            return invalidate(task, t_ns, first, last, *more, **keys)

        notifier.invalidate = heard  # type: ignore[method-assign]
        rng = np.random.default_rng(11)
        self.contender: Contender = contenders.build(self.lab.kvm, self.lab.task, rng, spec)
        self.process = self.lab.env.process(self.contender.run())

    def lab_of(self, memory: int, guest: dict[str, Any]) -> Lab:
        """The lab that it works in."""
        return Lab(memory, guest)

    def run(self, until_ns: int) -> list[Call]:
        self.lab.env.timeout(until_ns)  # somebody else, so that nothing runs ahead for ever
        self.lab.env.run(until_ns)
        return [call for call in self.calls if call[0] <= until_ns]

    def begins(self, until_ns: int) -> list[int]:
        """When calls began, without what a call costs before it reaches the notifier."""
        costs = self.lab.kvm.costs.line
        return [t_ns - costs.same_ns for t_ns, _, _ in self.run(until_ns)]
