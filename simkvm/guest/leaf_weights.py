"""How often each leaf of a guest is touched, of all its touches: the weights of a drawn pattern.

For patterns whose touches are independent draws, the same for all vCPUs. Weights are integers, so
that the sum over any set of leaves is exact and does not depend on the order in which they came.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from simkvm.guest.popularity import scattered, zipf_weights
from simkvm.scenario.access import HotCold, Uniform, Zipf

Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

SCALE: Final = float(1 << 60)  #: the weight of all leaves together, about
PART: Final = 1 << 20  #: leaves or pages whose arrays are made at once


class LeafWeights(Protocol):
    """``total``: the weights of all ``leaves`` together."""

    leaves: int
    total: int

    def of(self, first: int, last: int) -> Int64s:
        """Weights of the leaves ``first`` up to ``last``."""
        ...

    def at(self, leaf: int) -> int:
        """The weight of one leaf."""
        ...

    def take(self, leaves: Int64s) -> Int64s:
        """Weights of ``leaves``."""
        ...


class Equal:
    """All leaves alike."""

    def __init__(self, leaves: int) -> None:
        self.leaves = leaves
        self.total = leaves

    def of(self, first: int, last: int) -> Int64s:
        """As :meth:`LeafWeights.of`."""
        return np.ones(last - first, np.int64)

    def at(self, leaf: int) -> int:
        """As :meth:`LeafWeights.at`."""
        return 1

    def take(self, leaves: Int64s) -> Int64s:
        """As :meth:`LeafWeights.take`."""
        return np.ones(len(leaves), np.int64)


class Shares:
    """By each leaf's share of all touches, shape (leaves,): four bytes a leaf."""

    def __init__(self, shares: Float32s) -> None:
        self._shares = shares
        self.leaves = len(shares)
        self.total = sum(
            int(self.of(first, min(first + PART, self.leaves)).sum())
            for first in range(0, self.leaves, PART)
        )

    def of(self, first: int, last: int) -> Int64s:
        """As :meth:`LeafWeights.of`."""
        return (self._shares[first:last].astype(np.float64) * SCALE).astype(np.int64)

    def at(self, leaf: int) -> int:
        """As :meth:`LeafWeights.at`."""
        return int(float(self._shares[leaf]) * SCALE)

    def take(self, leaves: Int64s) -> Int64s:
        """As :meth:`LeafWeights.take`."""
        return (self._shares[leaves].astype(np.float64) * SCALE).astype(np.int64)


def leaf_weights(
    access: Any, leaves: int, leaf_pages: int, layout_rng: np.random.Generator
) -> LeafWeights:
    """The weights of ``leaves`` leaves, each of ``leaf_pages`` pages, where vCPUs do ``access``.

    ``layout_rng`` in the state that :func:`simkvm.guest.patterns.build` gets it in gives the same
    popular pages; it is drawn from.
    """
    pages = leaves * leaf_pages
    if isinstance(access, Uniform) or pages == 1:
        return Equal(leaves)
    if isinstance(access, HotCold):
        hot = round(access.hot_ratio * pages)
        if hot in (0, pages):
            return Equal(leaves)
        by_rank = _hot_cold(access.hot_access_ratio, hot, pages)
    else:
        assert isinstance(access, Zipf)
        by_rank = _zipf(float(access.exponent), pages)
    by_page = np.empty(pages, np.float32)
    by_page[scattered(pages, layout_rng)] = by_rank
    if leaf_pages == 1:
        return Shares(by_page)
    return Shares(by_page.reshape(-1, leaf_pages).sum(axis=1, dtype=np.float64).astype(np.float32))


def _hot_cold(ratio: float, hot: int, pages: int) -> Float32s:
    shares = np.full(pages, (1 - ratio) / (pages - hot), np.float32)
    shares[:hot] = ratio / hot
    return shares


def _zipf(exponent: float, pages: int) -> Float32s:
    shares = np.empty(pages, np.float32)
    total = 0.0
    for first in range(0, pages, PART):
        ranks = np.arange(first + 1, min(first + PART, pages) + 1)
        part = zipf_weights(ranks, exponent)
        shares[first : first + len(part)] = part
        total += float(np.add.reduce(np.add.reduceat(part, np.arange(0, len(part), 1024))))
    shares /= np.float32(total)
    return shares
