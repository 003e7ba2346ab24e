"""A change of protection over a range: how many range starts and ends that is.

Source: mm/mprotect.c (``change_pud_range``), v6.12: one for each part of the range that lies inside
one P4D (512 GiB with 4 KiB pages), begun at the first of its entries that is populated; none for
a part that holds nothing.
"""

from __future__ import annotations

from itertools import pairwise

from simkvm.contenders.contender import Contender, HostChange, Steps


class ProtectionChanger(Contender):
    """A thread that changes the protection of guest memory in the host."""

    def change_protection(self, t_ns: int, first: int, last: int, what: HostChange) -> Steps:
        """Do ``what`` to the entries of the leaves ``first`` up to ``last``; returns when done."""
        kvm = self.kvm
        span = kvm.stage2.geometry.entries**3 // kvm.leaf_pages
        change = self.change(what, kvm.costs.takers.pte_ns)
        cuts = [first, *range((first // span + 1) * span, last, span), last]
        for low, high in pairwise(cuts):
            if kvm.host.state[low:high].any():
                t_ns = yield from self.invalidate(t_ns, low, high, change)
        return t_ns
