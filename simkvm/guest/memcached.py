"""A key-value server as memcached is one: where items lie, what a request touches.

Source: memcached 1.6, slabs.c (``slabs_init``), items.c, assoc.c, thread.c. A hash table of
pointers; behind it slabs of 1 MiB, each cut into equal chunks of the class that an item needs. An
item does not straddle slabs, but as a chunk is no divisor of a page it may straddle pages. A GET
looks its bucket up and writes the item's header (reference count, time of access); a SET writes
bucket and item.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from simkvm.guest.jobs import BATCH_JOBS, ENDLESS, Bools, Int64s, Jobs, Seat, Stage, loading
from simkvm.guest.popularity import zipf_cumulative
from simkvm.scenario.workloads import Memcached

SLAB_BYTES: Final = 1 << 20  #: settings.slab_page_size
CHUNK_BYTES: Final = 48  #: settings.chunk_size: the least space of a smallest item
HEADER_BYTES: Final = 48  #: sizeof(item)
CAS_BYTES: Final = 8
GROWTH_HUNDREDTHS: Final = 125  #: settings.factor, 1.25
ALIGN_BYTES: Final = 8
FIRST_HASH_POWER: Final = 16
POINTER_BYTES: Final = 8
KEY_PREFIX: Final = len("memtier-")
MIX: Final = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  #: of SplitMix64


def item_bytes(keys: int, value_size: int) -> int:
    """Header, CAS number, key with its zero, value with its line end (``item_make_header``).

    Keys are called memtier-N, N up to ``keys``.
    """
    return HEADER_BYTES + CAS_BYTES + KEY_PREFIX + len(str(keys)) + 1 + value_size + 2


def chunk_bytes(item: int) -> int:
    """The chunk of the slab class that an item of ``item`` bytes goes to (``slabs_init``)."""
    largest = SLAB_BYTES // 2  # settings.slab_chunk_size_max
    size = HEADER_BYTES + CHUNK_BYTES
    while size < item:
        size = size * GROWTH_HUNDREDTHS // 100
        if size * GROWTH_HUNDREDTHS >= largest * 100:
            return largest
        size = -(-size // ALIGN_BYTES) * ALIGN_BYTES
    return size


class Layout(NamedTuple):
    """Where table and items lie, in bytes from the start of the guest's memory."""

    buckets: int
    slabs_at: int
    item: int
    chunk: int
    end: int

    @classmethod
    def of(cls, access: Memcached) -> Layout:
        """The layout of ``access``.

        The table is doubled at 1.5 items a bucket (``assoc_start_expand``).
        """
        power = FIRST_HASH_POWER
        while access.keys > 3 * (1 << power) // 2:
            power += 1
        table = (1 << power) * POINTER_BYTES
        slabs_at = -(-table // SLAB_BYTES) * SLAB_BYTES
        item = item_bytes(access.keys, access.value_size)
        chunk = chunk_bytes(item)
        slabs = -(-access.keys // (SLAB_BYTES // chunk))
        return cls(1 << power, slabs_at, item, chunk, slabs_at + slabs * SLAB_BYTES)

    def items_at(self, keys: Int64s) -> Int64s:
        """Where the items of ``keys`` begin."""
        each = SLAB_BYTES // self.chunk
        at: Int64s = self.slabs_at + keys // each * SLAB_BYTES + keys % each * self.chunk
        return at

    def pages(self, keys: int, page: int) -> Int64s:
        """The pages of ``page`` bytes that hold the table and ``keys`` items, in order."""
        table = np.arange(-(-self.buckets * POINTER_BYTES // page))
        last = int(self.items_at(np.array([keys - 1]))[0]) + self.item - 1
        return np.concatenate((table, np.arange(self.slabs_at // page, last // page + 1)))

    def buckets_at(self, keys: Int64s) -> Int64s:
        """Where the buckets of ``keys`` lie: a hash that spreads them evenly."""
        x = keys.astype(np.uint64) + np.uint64(MIX[0])
        x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX[1])
        x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX[2])
        x ^= x >> np.uint64(31)
        at: Int64s = (x & np.uint64(self.buckets - 1)).astype(np.int64) * POINTER_BYTES
        return at


class Server:
    """The worker threads of a vCPU: the requests of their connections."""

    def __init__(self, access: Memcached, seat: Seat) -> None:
        self.access = access
        self.seat = seat
        self.layout = Layout.of(access)
        self.clients = len(range(seat.vcpu, access.clients, seat.vcpus))
        self._cumulative = (
            zipf_cumulative(access.keys, float(access.exponent))
            if access.keys_drawn == "zipf"
            else None
        )

    def stages(self) -> Iterator[Stage]:
        """All items stored, then requests."""
        access, seat = self.access, self.seat
        yield from loading(access, seat, self.layout.pages(access.keys, seat.page_bytes))
        if not self.clients:
            return
        # Connections are not all opened in the same moment, but within one round of a client.
        spread = access.network + access.think + 1
        first = seat.rng.integers(0, spread, self.clients).tolist()
        each = ENDLESS if access.requests is None else access.requests
        yield Stage(
            self._batches(),
            first_ns=tuple(access.network // 2 + at for at in first),
            each=each,
            extra_ns=access.network,
            requests=True,
            threads=access.threads,
        )

    def _batches(self) -> Iterator[Jobs]:
        access = self.access
        left = ENDLESS if access.requests is None else access.requests * self.clients
        while left > 0:
            count = min(left, BATCH_JOBS)
            left -= count
            keys = self._keys()
            writes = self.seat.rng.random(BATCH_JOBS) >= access.get_ratio
            # From the end of a request to the arrival of its client's next one.
            gaps = access.network + self._times(access.think, access.think_law)
            service = self._times(access.service, access.service_law)
            first = slice(count)
            yield self._jobs(
                keys[first], writes[first], service[first], gaps[first], last=left == 0
            )

    def _times(self, mean_ns: int, law: str) -> Int64s:
        """Times of the requests of a batch."""
        if law == "constant":
            return np.full(BATCH_JOBS, mean_ns, np.int64)
        times: Int64s = np.rint(self.seat.rng.exponential(mean_ns, BATCH_JOBS)).astype(np.int64)
        return times

    def _keys(self) -> Int64s:
        access, rng = self.access, self.seat.rng
        if self._cumulative is not None:
            mass = rng.random(BATCH_JOBS) * self._cumulative[-1]
            ranks: Int64s = np.searchsorted(self._cumulative[:-1], mass, side="right")
            return ranks.astype(np.int64)
        if access.keys_drawn == "gaussian":
            return gaussian(rng, access.keys, access.sd or access.keys / 6, BATCH_JOBS)
        return rng.integers(0, access.keys, BATCH_JOBS, dtype=np.int64)

    def _jobs(self, keys: Int64s, sets: Bools, service: Int64s, gaps: Int64s, last: bool) -> Jobs:
        """Bucket, then the item's pages in order."""
        seat, layout = self.seat, self.layout
        page = seat.page_bytes
        begin = layout.items_at(keys)
        first, final = begin // page, (begin + layout.item - 1) // page
        header = (begin + HEADER_BYTES + CAS_BYTES - 1) // page
        width = 2 + (layout.item - 1 + page - 1) // page
        item_pages = first[:, None] + np.arange(width - 1)
        pages = np.column_stack((layout.buckets_at(keys) // page, item_pages))
        writes = np.column_stack((sets, sets[:, None] | (item_pages <= header[:, None])))
        kept = np.column_stack((np.ones(len(keys), np.bool_), item_pages <= final[:, None]))
        counts = kept.sum(axis=1)
        at = service[:, None] // 2 + np.arange(width) * seat.touch_ns
        return Jobs(
            offsets=np.concatenate(([0], np.cumsum(counts))),
            pages=pages[kept],
            writes=writes[kept],
            at_ns=at[kept],
            total_ns=service + counts * seat.touch_ns,
            gap_ns=gaps,
            work=np.ones(len(keys), np.int64),
            last=last,
        )


def gaussian(rng: np.random.Generator, keys: int, sd: float, count: int) -> Int64s:
    """``count`` keys around the middle one; what falls beyond the ends is drawn again (memtier)."""
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        more = np.floor(rng.standard_normal(count) * sd + keys / 2)
        drawn = np.append(drawn, more[(more >= 0) & (more < keys)].astype(np.int64))
    return drawn[:count]


def touched_bytes(access: Memcached) -> int:
    """Memory that table and items take."""
    return Layout.of(access).end
