"""Accessed flags that are decided when somebody looks.

With independent touches, each of a page with probability a, n touches set the flag of a page whose
flag is clear with probability 1 - (1 - a) ** n. So there is nothing to do until somebody looks;
then each clear flag is drawn, for the touches since the look before.

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
from typing import TYPE_CHECKING, Final, NamedTuple

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
KEPT: Final = 64  #: flushes remembered before it is asked which still matter


class Cached(NamedTuple):
    """Pages that vCPUs had cached at a look: parallel arrays, ``leaves`` in order for each vCPU."""

    vcpus: Int64s
    leaves: Int64s
    since: Int64s  #: touches that the vCPU had made


class Known(NamedTuple):
    """Of the leaves that are looked at, those that were cached: parallel arrays.

    ``since`` and ``until``: touches that the vCPU had made when it was so, and now or at the first
    flush after that.
    """

    vcpus: Int64s
    columns: Int64s  #: which of the leaves
    since: Int64s
    until: Int64s
    flushed: Bools

    def take(self, which: Int64s) -> Known:
        """Some of them."""
        return Known(
            self.vcpus[which],
            self.columns[which],
            self.since[which],
            self.until[which],
            self.flushed[which],
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
        self._flush = 0  #: flushes so far
        self._seen: Int64s = np.zeros(blocks if self.hides else 0, np.int64)  #: at the last look
        self._flushes: dict[int, Int64s] = {}  #: touches made then, of those still asked for
        # What faults left in a place since: the page, and how many touches the vCPU had made.
        self._faulted: Int64s = np.full((rows, self._places), -1, np.int64)
        self._faulted_at: Int64s = np.zeros((rows, self._places), np.int64)
        #: Touches that all vCPUs had made when the leaf was mapped.
        self._mapped_at: Int64s = np.zeros(weights.leaves if self.hides else 0, np.int64)

    # -- looks --------------------------------------------------------------------------------

    def look(self, t_ns: int, first: int, last: int) -> None:
        """Let the flags of these leaves, and of their blocks, show the touches before ``t_ns``."""
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
        # Nobody has cached what was not mapped: of the touches since the look, these may have.
        all_passed = np.maximum(passed.sum(axis=0), 1)
        mapped = np.clip((counts.sum() - self._mapped_at[leaves]) / all_passed, 0.0, 1.0)
        flushed = np.maximum(looked, self._flushed[:, np.newaxis])
        since_flush = np.minimum(np.maximum(now - flushed, 0), passed * mapped)
        ends = (share / place) * -np.expm1(since_flush * _log1m(place))
        cached = self._rng.random(ends.shape) < ends

        known = self._known(blocks, leaves, counts)
        where = known.vcpus, known.columns
        set_flag, still = self._outcome(known, share[known.columns], place[known.columns])
        # Only up to a flush did they start cached; without one nothing else happened to them.
        passed[where] = np.where(known.flushed, counts[known.vcpus] - known.until, 0)
        cached[where] &= known.flushed
        hit = cached.any(axis=0)
        hit[known.columns[set_flag]] = True
        log_clear = np.minimum(passed * _log1m(share) - _log1m(ends), 0.0)
        log_clear[where] = np.where(known.flushed, log_clear[where], 0.0)
        log_clear[cached] = 0.0
        cached[where] |= still & ~known.flushed
        self._keep(blocks, leaves, cached, counts)
        return log_clear.sum(axis=0), hit

    def _outcome(self, known: Known, share: Float64s, place: Float64s) -> tuple[Bools, Bools]:
        """Whether touches set the flags of pages that were cached, and they are cached still."""
        touches = np.maximum(known.until - known.since, 0)
        others = np.maximum(place - share, 0.0)
        stayed = np.exp(touches * _log1m(others))
        clear = never_missed(share, others, touches)
        untouched = np.exp(touches * _log1m(place))
        ends = untouched + (share / place) * (1 - untouched)
        drawn = self._rng.random(len(touches))
        set_flag = drawn >= clear
        still = (drawn < stayed) | (set_flag & (drawn < clear + ends - stayed))
        return set_flag, still

    def _known(self, blocks: range, leaves: Int64s, counts: Int64s) -> Known:
        """What is known to have been cached of ``leaves``, which lie in ``blocks``."""
        # What a vCPU faulted on since, unless a flush or another fault put an end to it.
        places = leaves % self._places
        at = self._faulted_at[:, places]
        vcpus, columns = np.nonzero(
            (self._faulted[:, places] == leaves) & (at > self._flushed[:, np.newaxis])
        )
        parts = [_known(Cached(vcpus, leaves[columns], at[vcpus, columns]), counts, False)]
        self._faulted[vcpus, places[columns]] = -1
        for block in blocks:
            if block in self._cached:
                flush = self._flushes.get(int(self._seen[block]))
                until = counts if flush is None else flush
                parts.append(_known(self._cached.pop(block), until, flush is not None))
        self._seen[blocks.start : blocks.stop] = self._flush
        known = Known(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        # What was unmapped is not looked at; of a page cached and faulted on the latter counts.
        columns = np.searchsorted(leaves, known.columns)
        there = np.flatnonzero(np.isin(known.columns, leaves))
        codes = known.vcpus[there] * len(leaves) + columns[there]
        there = there[np.unique(codes, return_index=True)[1]]
        return known._replace(columns=columns).take(there)

    def _keep(self, blocks: range, leaves: Int64s, cached: Bools, counts: Int64s) -> None:
        vcpus, column = np.nonzero(cached)
        where = leaves[column]
        of = where // self._size
        for block in blocks:
            here = of == block
            if here.any():
                by = vcpus[here]
                self._cached[block] = Cached(by, where[here], counts[by])

    def mapped(self, leaf: int, total: int) -> None:
        """``leaf`` was mapped when all vCPUs together had made ``total`` touches."""
        if self.hides:
            self._mapped_at[leaf] = total

    def touched(self, vcpu: int, leaf: int, touches: int) -> None:
        """``vcpu`` has made ``touches``, the last one of ``leaf``, for sure."""
        if self.hides:
            self._faulted[vcpu, leaf % self._places] = leaf
            self._faulted_at[vcpu, leaf % self._places] = touches

    def flush(self, t_ns: int) -> None:
        """All translations go at ``t_ns``."""
        if not self.hides:
            return
        self._flushed = np.maximum(self._flushed, self._counts(t_ns))
        self._flushes[self._flush] = self._flushed
        self._flush += 1
        if len(self._flushes) > 2 * len(self._cached) + KEPT:
            asked = {int(self._seen[block]) for block in self._cached}
            self._flushes = {n: self._flushes[n] for n in asked if n in self._flushes}

    def occupied(self, touches: int) -> int:
        """Places of an empty TLB that are taken after ``touches``: the mean, rounded."""
        return round(float(-np.expm1(touches * _log1m(self.place_shares)).sum()))


def _known(cached: Cached, until: Int64s, flushed: bool) -> Known:
    """``cached``, whose leaves are not columns yet, ``until`` so many touches of each vCPU."""
    vcpus, leaves, since = cached
    return Known(vcpus, leaves, since, until[vcpus], np.full(len(vcpus), flushed))


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
