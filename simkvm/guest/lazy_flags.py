"""Accessed flags that are decided when somebody looks.

With independent touches, each of a page with probability a, n touches set the flag of a page whose
flag is clear with probability 1 - (1 - a) ** n. So there is nothing to do until somebody looks; then
each clear flag is drawn, for the touches since the look before.

A touch sets the flag only if it misses the TLB (:mod:`simkvm.guest.vcpu`), which is direct-mapped.
For one vCPU and one page a touch hits the page (a), another page of its place in the TLB (b = q -
a), or a page of another place. The flag of a page that is cached at the start stays clear as long
as no touch of the page comes behind one of the others:

    h(n) = (1 - b) ** n + b * ((1 - a) ** n - (1 - b) ** n) / (b - a)

and the page is cached at the end if the place's last touch was of it, or there was none. Whether
each page is cached is therefore part of what is drawn at a look: page by page the history of flag
and cached translations is that of explicit vCPUs, whenever anybody looks and flushes. That vCPUs
share the flag is no matter: their touches are independent.

Pages are drawn independently of one another, as if touches came at random times instead of equal
distances. How many are young in all has the same mean and a larger variance: sum of P (1 - P).

Places that so many pages share that fewer than :data:`HIDDEN` of a page's touches can find it
cached are left out of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from simkvm.guest.leaf_weights import Equal, LeafWeights
from simkvm.kernel.stage2 import AF, VALID, WRITE

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

HIDDEN: Final = 1e-3  #: smallest share of touches that the TLB may hide from a look
AT_ONCE: Final = 1 << 18  #: flags, times vCPUs if each has a TLB that matters, decided at once
NONE: Final = np.empty(0, np.int64)


class Cached:
    """Pages that vCPUs have cached: parallel arrays.

    ``since``: how many touches the vCPU had made when it was so.
    """

    def __init__(self, vcpus: Int64s, leaves: Int64s, since: Int64s) -> None:
        self.vcpus = vcpus
        self.leaves = leaves
        self.since = since

    @classmethod
    def joined(cls, parts: list[Cached]) -> Cached:
        """All of ``parts``."""
        return cls(
            np.concatenate([NONE, *(part.vcpus for part in parts)]),
            np.concatenate([NONE, *(part.leaves for part in parts)]),
            np.concatenate([NONE, *(part.since for part in parts)]),
        )


class LazyFlags:
    """The accessed flags of ``kvm``'s leaves.

    ``counts`` returns, for a time, how many touches each vCPU has made before it; ``total``: how
    many all have. Reads of a page that only a write would fault on count apart (``write_ratio``).
    """

    def __init__(
        self,
        kvm: Kvm,
        weights: LeafWeights,
        write_ratio: float,
        vcpus: int,
        counts: Callable[[int], Int64s],
        total: Callable[[int], int],
        rng: np.random.Generator,
    ) -> None:
        self._entries = kvm.stage2.leaf.entries
        self._weights = weights
        self._write_ratio = write_ratio
        self._rng = rng
        self._size = kvm.host.entries  #: leaves that share the time of the last look
        self._places = kvm.costs.tlb_entries
        self.place_shares = _place_shares(weights, self._places)
        self.hides = _hides(weights, self.place_shares)
        self._counts = counts if self.hides else lambda t_ns: np.array([total(t_ns)])
        rows = vcpus if self.hides else 1
        blocks = -(-weights.leaves // self._size)
        #: Touches made at the last look at each block of leaves, by each vCPU, or by all.
        self._looked: Int64s = np.zeros((rows, blocks), np.int64)
        self._flushed: Int64s = np.zeros(rows, np.int64)  #: and at the last flush
        self._cached: dict[int, Cached] = {}  #: by block, as of its last look
        # What faults left in a place since: the page, and how many touches the vCPU had made.
        self._faulted: Int64s = np.full((rows, self._places), -1, np.int64)
        self._faulted_at: Int64s = np.zeros((rows, self._places), np.int64)

    # -- looks --------------------------------------------------------------------------------

    def look(self, t_ns: int, first: int, last: int) -> None:
        """Let the flags of these leaves, and their blocks, show what was touched before ``t_ns``."""
        counts = self._counts(t_ns)
        low, high = first // self._size, (last - 1) // self._size + 1
        step = max(1, AT_ONCE // (self._size * len(counts)))
        for block in range(low, high, step):
            self._decide(block, min(block + step, high), counts)

    def _decide(self, low: int, high: int, counts: Int64s) -> None:
        """A look at the blocks ``low`` up to ``high``."""
        looked = self._looked[:, low:high]
        passed = np.maximum(counts[:, np.newaxis] - looked, 0)
        if not passed.any():
            return
        first, last = low * self._size, min(high * self._size, len(self._entries))
        entries = self._entries[first:last]
        block_of = np.arange(last - first) // self._size
        valid = np.flatnonzero(entries & VALID)
        share = self._weights.of(first, last)[valid] / self._weights.total
        reads_only = (entries[valid] & WRITE) == 0
        share = np.where(
            reads_only, (1 - self._write_ratio) * share / (1 - self._write_ratio * share), share
        )
        log_clear = passed.sum(axis=0)[block_of[valid]] * _log1m(share)
        hit = np.zeros(len(valid), np.bool_)
        if self.hides:
            place = self.place_shares[(first + valid) % self._places]
            mine = np.flatnonzero(share > HIDDEN * place)
            log_clear[mine], hit[mine] = self._among_cached(
                range(low, high), first + valid[mine], share[mine], place[mine], counts
            )
        old = np.flatnonzero((entries[valid] & AF) == 0)
        touched = hit[old] | (self._rng.random(len(old)) >= np.exp(log_clear[old]))
        entries[valid[old[touched]]] |= np.uint8(AF)
        np.maximum(looked, counts[:, np.newaxis], out=looked)

    # -- cached translations ------------------------------------------------------------------

    def _among_cached(
        self, blocks: range, leaves: Int64s, share: Float64s, place: Float64s, counts: Int64s
    ) -> tuple[Float64s, Bools]:
        """Draw which of ``leaves``, all of ``blocks``, are cached now.

        ``share`` and ``place``: of all touches, those of the leaf and of its place. Returns the
        logarithm of the probability that nobody else set the flag, and whether somebody did whom
        the drawing tells of.
        """
        looked = self._looked[:, leaves // self._size]
        now = counts[:, np.newaxis]
        passed = np.maximum(now - looked, 0)
        since_flush = np.maximum(now - np.maximum(looked, self._flushed[:, np.newaxis]), 0)
        ends = (share / place) * -np.expm1(since_flush * _log1m(place))
        cached = self._rng.random(ends.shape) < ends
        hit = cached.any(axis=0)
        log_clear = np.minimum(passed * _log1m(share) - _log1m(ends), 0.0)
        log_clear[cached] = 0.0

        known = self._known(blocks, leaves)
        if len(known.vcpus):
            column = np.searchsorted(leaves, known.leaves)
            set_flag, still = self._outcome(known, share[column], place[column], counts)
            before = cached[known.vcpus, column]
            # They did not start uncached, so what was drawn for that does not count.
            cached[known.vcpus, column] = False
            hit[column[before]] = cached[:, column[before]].any(axis=0)
            hit[column[set_flag]] = True
            cached[known.vcpus, column] = still
            log_clear[known.vcpus, column] = 0.0
        self._keep(blocks, leaves, cached, counts)
        return log_clear.sum(axis=0), hit

    def _outcome(
        self, known: Cached, share: Float64s, place: Float64s, counts: Int64s
    ) -> tuple[Bools, Bools]:
        """Of pages that were cached: whether their flags were set since, and they still are."""
        touches = np.maximum(counts[known.vcpus] - known.since, 0)
        others = np.maximum(place - share, 0.0)
        stayed = np.exp(touches * _log1m(others))
        clear = never_missed(share, others, touches)
        untouched = np.exp(touches * _log1m(place))
        ends = untouched + (share / place) * (1 - untouched)
        drawn = self._rng.random(len(touches))
        set_flag = drawn >= clear
        still = (drawn < stayed) | (set_flag & (drawn < clear + ends - stayed))
        return set_flag, still

    def _known(self, blocks: range, leaves: Int64s) -> Cached:
        """What is known to have been cached of ``leaves``, which lie in ``blocks``."""
        parts = [self._cached.pop(block) for block in blocks if block in self._cached]
        places = leaves % self._places
        vcpus, column = np.nonzero(self._faulted[:, places] == leaves)
        places = places[column]
        faulted = Cached(vcpus, leaves[column], self._faulted_at[vcpus, places])
        self._faulted[vcpus, places] = -1
        known = Cached.joined([faulted, *parts])
        there = np.isin(known.leaves, leaves)  # others were unmapped: a flush is on its way
        code = known.vcpus[there] * len(self._entries) + known.leaves[there]
        _, once = np.unique(code, return_index=True)  # a page cached and faulted on is the latter
        return Cached(*(part[there][once] for part in (known.vcpus, known.leaves, known.since)))

    def _keep(self, blocks: range, leaves: Int64s, cached: Bools, counts: Int64s) -> None:
        vcpus, column = np.nonzero(cached)
        where = leaves[column]
        of = where // self._size
        for block in blocks:
            here = of == block
            if here.any():
                by = vcpus[here]
                self._cached[block] = Cached(by, where[here], counts[by])

    def faulted(self, vcpu: int, leaf: int, touches: int) -> None:
        """``vcpu`` has made ``touches``, the last one of ``leaf``, which it faulted on."""
        if self.hides:
            self._faulted[vcpu, leaf % self._places] = leaf
            self._faulted_at[vcpu, leaf % self._places] = touches

    def flush(self, t_ns: int) -> None:
        """All translations go at ``t_ns``: what cached pages' touches did is decided now."""
        if not self.hides:
            return
        counts = self._counts(t_ns)
        vcpus, places = np.nonzero(self._faulted >= 0)
        faulted = Cached(vcpus, self._faulted[vcpus, places], self._faulted_at[vcpus, places])
        known = Cached.joined([faulted, *self._cached.values()])
        self._cached.clear()
        self._faulted.fill(-1)
        np.maximum(self._flushed, counts, out=self._flushed)
        entries = self._entries[known.leaves]
        clear = (entries & (VALID | AF)) == VALID
        known = Cached(known.vcpus[clear], known.leaves[clear], known.since[clear])
        if len(known.leaves):
            share = self._weights.take(known.leaves) / self._weights.total
            place = self.place_shares[known.leaves % self._places]
            set_flag, _ = self._outcome(known, share, place, counts)
            self._entries[known.leaves[set_flag]] |= np.uint8(AF)

    def occupied(self, touches: int) -> int:
        """Places of an empty TLB that are taken after ``touches``: the mean, rounded."""
        return round(float(-np.expm1(touches * _log1m(self.place_shares)).sum()))


