"""The trace file: which pages a real program touched, one record a line of a Parquet table.

Columns: ``page`` (int32, page number after compaction), ``write`` (bool), ``instructions`` (int32,
instructions begun since the previous record, up to and including the record's own). The file's
key-value metadata say where the trace comes from and hold a hash of the content, so that a trace
can be cut, damaged or exchanged, but not unnoticed.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from simkvm.scenario.errors import InputError, nearest

FORMAT = "simkvm-trace/1"
MAGIC = b"PAR1"
COLUMNS = ("page", "write", "instructions")
REGION_BYTES = 2 << 20
"""Traces are compacted by regions of this size, so that block mappings keep their meaning."""


Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class RawCounts:
    """Lines of the recording before the reduction, by kind."""

    instructions: int
    loads: int
    stores: int
    modifies: int


@dataclass(frozen=True)
class TraceHeader:
    """What a trace says about itself.

    ``pages``: page numbers are below this; a whole number of 2-MiB regions. ``touched_pages``: how
    many of them occur. ``touches``: records. ``instructions``: all that the program executed, of
    which ``instructions_after_last`` after the last record. ``window``: the filter of the reduction
    (``guest/lackey.py``). ``sha256``: hex digest of the content, see :func:`content_hash`.
    """

    pages: int
    page_size: int
    touched_pages: int
    touches: int
    writes: int
    instructions: int
    instructions_after_last: int
    window: int
    program: str
    valgrind: str
    raw: RawCounts
    sha256: str

    @property
    def footprint_bytes(self) -> int:
        """Bytes of the pages that are touched at all."""
        return self.touched_pages * self.page_size


@dataclass(frozen=True)
class Trace:
    """A trace in memory; the arrays are read-only and have shape (header.touches,)."""

    header: TraceHeader
    page: npt.NDArray[np.int32]
    write: npt.NDArray[np.bool_]
    instructions: npt.NDArray[np.int32]


def assemble(
    page: npt.ArrayLike,
    write: npt.ArrayLike,
    instructions: npt.ArrayLike,
    *,
    page_size: int = 4096,
    instructions_after_last: int = 0,
    window: int = 0,
    program: str = "",
    valgrind: str = "",
    raw: RawCounts | None = None,
) -> Trace:
    """A trace from its columns, each of shape (touches,) with at least one record.

    ``window`` 0 means that nothing was filtered out. Raises ValueError if the columns do not fit.
    """
    pages = _frozen(_in_range(page), np.int32)
    writes = _frozen(write, np.bool_)
    gaps = _frozen(_in_range(instructions), np.int32)
    if not 0 < pages.size == writes.size == gaps.size:
        raise ValueError("a trace needs three equally long columns with at least one record")
    total = int(gaps.sum(dtype=np.int64)) + instructions_after_last
    per_region = max(1, REGION_BYTES // page_size)
    header = TraceHeader(
        pages=(int(pages.max()) // per_region + 1) * per_region,
        page_size=page_size,
        touched_pages=int(np.unique(pages).size),
        touches=int(pages.size),
        writes=int(writes.sum()),
        instructions=total,
        instructions_after_last=instructions_after_last,
        window=window,
        program=program,
        valgrind=valgrind,
        raw=raw or RawCounts(total, 0, 0, 0),
        sha256="",
    )
    trace = Trace(header, pages, writes, gaps)
    return replace(trace, header=replace(header, sha256=content_hash(trace)))


def content_hash(trace: Trace) -> str:
    """SHA-256, in hex, of all that a replay depends on, so not of the program's name."""
    header = trace.header
    digest = hashlib.sha256(
        f"{FORMAT} {header.page_size} {header.pages} {header.instructions_after_last}\n".encode()
    )
    digest.update(trace.page.astype("<i4").tobytes())
    digest.update(trace.write.astype("u1").tobytes())
    digest.update(trace.instructions.astype("<i4").tobytes())
    return digest.hexdigest()


