"""Importer of what ``valgrind --tool=lackey --trace-mem=yes`` prints: every access of a program.

A line is a kind, an address in hexadecimal and a size: ``I  0401ab70,3`` fetches an instruction,
`` L`` loads, `` S`` stores, `` M`` modifies in place (valgrind/lackey/lk_main.c, 3.19). Lines that
begin with ``==``, ``--`` or ``**`` are valgrind's own. Hundreds of millions of them are common, so
the text is read in blocks and parsed by NumPy, and only the reduction to pages is kept.

The reduction. Every access counts, fetches too, at page granularity; one that spans two pages
touches both. An access is dropped if its page is among the ``window`` distinct pages recorded last
and needs no new permission: a write to a page that was only read since it came into the window is
recorded. Recency is that of records, not of accesses, so a page in constant use comes again after
``window`` others and is never lost from sight. Then addresses are compacted: each 2-MiB region
with any touch becomes the next 2-MiB region of the trace, in address order.
"""

import gzip
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from simkvm.guest.trace import (
    REGION_BYTES,
    RawCounts,
    Trace,
    TraceHeader,
    assemble,
    write_trace,
)
from simkvm.scenario.errors import InputError, nearest

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]
Uint8s = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

BLOCK_BYTES = 8 << 20
MAX_ADDRESS_DIGITS = 16
MAX_SIZE_DIGITS = 4
NO_DIGIT = 255
FETCH, LOAD, STORE, MODIFY = (ord(letter) for letter in "ILSM")


def convert(
    source_path: str,
    out_path: str | Path,
    *,
    page_size: int = 4096,
    window: int = 16,
    program: str | None = None,
) -> TraceHeader:
    """Reduce the recording at ``source_path`` to a trace file at ``out_path``; return its header.

    ``-`` is standard input, a name that ends in ``.gz`` is decompressed. Without ``program`` the
    command that valgrind reported is kept. Raises InputError as :func:`import_lackey`, and if a
    file or folder is missing; nothing is written then.
    """
    folder = Path(out_path).parent
    if not folder.is_dir():
        raise InputError("no such folder", file=str(folder))
    with _opened(source_path) as stream:
        trace = import_lackey(
            stream, page_size, window, program=program, name=_shown_name(source_path)
        )
    write_trace(out_path, trace)
    return trace.header


def import_lackey(
    lines: BinaryIO,
    page_size: int = 4096,
    window: int = 16,
    *,
    program: str | None = None,
    name: str | None = None,
) -> Trace:
    """The trace of a recording, read to its end. Memory grows with records, not with lines.

    ``page_size``: bytes, a power of two from 4 KiB to 2 MiB. ``window``: distinct pages, at least
    1. Raises InputError, with the line's number, if a line is malformed or the last one incomplete,
    and if there is no access at all. ``name`` is what errors call the file.
    """
    if page_size & (page_size - 1) or not 4096 <= page_size <= REGION_BYTES:
        raise InputError(f"page size {page_size} is not a power of two from 4 KiB to 2 MiB")
    if window < 1:
        raise InputError(f"window {window} is not at least 1")
    remarks = _Remarks()
    reduction = Reduction(page_size, window)
    for block, first_line in _blocks(lines, name):
        accesses, comments = parse(block, first_line, name)
        remarks.read(comments)
        reduction.feed(accesses)
    return reduction.trace(
        program=remarks.program if program is None else program,
        valgrind=remarks.valgrind,
        name=name,
    )


@dataclass(frozen=True)
class Accesses:
    """Accesses in the order of their lines; each array has the shape (lines,)."""

    kind: Uint8s
    address: Uint64s
    size: Int64s


def parse(block: bytes, first_line: int, name: str | None = None) -> tuple[Accesses, list[bytes]]:
    """The accesses and valgrind's own lines of a block of whole lines.

    ``first_line`` is the number of the block's first line. Raises InputError at a malformed line.
    """
    text = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    starts = np.concatenate(([0], ends[:-1] + 1))
    own = np.isin(text[starts], np.frombuffer(b"=-*", dtype=np.uint8))
    comments = [block[start:end] for start, end in zip(starts[own], ends[own], strict=True)]
    accesses, valid = _parse_lines(text, starts[~own], ends[~own])
    if not valid.all():
        bad = int(np.flatnonzero(~own)[np.argmin(valid)])
        shown = block[starts[bad] : ends[bad]][:60].decode(errors="replace")
        raise InputError(f"not a line of lackey: {shown!r}", file=name, line=first_line + bad)
    return accesses, comments


