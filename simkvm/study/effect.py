"""What parameters do to a metric: one at a time, and in the two corners where all work together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from simkvm.scenario.expand import Scalar
from simkvm.scenario.machine import Parameter
from simkvm.study.subject import Setting


@dataclass(frozen=True)
class Effect:
    """What one parameter does to the metric of one subject.

    `at_low` and `at_high` are nan where no run gave a value. `changed`: the parameter changed what
    happened in some run, whether or not the metric moved. `half_width` is of the 95 % confidence
    interval of the change from low to high, over replications; infinite with one replication.
    """

    parameter: Parameter
    at_low: float
    value: float
    at_high: float
    changed: bool
    half_width: float

    @property
    def swing(self) -> float:
        """How far apart the metric gets, over low, value and high."""
        found = [x for x in (self.at_low, self.value, self.at_high) if not math.isnan(x)]
        return max(found) - min(found) if found else 0.0

    @property
    def beyond_chance(self) -> bool:
        """Whether it moves the metric, by more than its replications leave to chance."""
        if math.isinf(self.half_width):  # one replication: nothing is known of chance
            return self.swing > 0
        return self.swing > 0 and abs(self.at_high - self.at_low) > self.half_width

    @property
    def sure(self) -> float:
        """The swing less what its replications leave to chance: by this, effects are ranked."""
        return self.swing - self.half_width if math.isfinite(self.half_width) else self.swing

    @property
    def share(self) -> float:
        """The swing as a share of the metric as it is; nan where that is nothing."""
        return self.swing / abs(self.value) if self.value else math.nan


@dataclass(frozen=True)
class Tornado:
    """All effects on one subject, the largest beyond chance first. `value` is the metric as it is,
    and `half_width` that of its 95 % interval over replications.

    `lowest` and `highest` are the metric with all parameters that move it at the ends that lower
    it, and at those that raise it; nan if fewer than two do, or a run failed.
    """

    axes: dict[str, Scalar]
    value: float
    half_width: float
    effects: tuple[Effect, ...]
    lowest: float = math.nan
    highest: float = math.nan

    @property
    def moving(self) -> tuple[Effect, ...]:
        """Parameters that move the metric."""
        return tuple(effect for effect in self.effects if effect.swing > 0)

    @property
    def telling(self) -> tuple[Effect, ...]:
        """Those that do so beyond chance."""
        return tuple(effect for effect in self.effects if effect.beyond_chance)

    @property
    def still(self) -> tuple[str, ...]:
        """Parameters that changed the run but not the metric."""
        return tuple(e.parameter.name for e in self.effects if e.changed and not e.swing)

    @property
    def unused(self) -> tuple[str, ...]:
        """Parameters without any effect: never asked for, or the same fingerprint and figures."""
        return tuple(e.parameter.name for e in self.effects if not e.changed)

    @property
    def added_up(self) -> tuple[float, float]:
        """Where the corners would lie if single changes added up."""
        changes = [(e.at_low - self.value, e.at_high - self.value) for e in self.moving]
        return (
            self.value + math.fsum(min(0.0, *change) for change in changes),
            self.value + math.fsum(max(0.0, *change) for change in changes),
        )

    def among(self, basis: str) -> tuple[Effect, ...]:
        """Those of the moving ones whose value has this basis ("E": an estimate)."""
        return tuple(effect for effect in self.moving if effect.parameter.basis == basis)


def corners_of(tornado: Tornado) -> dict[str, Setting]:
    """All parameters that move the metric at the ends that lower it ("lowest"), or raise it.

    One that only raises it stays at its value in the lowest corner. None for fewer than two.
    """
    found: dict[str, Setting] = {}
    if len(tornado.moving) < 2:
        return found
    for name, sign in (("lowest", -1), ("highest", 1)):
        ends = [
            (e.parameter.name, *max((sign * (end - e.value), side) for end, side in _ends(e)))
            for e in tornado.moving
        ]
        found[name] = tuple((parameter, side) for parameter, gain, side in ends if gain > 0)
    return found


def _ends(effect: Effect) -> Iterator[tuple[float, str]]:
    for end, side in ((effect.at_low, "low"), (effect.at_high, "high")):
        if not math.isnan(end):
            yield end, side