def write_trace(path: str | Path, trace: Trace) -> None:
    """Write ``trace`` to ``path``, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"page": trace.page, "write": trace.write, "instructions": trace.instructions}
    target = Path(path)
    aside = target.with_name(target.name + ".part")
    try:
        pq.write_table(
            pa.table(columns).replace_schema_metadata(_metadata(trace.header)),
            aside,
            # Programs repeat themselves, and zstd sees that best in plain numbers: packing them as
            # differences doubled the shipped traces, dictionaries added a third.
            compression="zstd",
            compression_level=19,
            use_dictionary=False,
            write_page_checksum=True,
        )
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def read_header(path: str | Path) -> TraceHeader:
    """The header alone, from the file's footer; what lies between is not looked at.

    Raises InputError if the file is missing (with the nearest name), truncated or no simkvm trace.
    """
    import pyarrow.parquet as pq

    name = str(path)
    _check_ends(Path(path))
    with _damage_reported(name):
        footer = pq.read_metadata(name)
    header = _parsed(footer.metadata or {}, name)
    if header.touches != footer.num_rows or header.touches < 1:
        raise InputError(
            f"trace damaged: {footer.num_rows} records where its header says {header.touches}",
            file=name,
        )
    return header


def read_trace(path: str | Path) -> Trace:
    """The whole trace, its hash checked. Content that a process has read, it reads once.

    Raises InputError as :func:`read_header`, and if the content is not the one that was written.
    """
    return _read(str(path), read_header(path))


@lru_cache(maxsize=4)
def _read(name: str, header: TraceHeader) -> Trace:
    # The header is in the key, so a file that was replaced is never mistaken for its predecessor.
    import pyarrow.parquet as pq

    with _damage_reported(name):
        table = pq.read_table(
            name, columns=list(COLUMNS), partitioning=None, page_checksum_verification=True
        )
        page, write, instructions = (table[column].to_numpy() for column in COLUMNS)
    trace = Trace(
        header, _frozen(page, np.int32), _frozen(write, np.bool_), _frozen(instructions, np.int32)
    )
    if content_hash(trace) != header.sha256:
        raise InputError("trace damaged: its content does not have the recorded sha256", file=name)
    return trace


def _frozen(values: npt.ArrayLike, dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    array = np.array(values, dtype=dtype)
    array.flags.writeable = False
    return array


def _in_range(values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    wide = np.asarray(values, dtype=np.int64)
    if wide.size and not 0 <= wide.min() <= wide.max() <= np.iinfo(np.int32).max:
        raise ValueError("pages and instructions must fit into 31 bits")
    return wide


def _metadata(header: TraceHeader) -> dict[str, str]:
    flat = asdict(header)
    flat |= {f"raw_{kind}": count for kind, count in flat.pop("raw").items()}
    return {"format": FORMAT} | {key: str(value) for key, value in flat.items()}


def _parsed(metadata: dict[bytes, bytes], name: str) -> TraceHeader:
    text = {key.decode(): value.decode(errors="replace") for key, value in metadata.items()}
    if text.get("format") != FORMAT:
        raise InputError(f"not a simkvm trace: its format is not {FORMAT!r}", file=name)
    texts = {"program", "valgrind", "sha256"}
    try:
        raw = RawCounts(
            **{field.name: int(text["raw_" + field.name]) for field in fields(RawCounts)}
        )
        values: dict[str, Any] = {
            field.name: text[field.name] if field.name in texts else int(text[field.name])
            for field in fields(TraceHeader)
            if field.name != "raw"
        }
    except (KeyError, ValueError) as error:
        raise InputError(f"not a simkvm trace: bad metadata, {error}", file=name) from error
    return TraceHeader(raw=raw, **values)


def _check_ends(file: Path) -> None:
    """A Parquet file begins and ends with the same four bytes; the end tells whether it was cut."""
    if not file.is_file():
        near = nearest(file.name, _neighbours(file))
        raise InputError("no such trace file", file=str(file), hint=near)
    with file.open("rb") as stream:
        start = stream.read(len(MAGIC))
        size = stream.seek(0, 2)
        stream.seek(max(0, size - len(MAGIC)))
        end = stream.read()
    if not start or start != MAGIC[: len(start)]:
        raise InputError("not a simkvm trace: not a Parquet file", file=str(file))
    if size < 2 * len(MAGIC) or end != MAGIC:
        raise InputError(f"trace truncated: no footer at its end ({size} bytes)", file=str(file))


def _neighbours(file: Path) -> list[str]:
    if not file.parent.is_dir():
        return []
    return sorted(other.name for other in file.parent.glob("*.parquet"))


@contextmanager
def _damage_reported(name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"trace damaged: {error}", file=name) from error