def _parse_lines(text: Uint8s, starts: Int64s, ends: Int64s) -> tuple[Accesses, Bools]:
    """The accesses on the lines ``text[starts:ends]``, and which of them are well formed."""
    end_of_text = text.size - 1
    first, second, third = (text[np.minimum(starts + at, end_of_text)] for at in range(3))
    fetch = (first == FETCH) & (second == ord(" "))
    data = (first == ord(" ")) & ((second == LOAD) | (second == STORE) | (second == MODIFY))
    commas = np.append(np.flatnonzero(text == ord(",")), end_of_text)
    comma = commas[np.searchsorted(commas, np.minimum(starts, end_of_text))]
    address, good_address = _number(text, comma, comma - starts - 3, 16, MAX_ADDRESS_DIGITS)
    size, good_size = _number(text, ends, ends - comma - 1, 10, MAX_SIZE_DIGITS)
    valid = (fetch | data) & (third == ord(" ")) & good_address & good_size & (size > 0)
    return Accesses(np.where(fetch, first, second), address, size.astype(np.int64)), valid


def _number(
    text: Uint8s, ends: Int64s, digits: Int64s, base: int, most: int
) -> tuple[Uint64s, Bools]:
    """Numbers of ``digits`` digits (each its own) before ``ends``, and which are well formed."""
    good = (digits >= 1) & (digits <= most)
    value = np.zeros(ends.size, dtype=np.uint64)
    longest = int(digits[good].max(initial=0))
    shortest = int(digits[good].min(initial=longest))
    for place in range(longest):
        digit = DIGITS[text[np.maximum(ends - 1 - place, 0)]]
        if place >= shortest:
            digit = np.where(place < digits, digit, np.uint8(0))
        good &= digit < base
        value += digit.astype(np.uint64) * np.uint64(base**place)
    return value, good


def _digit_values() -> Uint8s:
    values = np.full(256, NO_DIGIT, dtype=np.uint8)
    for digit in "0123456789abcdefABCDEF":
        values[ord(digit)] = int(digit, 16)
    return values


DIGITS = _digit_values()


