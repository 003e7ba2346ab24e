"""Access patterns: which guest pages a vCPU touches, in which order, with what pauses.

A pattern is a small class that yields :class:`Chunk` objects, so that an endless pattern costs no
more memory than a short one. Randomness comes only from the generators handed in: ``rng`` belongs
to the vCPU, while ``layout_rng`` fixes where the popular pages lie and must be seeded alike for all
vCPUs of a guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from simkvm.guest.popularity import scattered, zipf_cumulative
from simkvm.guest.trace import Trace, read_header, read_trace
from simkvm.scenario.errors import InputError

if TYPE_CHECKING:
    from simkvm.scenario import access as schema

    DrawnAccess = schema.Uniform | schema.Zipf | schema.HotCold

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CHUNK_TOUCHES = 4096
"""Most touches in a chunk. A part of the model: chunk by chunk, pages are drawn before writes."""

FEMTO_PER_NANO = 10**6


@dataclass(frozen=True)
class Chunk:
    """Up to :data:`CHUNK_TOUCHES` touches in order.

    ``pages``: guest page numbers from 0, shape (n,). ``writes``: shape (n,). ``gaps_ns``: what the
    guest computes after each touch and before the next, one number for all or shape (n,).
    """

    pages: Int64s
    writes: Bools
    gaps_ns: int | Int64s


@dataclass(frozen=True)
class Place:
    """Where a pattern runs: on vCPU ``vcpu`` of a guest's ``vcpus``, with what randomness.

    The guest has ``pages`` pages of ``page_bytes``; see :func:`build` for the rest.
    """

    vcpu: int
    vcpus: int
    pages: int
    page_bytes: int
    rng: np.random.Generator
    layout_rng: np.random.Generator
    base_dir: Path
    instruction_ns: float


class Pattern(Protocol):
    """What the registry holds. ``access`` is the pattern's model in ``scenario/schema.py``."""

    def __init__(self, access: Any, place: Place) -> None: ...

    def chunks(self) -> Iterator[Chunk]:
        """The touches, from the first. An endless pattern never returns."""

    @staticmethod
    def finite(access: Any) -> bool:
        """Whether the pattern ends."""

    @staticmethod
    def touches(access: Any, pages: int, vcpus: int, base_dir: Path) -> int | None:
        """Touches of all vCPUs together, None if endless."""


def build(
    access: Any,
    *,
    vcpu: int,
    vcpus: int,
    pages: int,
    page_bytes: int,
    rng: np.random.Generator,
    layout_rng: np.random.Generator,
    base_dir: str | Path = ".",
    instruction_ns: float = 0.0,
) -> Iterator[Chunk]:
    """The touches of one vCPU, in chunks.

    ``layout_rng`` is copied, never advanced: hand the same object (or equally seeded ones) to every
    vCPU of a guest and all agree on which pages are popular. Files of traces are looked up from
    ``base_dir``, and each instruction of a trace takes ``instruction_ns``. Raises InputError for a
    trace that cannot be replayed.
    """
    place = Place(
        vcpu, vcpus, pages, page_bytes, rng, deepcopy(layout_rng), Path(base_dir), instruction_ns
    )
    return _pattern(access, place).chunks()


def finite(access: Any) -> bool:
    """Whether the pattern ends by itself."""
    return PATTERNS[access.pattern].finite(access)


def touches(access: Any, pages: int, vcpus: int, base_dir: str | Path = ".") -> int | None:
    """Touches of all ``vcpus`` of a guest of ``pages`` pages together; None if it never ends."""
    return PATTERNS[access.pattern].touches(access, pages, vcpus, Path(base_dir))


def _pattern(access: Any, place: Place) -> Pattern:
    return PATTERNS[access.pattern](access, place)


