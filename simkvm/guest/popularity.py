"""How popularity falls with rank, and where the ranks lie in a guest's memory."""

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Uint32s = npt.NDArray[np.uint32]
Float64s = npt.NDArray[np.float64]
Key = TypeVar("Key")
Array = TypeVar("Array", bound=npt.NDArray[Any])

BLOCK_RANKS = 4096


def scattered(pages: int, layout_rng: np.random.Generator) -> Uint32s:
    """A random permutation of the page numbers, shape (pages,): rank to page.

    Draws one number from ``layout_rng``. Generators that are in the same state get the same array,
    once in memory.
    """
    seed = int(layout_rng.integers(2**63))

    def permute() -> Uint32s:
        return np.random.default_rng(seed).permutation(np.arange(pages, dtype=np.uint32))

    return _shared(_SCATTERED, (pages, seed), permute)


def zipf_cumulative(pages: int, exponent: float) -> Float64s:
    """Sums of r ** -exponent over ranks r = 1..k, shape (pages,) for k = 1..pages.

    One array per (pages, exponent), in blocks, so that nothing but the result is large.
    """

    def accumulate() -> Float64s:
        sums = np.empty(pages, dtype=np.float64)
        total = 0.0
        for start in range(0, pages, BLOCK_RANKS):
            part = sums[start : start + BLOCK_RANKS]
            part[:] = zipf_weights(np.arange(start + 1, start + part.size + 1), exponent)
            part[0] += total
            np.cumsum(part, out=part)
            total = float(part[-1])
        return sums

    return _shared(_ZIPF, (pages, exponent), accumulate)


LN2_HIGH = 6.93147180369123816490e-01  # 32 bits, so that small multiples are exact
LN2_LOW = 1.90821492927058770002e-10


def zipf_weights(ranks: Int64s, exponent: float) -> Float64s:
    """``ranks ** -exponent`` to about 1e-14, the same bits on every machine.

    NumPy's own power takes another code path for each instruction set, and the last bit decides now
    and then which page a draw falls on. IEEE division, products and sums do not differ: logarithm
    by the series of atanh, exponential by Taylor's.
    """
    mantissa, binary_exponent = np.frexp(ranks.astype(np.float64))
    low = mantissa < 0.7
    mantissa, binary_exponent = np.where(low, 2.0 * mantissa, mantissa), binary_exponent - low
    ratio = (mantissa - 1.0) / (mantissa + 1.0)  # at most 0.18, and 0 for a power of two
    square = ratio * ratio
    series = np.zeros_like(ratio)
    for odd in range(23, 0, -2):
        series = series * square + 1.0 / odd
    log = binary_exponent * LN2_HIGH + (binary_exponent * LN2_LOW + 2.0 * ratio * series)

    power = np.maximum(-exponent * log, -1000.0)  # below, the weight is zero anyhow
    halvings = np.rint(power / LN2_HIGH)
    rest = (power - halvings * LN2_HIGH) - halvings * LN2_LOW
    taylor = np.ones_like(rest)
    for term in range(16, 0, -1):
        taylor = taylor * rest / term + 1.0
    return np.ldexp(taylor, halvings.astype(np.int32))


# Large arrays shared by the vCPUs that use them and freed with the last one. They are pure
# functions of their key, so a second run cannot tell whether it found one here.
_SCATTERED: WeakValueDictionary[tuple[int, int], Uint32s] = WeakValueDictionary()
_ZIPF: WeakValueDictionary[tuple[int, float], Float64s] = WeakValueDictionary()


def _shared(in_use: WeakValueDictionary[Key, Array], key: Key, make: Callable[[], Array]) -> Array:
    array = in_use.get(key)
    if array is None:
        array = make()
        array.flags.writeable = False
        in_use[key] = array
    return array