class Reduction:
    """From accesses, block after block, to the records of a trace. The module states the rule.

    A page is known by its slot: the position of its region in order of appearance times the pages
    of a region, plus its offset.
    """

    def __init__(self, page_size: int, window: int) -> None:
        self.page_size = page_size
        self.window = window
        self.region_pages = REGION_BYTES // page_size
        self.regions = _Regions()
        self.counts = dict.fromkeys((FETCH, LOAD, STORE, MODIFY), 0)
        # By slot: 0 outside the window, 1 recorded as read since it came in, 2 as written.
        self.permission = np.zeros(0, dtype=np.uint8)
        self.recent: deque[int] = deque()
        self.slots = array("q")
        self.writes = array("b")
        self.begun = array("q")  # instructions begun when the record was made

    def feed(self, accesses: Accesses) -> None:
        """Take the next accesses."""
        if not accesses.kind.size:
            return
        page, needed, begun = self._by_page(accesses)
        slot = self._slots(page)
        n = slot.size
        at = 0
        ahead = 64
        while at < n:
            # The window changes only with a record, so all accesses up to the next miss are hits.
            stop = at + ahead
            miss = self.permission[slot[at:stop]] < needed[at:stop]
            step = int(miss.argmax())
            if miss[step]:
                at += step
                self._record(int(slot[at]), int(needed[at]), int(begun[at]))
                at += 1
                ahead = 64
            else:
                at = stop
                ahead = min(2 * ahead, 4096)

    def _by_page(self, accesses: Accesses) -> tuple[Uint64s, Uint8s, Int64s]:
        """Page, permission needed and instructions begun, an entry a page touched."""
        kind = accesses.kind
        begun = np.cumsum(kind == FETCH) + self.counts[FETCH]
        for known in self.counts:
            self.counts[known] += int(np.count_nonzero(kind == known))
        needed = np.where((kind == STORE) | (kind == MODIFY), np.uint8(2), np.uint8(1))
        shift = np.uint64(self.page_size.bit_length() - 1)
        page = accesses.address >> shift
        start = (accesses.address & np.uint64(self.page_size - 1)).astype(np.int64)
        copies = 1 + (start + accesses.size - 1) // self.page_size
        if copies.max(initial=1) > 1:
            before = np.cumsum(copies) - copies
            page, needed, begun, before = (
                np.repeat(column, copies) for column in (page, needed, begun, before)
            )
            page += (np.arange(page.size) - before).astype(np.uint64)
        # After an access to the same page, one that needs no more is a hit whatever the window.
        news = np.ones(page.size, dtype=np.bool_)
        news[1:] = (page[1:] != page[:-1]) | (needed[1:] > needed[:-1])
        return page[news], needed[news], begun[news]

    def _slots(self, page: Uint64s) -> Int64s:
        per_region = np.uint64(self.region_pages)
        region = self.regions.positions(page // per_region)
        missing = self.regions.count * self.region_pages - self.permission.size
        self.permission = np.append(self.permission, np.zeros(missing, dtype=np.uint8))
        return region * self.region_pages + (page % per_region).astype(np.int64)

    def _record(self, slot: int, needed: int, begun: int) -> None:
        if self.permission[slot]:
            self.recent.remove(slot)
        elif len(self.recent) == self.window:
            self.permission[self.recent.popleft()] = 0
        self.recent.append(slot)
        self.permission[slot] = needed
        self.slots.append(slot)
        self.writes.append(needed - 1)
        self.begun.append(begun)

    def trace(self, *, program: str, valgrind: str, name: str | None) -> Trace:
        """The trace of everything fed so far. Raises InputError if that is nothing."""
        if not self.slots:
            raise InputError("empty: no access in the recording", file=name)
        slot = np.array(self.slots)
        page = self.regions.ranks()[slot // self.region_pages] * self.region_pages
        begun = np.array(self.begun)
        try:
            return assemble(
                page + slot % self.region_pages,
                np.array(self.writes),
                np.diff(begun, prepend=0),
                page_size=self.page_size,
                instructions_after_last=self.counts[FETCH] - int(begun[-1]),
                window=self.window,
                program=program,
                valgrind=valgrind,
                raw=RawCounts(*(self.counts[kind] for kind in (FETCH, LOAD, STORE, MODIFY))),
            )
        except ValueError as error:
            raise InputError(f"cannot be reduced: {error}", file=name) from error


class _Regions:
    """Numbers of 2-MiB regions in order of appearance."""

    def __init__(self) -> None:
        self.count = 0
        self._sorted = np.zeros(0, dtype=np.uint64)
        self._position = np.zeros(0, dtype=np.int64)

    def positions(self, regions: Uint64s) -> Int64s:
        """The position of each region, shape of ``regions``; new ones are appended."""
        if not self.count:
            self._add(regions[:1])
        found = np.minimum(np.searchsorted(self._sorted, regions), self.count - 1)
        new = regions[self._sorted[found] != regions]
        if new.size:
            self._add(np.unique(new))
            found = np.searchsorted(self._sorted, regions)
        positions: Int64s = self._position[found]
        return positions

    def _add(self, new: Uint64s) -> None:
        everything = np.append(self._sorted, new)
        order = np.argsort(everything)
        appended = self.count + np.arange(new.size)
        self._sorted = everything[order]
        self._position = np.append(self._position, appended)[order]
        self.count += new.size

    def ranks(self) -> Int64s:
        """By position: the region's place in address order."""
        ranks = np.empty(self.count, dtype=np.int64)
        ranks[self._position] = np.arange(self.count)
        return ranks


@dataclass
class _Remarks:
    """What valgrind says about itself and the program."""

    program: str = ""
    valgrind: str = ""

    def read(self, comments: list[bytes]) -> None:
        """Take what is of use from lines such as ``==77== Command: ./demo``."""
        for comment in comments:
            _, _, text = comment.decode(errors="replace").partition("== ")
            if text.startswith("Command: "):
                self.program = self.program or text.removeprefix("Command: ")
            elif text.startswith("Using Valgrind-"):
                self.valgrind = text.removeprefix("Using Valgrind-").partition(" ")[0]


def _blocks(stream: BinaryIO, name: str | None) -> Iterator[tuple[bytes, int]]:
    """Blocks of whole lines, with the number of the first. A partial last line is an error."""
    rest = b""
    line = 1
    while True:
        try:
            data = stream.read(BLOCK_BYTES)
        except gzip.BadGzipFile as error:
            raise InputError("not a gzip file", file=name) from error
        except (EOFError, zlib.error) as error:
            raise InputError("trace truncated: incomplete gzip file", file=name) from error
        if not data:
            break
        rest += data
        cut = rest.rfind(b"\n") + 1
        if cut:
            yield rest[:cut], line
            line += rest.count(b"\n", 0, cut)
            rest = rest[cut:]
    if rest:
        raise InputError(f"trace truncated in line {line}", file=name, line=line)


@contextmanager
def _opened(source_path: str) -> Iterator[BinaryIO]:
    if source_path == "-":
        yield sys.stdin.buffer
        return
    path = Path(source_path)
    if not path.is_file():
        around = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise InputError("no such file", file=source_path, hint=nearest(path.name, around))
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        yield cast(BinaryIO, stream)


def _shown_name(source_path: str) -> str:
    return "standard input" if source_path == "-" else source_path