def never_missed(share: Float64s, others: Float64s, touches: Int64s) -> Float64s:
    """Probability that the flag of a page that is cached stays clear over ``touches``: h(n)."""
    log_page, log_others = touches * _log1m(share), touches * _log1m(others)
    avoids, stays = np.exp(log_page), np.exp(log_others)
    same = np.abs(log_page - log_others) < 1e-6
    apart = np.where(same, 1.0, others - share)
    middle = touches * np.exp((log_page + log_others) / 2) / np.maximum(1 - others, 1e-300)
    ratio = np.where(same, middle, (avoids - stays) / apart)
    return np.clip(stays + others * ratio, 0.0, 1.0)


def _log1m(probability: Float64s) -> Float64s:
    """log(1 - p), finite also for p = 1."""
    return np.log1p(-np.minimum(probability, 1 - 2.0**-53))


def _place_shares(weights: LeafWeights, places: int) -> Float64s:
    """The share of touches that go to the pages of each place of a TLB of ``places``."""
    sums = np.zeros(places, np.int64)
    if isinstance(weights, Equal):
        each, more = divmod(weights.leaves, places)
        return (each + (np.arange(places) < more)) / weights.total
    step = places * max(1, AT_ONCE // places)
    for first in range(0, weights.leaves, step):
        part = weights.of(first, min(first + step, weights.leaves))
        whole = len(part) // places * places
        sums += part[:whole].reshape(-1, places).sum(axis=0)
        sums[: len(part) - whole] += part[whole:]
    return sums / weights.total


def _hides(weights: LeafWeights, place_shares: Float64s) -> bool:
    """Whether any page makes up more than :data:`HIDDEN` of its place."""
    if isinstance(weights, Equal):
        return weights.leaves * HIDDEN < len(place_shares)
    for first in range(0, weights.leaves, AT_ONCE):
        last = min(first + AT_ONCE, weights.leaves)
        place = place_shares[np.arange(first, last) % len(place_shares)]
        if (weights.of(first, last) > HIDDEN * weights.total * place).any():
            return True
    return False
