"""How often a folio was used, its tier, and whether evicting a tier does harm.

Source: include/linux/{mmzone,mm_inline}.h, mm/{swap,workingset,vmscan}.c. Beside its generation a
folio has two flags, PG_referenced and PG_workingset, and a counter of two bits. Together they are
one state of four bits, and each rule is a table of sixteen entries. There are two sets of rules:
those of v6.12, and those since the rework of v6.14, which goes with ``promotion: two_step``.

A folio whose count is in tier 1 or above is protected, moved to the next generation instead of
evicted, if folios of its tier came back more often than those of tier 0: a proportional-integral
controller with the refaults of all generations so far as its integral.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from simkvm.kernel.mglru import MIN_LRU_BATCH

MAX_NR_TIERS: Final = 4
REFERENCED: Final = 1  #: PG_referenced
WORKINGSET: Final = 2  #: PG_workingset
COUNT: Final = 4  #: one use more, in a counter that stops at three (LRU_REFS_MASK)
COUNTS: Final = 3 * COUNT
STATES: Final = 16

Table = NDArray[np.uint8]


def _table(rule: Callable[[int], int]) -> Table:
    return np.array([rule(state) for state in range(STATES)], np.uint8)


def _order(n: int) -> int:
    """``order_base_2``: the least power of two that is not below ``n``."""
    return max(0, n - 1).bit_length()


@dataclass(frozen=True)
class TierRules:
    """What a state means and becomes; tables are indexed by state.

    ``tier``: its tier; ``highest``: whether it is protected whatever its tier is worth;
    ``accessed``: one use through a file descriptor, or a fault of KVM's (``folio_mark_accessed``);
    ``moved``: eviction moved it up; ``isolated``: eviction took it; ``restored``: it came back
    after a short time; ``seen``: a walk found it young.
    """

    two_step: bool
    tier: Table
    highest: Table
    accessed: Table
    moved: Table
    isolated: Table
    restored: Table
    seen: Table
    gains: tuple[int, int]  #: of tier 0 and of the others, where tiers are compared

    def promotes(self, states: Table) -> NDArray[np.bool_]:
        """Whether a walk that finds folios in these states young moves them (or only marks)."""
        if not self.two_step:
            return np.ones(len(states), np.bool_)
        moved: NDArray[np.bool_] = (states & (REFERENCED | WORKINGSET)) != 0
        return moved


def _accessed(state: int) -> int:
    if not state & REFERENCED:
        return state | REFERENCED
    if not state & WORKINGSET:
        return state | WORKINGSET
    return state + COUNT if state < COUNTS else state


def _accessed_reworked(state: int) -> int:
    if not state & REFERENCED:
        return (state & WORKINGSET) | REFERENCED
    return state | WORKINGSET if state & COUNTS == COUNTS else state + COUNT


def _refs(state: int) -> int:
    return (state >> 2) + bool(state & WORKINGSET)


def _refs_reworked(state: int) -> int:
    return (state >> 2) + 1 if state & REFERENCED else 0


def _tier_reworked(state: int) -> int:
    return MAX_NR_TIERS - 1 if state & WORKINGSET else _order(_refs_reworked(state))


FIRST: Final = TierRules(
    two_step=False,
    tier=_table(lambda s: _order(_refs(s) + 1)),
    highest=_table(lambda s: _refs(s) == 4),
    accessed=_table(_accessed),
    moved=_table(lambda s: 0),
    # Cleared for shrink_folio_list(): what is set after that was set by a look around.
    isolated=_table(lambda s: s & ~REFERENCED if s & REFERENCED else 0),
    restored=_table(lambda s: COUNTS | WORKINGSET),
    seen=_table(lambda s: 0),
    gains=(1, 2),
)
"""Up to v6.13."""

REWORKED: Final = TierRules(
    two_step=True,
    tier=_table(_tier_reworked),
    highest=_table(lambda s: s == (COUNTS | WORKINGSET | REFERENCED)),
    accessed=_table(_accessed_reworked),
    moved=_table(lambda s: s & WORKINGSET),
    isolated=_table(lambda s: s if s & REFERENCED else s & WORKINGSET),
    restored=_table(
        lambda s: WORKINGSET if s & WORKINGSET else max(0, _refs_reworked(s) - 1) * COUNT
    ),
    seen=_table(lambda s: WORKINGSET if s & (REFERENCED | WORKINGSET) else REFERENCED),
    gains=(2, 3),
)
"""Since v6.14: a first sighting only marks, and PG_workingset says that a folio was promoted."""


def rules(two_step: bool) -> TierRules:
    """Those of ``promotion``."""
    return REWORKED if two_step else FIRST


class Controller:
    """Refaults and evictions of one type of folios, by tier (``struct ctrl_pos`` and its like).

    Counts of the present oldest generation, and averages that each new one halves.
    """

    def __init__(self, tier_rules: TierRules) -> None:
        self._gains = tier_rules.gains
        self.refaulted = [0] * MAX_NR_TIERS
        self.evicted = [0] * MAX_NR_TIERS
        self.protected = [0] * MAX_NR_TIERS
        self._avg_refaulted = [0] * MAX_NR_TIERS
        self._avg_total = [0] * MAX_NR_TIERS

    def carry_over(self) -> None:
        """The oldest generation is over (``reset_ctrl_pos``)."""
        for tier in range(MAX_NR_TIERS):
            refaulted, total = self.position(tier)
            self._avg_refaulted[tier] = refaulted // 2
            self._avg_total[tier] = total // 2
        for counts in (self.refaulted, self.evicted, self.protected):
            counts[:] = [0] * MAX_NR_TIERS

    def position(self, tier: int) -> tuple[int, int]:
        """Refaults of a tier, and of how many (``read_ctrl_pos``)."""
        refaulted = self._avg_refaulted[tier] + self.refaulted[tier]
        total = self._avg_total[tier] + self.evicted[tier] + self.protected[tier]
        return refaulted, total

    def whole(self) -> tuple[int, int]:
        """As :meth:`position`, of all tiers together."""
        each = [self.position(tier) for tier in range(MAX_NR_TIERS)]
        return sum(r for r, _ in each), sum(t for _, t in each)

    def last_evicted_tier(self) -> int:
        """The highest tier that may be evicted; those above are protected (``get_tier_idx``)."""
        first, others = self._gains
        set_point = self.position(0)
        for tier in range(1, MAX_NR_TIERS):
            if not may_evict(set_point, first, self.position(tier), others):
                return tier - 1
        return MAX_NR_TIERS - 1


def may_evict(
    set_point: tuple[int, int], gain: int, variable: tuple[int, int], variable_gain: int
) -> bool:
    """Whether the process variable refaults little, or less than the set point.

    (``positive_ctrl_err``; each a pair of refaults and of how many.)
    """
    (refaulted, total), (pv_refaulted, pv_total) = set_point, variable
    return (
        pv_refaulted < MIN_LRU_BATCH
        or pv_refaulted * (total + MIN_LRU_BATCH) * gain
        <= (refaulted + 1) * pv_total * variable_gain
    )
