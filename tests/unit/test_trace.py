"""The trace file: what is written comes back, and nothing else passes for a trace."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simkvm.guest.trace import (
    FORMAT,
    RawCounts,
    Trace,
    assemble,
    content_hash,
    read_header,
    read_trace,
    write_trace,
)
from simkvm.scenario.errors import InputError

SHIPPED = Path(__file__).parents[2] / "workloads" / "traces"


def small_trace() -> Trace:
    return assemble(
        [0, 513, 0, 7],
        [False, True, True, False],
        [1, 20, 300, 4000],
        instructions_after_last=50_000,
        window=16,
        program="./demo --fast",
        valgrind="3.19.0",
        raw=RawCounts(54_321, 10, 20, 30),
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.parquet"
    write_trace(path, small_trace())
    return path


def columns(trace: Trace) -> list[list[int]]:
    return [trace.page.tolist(), trace.write.tolist(), trace.instructions.tolist()]


def test_header_counts_what_the_columns_hold() -> None:
    header = small_trace().header
    assert (header.touches, header.writes, header.touched_pages) == (4, 2, 3)
    assert header.pages == 1024  # page 513 lies in the second 2-MiB region
    assert header.footprint_bytes == 3 * 4096
    assert header.instructions == 1 + 20 + 300 + 4000 + 50_000


def test_a_written_trace_comes_back(file: Path) -> None:
    again = read_trace(file)
    assert again.header == small_trace().header
    assert columns(again) == columns(small_trace())
    assert read_header(file) == again.header


@given(
    st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.booleans(), st.integers(0, 2**31 - 1)), min_size=1
    )
)
def test_any_columns_come_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[int, bool, int]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "any.parquet"
    trace = assemble(*zip(*records, strict=True))
    write_trace(path, trace)
    assert columns(read_trace(path)) == columns(trace)


def test_the_file_says_in_plain_metadata_what_it_is(file: Path) -> None:
    metadata = pq.read_metadata(file).metadata
    assert metadata[b"format"] == b"simkvm-trace/1"
    assert metadata[b"page_size"] == b"4096"
    assert metadata[b"program"] == b"./demo --fast"
    assert metadata[b"raw_modifies"] == b"30"


def test_columns_have_their_documented_types(file: Path) -> None:
    schema = pq.read_schema(file)
    assert schema.names == ["page", "write", "instructions"]
    assert schema.types == [pa.int32(), pa.bool_(), pa.int32()]


def test_arrays_cannot_be_changed_under_other_users(file: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        read_trace(file).page[0] = 1


def test_a_replaced_file_is_read_anew(file: Path) -> None:
    read_trace(file)
    other = assemble([1, 2], [True, True], [3, 4])
    write_trace(file, other)
    assert columns(read_trace(file)) == columns(other)


@pytest.mark.parametrize(
    ("page", "write", "instructions"),
    [([], [], []), ([1], [True, False], [1]), ([-1], [True], [1]), ([1], [True], [2**31])],
)
def test_columns_that_do_not_fit_are_refused(
    page: list[int], write: list[bool], instructions: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"columns|31 bits"):
        assemble(page, write, instructions)


@pytest.mark.parametrize("change", ["page", "write", "instructions"])
def test_hash_feels_every_column(change: str) -> None:
    trace = small_trace()
    altered = getattr(trace, change).copy()
    altered[2] = not altered[2] if change == "write" else altered[2] + 1
    values = {name: getattr(trace, name) for name in ("page", "write", "instructions")}
    other = Trace(trace.header, **(values | {change: altered}))
    assert content_hash(other) != content_hash(trace)


def test_hash_does_not_feel_the_description() -> None:
    trace = small_trace()
    bare = assemble(trace.page, trace.write, trace.instructions, instructions_after_last=50_000)
    assert bare.header.sha256 == trace.header.sha256


def test_missing_file_names_the_nearest(file: Path) -> None:
    with pytest.raises(InputError, match=r"no such trace file.*'demo\.parquet'"):
        read_header(file.with_name("demmo.parquet"))


def test_missing_folder_is_no_surprise(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such trace file"):
        read_trace(tmp_path / "none" / "demo.parquet")


def test_every_cut_is_called_truncated(file: Path) -> None:
    whole = file.read_bytes()
    for size in range(1, len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match="trace truncated"):
            read_header(file)
        with pytest.raises(InputError, match="trace truncated"):
            read_trace(file)


@pytest.mark.parametrize("content", [b"", b"PBR1", b"#!/bin/sh\necho PAR1", b"I  0401ab70,3\n"])
def test_other_files_are_not_traces(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a simkvm trace"):
        read_header(path)


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "simkvm-trace/9"}, {"format": FORMAT}, {"format": FORMAT, "pages": "many"}],
)
def test_other_parquet_files_are_not_traces(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"page": [1]}).replace_schema_metadata(metadata), path)
    with pytest.raises(InputError, match="not a simkvm trace"):
        read_header(path)


def rewritten(file: Path, **columns: list[int]) -> None:
    """The same metadata over other columns."""
    table = pq.read_table(file)
    metadata = table.schema.metadata
    for name, values in columns.items():
        at = table.column_names.index(name)
        kind = table.schema.field(name).type
        table = table.set_column(at, name, pa.array(values, kind))
    pq.write_table(table.replace_schema_metadata(metadata), file)


def test_exchanged_content_is_found_by_the_hash(file: Path) -> None:
    rewritten(file, page=[0, 513, 1, 7])
    assert read_header(file) == small_trace().header  # the header cannot tell
    with pytest.raises(InputError, match="sha256"):
        read_trace(file)


def test_missing_rows_are_found_without_reading_them(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(table.slice(0, 3), file)
    with pytest.raises(InputError, match="3 records where its header says 4"):
        read_header(file)


def test_no_flipped_bit_passes(file: Path) -> None:
    whole = file.read_bytes()
    expected = read_trace(file)
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 0x10
        other = file.with_name(f"{at}.parquet")
        other.write_bytes(changed)
        try:
            trace = read_trace(other)
        except InputError:
            continue
        # What is not content (names in the footer, say) may change; the replay may not.
        assert columns(trace) == columns(expected), f"byte {at}"
        assert trace.header.pages == expected.header.pages


def test_a_failed_write_leaves_the_old_trace_alone(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_table: pa.Table, where: Path, **_options: object) -> None:
        where.write_bytes(b"PAR1")
        raise OSError("no space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_trace(file, assemble([1], [True], [1]))
    assert columns(read_trace(file)) == columns(small_trace())
    assert list(file.parent.iterdir()) == [file]


NOTE_ROW = re.compile(
    r"\| `(?P<file>[\w-]+\.parquet)` \| (?P<window>\d+) \| (?P<touches>[\d,]+) "
    r"\| (?P<writes>[\d,]+) \| (?P<mib>[\d.]+) MiB in (?P<regions>\d+) \| (?P<pause>[\d,]+) "
    r"\| (?P<instructions>[\d,]+) \| (?P<loads>[\d,]+) \| (?P<stores>[\d,]+) "
    r"\| (?P<modifies>[\d,]+) \| `(?P<sha256>[0-9a-f]+)` \|"
)


def noted() -> dict[str, dict[str, str]]:
    text = (SHIPPED / "README.md").read_text()
    return {row["file"]: row.groupdict() for row in NOTE_ROW.finditer(text)}


def test_every_shipped_trace_is_noted() -> None:
    assert sorted(noted()) == sorted(path.name for path in SHIPPED.glob("*.parquet"))
    assert len(noted()) >= 2


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.glob("*.parquet")))
def test_the_note_tells_the_numbers_of_the_shipped_trace(name: str) -> None:
    trace = read_trace(SHIPPED / name)
    header = trace.header
    row = {key: value.replace(",", "") for key, value in noted()[name].items()}
    assert row == {
        "file": name,
        "window": str(header.window),
        "touches": str(header.touches),
        "writes": str(header.writes),
        "mib": f"{header.footprint_bytes / 2**20:.1f}",
        "regions": str(header.pages * header.page_size >> 21),
        "pause": str(trace.instructions.max()),
        "instructions": str(header.instructions),
        "loads": str(header.raw.loads),
        "stores": str(header.raw.stores),
        "modifies": str(header.raw.modifies),
        "sha256": header.sha256,
    }
    assert header.raw.instructions == header.instructions


def test_shipped_traces_stay_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.parquet")) <= 4 << 20


def test_a_shipped_trace_spans_many_blocks() -> None:
    assert max(read_header(path).footprint_bytes for path in SHIPPED.glob("*.parquet")) >= 16 << 20