class Populate:
    """Every page of the vCPU's own share in ascending order, ``repeat`` times."""

    def __init__(self, access: schema.Populate, place: Place) -> None:
        self.access = access
        self.low = place.vcpu * place.pages // place.vcpus
        self.high = (place.vcpu + 1) * place.pages // place.vcpus

    def chunks(self) -> Iterator[Chunk]:
        """Rounds over the share; a chunk never spans two rounds."""
        for _ in range(self.access.repeat):
            step = self.access.every
            for start in range(self.low, self.high, step * CHUNK_TOUCHES):
                end = min(start + step * CHUNK_TOUCHES, self.high)
                pages = np.arange(start, end, step, dtype=np.int64)
                yield Chunk(pages, np.full(pages.size, self.access.write), self.access.think)

    @staticmethod
    def finite(_access: schema.Populate) -> bool:
        """Always."""
        return True

    @staticmethod
    def touches(access: schema.Populate, pages: int, vcpus: int, _base_dir: Path) -> int:
        """The shares of all vCPUs cover every page (or every n-th of each share) once a round."""
        shares = (pages * n // vcpus - pages * (n - 1) // vcpus for n in range(1, vcpus + 1))
        return sum(-(-share // access.every) for share in shares) * access.repeat


class Drawn:
    """Independent draws; a subclass says of which page. ``touches`` is per vCPU.

    Every chunk is drawn whole and then cut, so that a longer run starts with the shorter one's
    touches.
    """

    def __init__(self, access: DrawnAccess, place: Place) -> None:
        self.access = access
        self.pages = place.pages
        self.rng = place.rng

    def draw(self, count: int) -> Int64s:
        """``count`` page numbers."""
        raise NotImplementedError

    def chunks(self) -> Iterator[Chunk]:
        """Chunks until ``touches`` are done, or for ever."""
        left = self.access.touches
        while left is None or left > 0:
            pages = self.draw(CHUNK_TOUCHES)
            writes = self.rng.random(CHUNK_TOUCHES) < self.access.write_ratio
            count = CHUNK_TOUCHES if left is None else min(left, CHUNK_TOUCHES)
            yield Chunk(pages[:count], writes[:count], self.access.think)
            left = None if left is None else left - count

    @staticmethod
    def finite(access: DrawnAccess) -> bool:
        """If ``touches`` is a number."""
        return access.touches is not None

    @staticmethod
    def touches(access: DrawnAccess, _pages: int, vcpus: int, _base_dir: Path) -> int | None:
        """Each vCPU makes ``touches``."""
        return None if access.touches is None else access.touches * vcpus


class Uniform(Drawn):
    """Every page of the guest is as likely as any other."""

    def draw(self, count: int) -> Int64s:
        """Uniform page numbers, without modulo bias."""
        return self.rng.integers(0, self.pages, count, dtype=np.int64)


class Zipf(Drawn):
    """The page of rank r (from 1) has a probability proportional to r ** -exponent.

    Ranks lie scattered over the pages. Exact inversion of the bounded distribution, for any
    exponent >= 0. Costs 12 bytes a guest page, shared by all vCPUs.
    """

    def __init__(self, access: schema.Zipf, place: Place) -> None:
        super().__init__(access, place)
        self.cumulative = zipf_cumulative(place.pages, float(access.exponent))
        self.page_of_rank = scattered(place.pages, place.layout_rng)

    def draw(self, count: int) -> Int64s:
        """Inverse distribution function of ``count`` uniform numbers."""
        mass = self.rng.random(count) * self.cumulative[-1]
        # The product may round up to the total, which lies beyond the last rank.
        ranks = np.searchsorted(self.cumulative[:-1], mass, side="right")
        pages: Int64s = self.page_of_rank[ranks].astype(np.int64)
        return pages


class HotCold(Drawn):
    """A touch goes to the hot set with probability ``hot_access_ratio``, to the cold one otherwise.

    Both are uniform within. The hot set is the first ``hot_ratio`` of the pages in scattered order,
    rounded to a whole page.
    """

    def __init__(self, access: schema.HotCold, place: Place) -> None:
        super().__init__(access, place)
        self.hot_access_ratio = access.hot_access_ratio
        self.hot_pages = round(access.hot_ratio * place.pages)
        self.page_of_rank = scattered(place.pages, place.layout_rng)

    def draw(self, count: int) -> Int64s:
        """Draws from both sets, of which one is taken; an empty set gets no touch."""
        hot = self.rng.random(count) < self.hot_access_ratio
        if self.hot_pages in (0, self.pages):
            ranks = self.rng.integers(0, self.pages, count)
        else:
            in_hot = self.rng.integers(0, self.hot_pages, count)
            in_cold = self.rng.integers(self.hot_pages, self.pages, count)
            ranks = np.where(hot, in_hot, in_cold)
        pages: Int64s = self.page_of_rank[ranks].astype(np.int64)
        return pages


class Phases:
    """Patterns one after the other, the whole sequence ``repeat`` times (None: for ever).

    Each phase has a layout of its own, which it finds again in the next round: the hot set moves
    from phase to phase. All phases draw from the vCPU's one stream.
    """

    def __init__(self, access: schema.Phases, place: Place) -> None:
        self.repeat = access.repeat
        self.phases = [_pattern(phase, place) for phase in access.phases]

    def chunks(self) -> Iterator[Chunk]:
        """Round after round."""
        done = 0
        touched = True
        # A round without a touch (more vCPUs than pages) would otherwise spin for ever.
        while touched and (self.repeat is None or done < self.repeat):
            touched = False
            for phase in self.phases:
                for chunk in phase.chunks():
                    touched = True
                    yield chunk
            done += 1

    @staticmethod
    def finite(access: schema.Phases) -> bool:
        """If the sequence and every phase in it end."""
        return access.repeat is not None and all(finite(phase) for phase in access.phases)

    @staticmethod
    def touches(access: schema.Phases, pages: int, vcpus: int, base_dir: Path) -> int | None:
        """The sum over phases and rounds."""
        counts = [touches(phase, pages, vcpus, base_dir) for phase in access.phases]
        known = [count for count in counts if count is not None]
        if access.repeat is None or len(known) < len(counts):
            return None
        return access.repeat * sum(known)


class Replay:
    """A recorded trace, replayed by each vCPU on a copy of its own.

    vCPU v's copy begins at page v times the footprint. After a touch the guest computes for
    ``instruction_ns`` times the instructions up to the next record, plus ``think``. Sums are exact
    to a femtosecond an instruction and rounded down once, so nothing drifts.
    """

    def __init__(self, access: schema.Trace, place: Place) -> None:
        self.access = access
        self.page_bytes = place.page_bytes
        self.femto_per_instruction = round(place.instruction_ns * FEMTO_PER_NANO)
        path = place.base_dir / access.file
        self.trace = read_trace(path)
        footprint = footprint_pages(path, place.page_bytes)
        if footprint * place.vcpus > place.pages:
            raise InputError(
                f"trace needs {footprint} pages for each of {place.vcpus} vCPUs, "
                f"the guest has {place.pages}",
                file=str(path),
            )
        self.first_page = footprint * place.vcpu

    def chunks(self) -> Iterator[Chunk]:
        """Round after round; a chunk never spans two rounds."""
        done = 0
        rest = 0
        while self.access.repeat is None or done < self.access.repeat:
            for start in range(0, self.trace.header.touches, CHUNK_TOUCHES):
                chunk, rest = self._chunk(slice(start, start + CHUNK_TOUCHES), rest)
                yield chunk
            done += 1

    def _chunk(self, part: slice, rest: int) -> tuple[Chunk, int]:
        """The touches of ``part``; ``rest`` is the fraction of a nanosecond (in fs) still owed."""
        addresses = self.trace.page[part].astype(np.int64) * self.trace.header.page_size
        whole, fraction = divmod(self.femto_per_instruction, FEMTO_PER_NANO)
        after = instructions_after(self.trace, part)
        owed = np.cumsum(after) * fraction + rest
        gaps = np.diff(owed // FEMTO_PER_NANO, prepend=0) + after * whole + self.access.think
        pages = addresses // self.page_bytes + self.first_page
        return Chunk(pages, self.trace.write[part], gaps), int(owed[-1] % FEMTO_PER_NANO)

    @staticmethod
    def finite(access: schema.Trace) -> bool:
        """If ``repeat`` is a number."""
        return access.repeat is not None

    @staticmethod
    def touches(access: schema.Trace, _pages: int, vcpus: int, base_dir: Path) -> int | None:
        """Records, times rounds, times vCPUs."""
        if access.repeat is None:
            return None
        return read_header(base_dir / access.file).touches * access.repeat * vcpus


def footprint_pages(path: str | Path, page_bytes: int) -> int:
    """Guest pages of ``page_bytes`` that one copy of the trace at ``path`` spans.

    That is a whole number of 2-MiB regions. Raises InputError if the trace cannot be read or was
    reduced to larger pages than the guest's.
    """
    header = read_header(path)
    if header.page_size > page_bytes:
        raise InputError(
            f"trace has pages of {header.page_size} bytes, larger than the guest's {page_bytes}; "
            "import it again with a smaller page size",
            file=str(path),
        )
    return -(-header.pages * header.page_size // page_bytes)


def instructions_after(trace: Trace, part: slice) -> Int64s:
    """Instructions between each record of ``part`` and the next one, shape of ``part``.

    After the last record come those up to the program's end and those before its first record, so
    that a round takes exactly the program's instructions.
    """
    start, stop, _ = part.indices(trace.header.touches)
    after = np.empty(stop - start, dtype=np.int64)
    after[:-1] = trace.instructions[start + 1 : stop]
    if stop < trace.header.touches:
        after[-1] = trace.instructions[stop]
    else:
        after[-1] = trace.header.instructions_after_last + int(trace.instructions[0])
    return after


PATTERNS: dict[str, type[Pattern]] = {
    "populate": Populate,
    "uniform": Uniform,
    "zipf": Zipf,
    "hot_cold": HotCold,
    "phases": Phases,
    "trace": Replay,
}
"""Adding a pattern: a class as above, a line here, its model in ``scenario/schema.py``, a test."""
