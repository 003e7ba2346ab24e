"""The importer of valgrind's lackey: every record worked out by hand or by a plain model."""

import gzip
import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simkvm.guest import lackey
from simkvm.guest.lackey import convert, import_lackey
from simkvm.guest.trace import RawCounts, Trace, read_trace
from simkvm.scenario.errors import InputError

SAMPLE = b"""\
==77== Lackey, an example Valgrind tool
==77== Using Valgrind-3.19.0 and LibVEX; rerun with -h for copyright info
==77== Command: ./demo --size 3,5
==77==
I  00400000,3
 L 1ffeffe7f8,8
 S 1ffeffe7f8,8
I  00400003,2
 M 00601000,4
I  00400005,5
 L 00401ffc,8
I  0040000a,2
I  0040000c,1
==77==
==77== Exit code:       0
"""

# With a window of two pages. Regions at 0x400000, 0x600000 and 0x1ffee00000 (the stack) become 0, 1
# and 2.
BY_HAND = [
    (0, False, 1),  # first fetch
    (1534, False, 0),  # stack, page 510 of its region: read ...
    (1534, True, 0),  # ... then written. The second fetch is in the window.
    (513, True, 1),  # a modify writes; pushes page 0 out
    (0, False, 1),  # third fetch, seen anew; pushes the stack out
    (1, False, 0),  # a load over a page's edge: both pages
    (2, False, 0),
    (0, False, 1),  # fourth fetch; the fifth is in the window
]

Access = tuple[str, int, int]


def records(trace: Trace) -> list[tuple[int, bool, int]]:
    return list(
        zip(trace.page.tolist(), trace.write.tolist(), trace.instructions.tolist(), strict=True)
    )


def test_sample_gives_the_records_worked_out_by_hand() -> None:
    trace = import_lackey(io.BytesIO(SAMPLE), window=2)
    assert records(trace) == BY_HAND
    assert trace.header.raw == RawCounts(instructions=5, loads=2, stores=1, modifies=1)
    assert (trace.header.instructions, trace.header.instructions_after_last) == (5, 1)
    assert trace.header.pages == 3 * 512
    assert trace.header.window == 2


def test_valgrinds_own_lines_name_program_and_version() -> None:
    header = import_lackey(io.BytesIO(SAMPLE)).header
    assert (header.program, header.valgrind) == ("./demo --size 3,5", "3.19.0")
    assert import_lackey(io.BytesIO(SAMPLE), program="mine").header.program == "mine"


def test_larger_pages() -> None:
    trace = import_lackey(io.BytesIO(SAMPLE), page_size=64 << 10, window=2)
    # 32 pages a region; the stack is page 31 of its own. No access crosses an edge any more.
    assert records(trace) == [
        (0, False, 1),
        (95, False, 0),
        (95, True, 0),
        (32, True, 1),
        (0, False, 1),
    ]


def text_of(accesses: list[Access]) -> bytes:
    lines = [
        f"I  {address:08x},{size}\n" if kind == "I" else f" {kind} {address:08x},{size}\n"
        for kind, address, size in accesses
    ]
    return "".join(lines).encode()


def plainly_reduced(
    accesses: list[Access], page_size: int, window: int
) -> list[tuple[int, bool, int]]:
    """The rule, one access at a time."""
    recent: list[tuple[int, bool]] = []
    kept = []
    begun = told = 0
    for kind, address, size in accesses:
        begun += kind == "I"
        write = kind in "SM"
        for page in range(address // page_size, (address + size - 1) // page_size + 1):
            if (page, True) in recent or (page, write) in recent:
                continue
            recent = [*(entry for entry in recent if entry[0] != page), (page, write)][-window:]
            kept.append((page, write, begun - told))
            told = begun
    per_region = (2 << 20) // page_size
    order = sorted({page // per_region for page, _, _ in kept})
    return [
        (order.index(page // per_region) * per_region + page % per_region, write, instructions)
        for page, write, instructions in kept
    ]


def accesses() -> st.SearchStrategy[list[Access]]:
    pages = st.sampled_from([0x400, 0x401, 0x5FF, 0x600, 0x4800, 0x1FFEFFE, 0xFFFFFFFFFF600])
    addresses = st.builds(
        lambda page, offset: (page << 12) + offset, pages, st.sampled_from([0, 8, 4090, 4095])
    )
    return st.lists(
        st.tuples(st.sampled_from("IILSM"), addresses, st.sampled_from([1, 8, 32, 4200])),
        min_size=1,
        max_size=80,
    )


@given(accesses(), st.integers(1, 5), st.sampled_from([4096, 16384, 2 << 20]), st.integers(0, 64))
def test_equals_the_plain_rule_whatever_the_blocks(
    accesses: list[Access], window: int, page_size: int, block_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lackey, "BLOCK_BYTES", block_bytes or lackey.BLOCK_BYTES)
        trace = import_lackey(io.BytesIO(text_of(accesses)), page_size, window)
    assert records(trace) == plainly_reduced(accesses, page_size, window)
    assert trace.header.instructions == sum(kind == "I" for kind, _, _ in accesses)


@pytest.mark.parametrize("hits", [*range(60, 70), *range(190, 200), 5000])
def test_nothing_is_skipped_after_a_long_run_of_hits(hits: int) -> None:
    accesses = [("L", (0x400 + at % 2) << 12, 8) for at in range(hits)]
    accesses += [("S", at << 12, 8) for at in (0x400, 0x401, 0x402)]
    trace = import_lackey(io.BytesIO(text_of(accesses)))
    assert records(trace) == plainly_reduced(accesses, 4096, 16)


@given(accesses(), st.integers(1, 5))
def test_order_and_firsts_survive(accesses: list[Access], window: int) -> None:
    """Against a window that drops nothing but immediate repeats of one page."""
    everything = records(import_lackey(io.BytesIO(text_of(accesses)), window=1))
    kept = records(import_lackey(io.BytesIO(text_of(accesses)), window=window))
    rest = iter([record[:2] for record in everything])
    assert all(record[:2] in rest for record in kept)  # a subsequence
    for firsts in ([True, False], [True]):
        assert first_touches(kept, firsts) == first_touches(everything, firsts)


def first_touches(records: list[tuple[int, bool, int]], kinds: list[bool]) -> list[int]:
    return list(dict.fromkeys(page for page, write, _ in records if write in kinds))


@given(accesses())
def test_a_page_in_use_is_seen_again_after_window_others(accesses: list[Access]) -> None:
    """Recency is that of records: between two records of any pages lie at most `window` others."""
    window = 2
    kept = records(import_lackey(io.BytesIO(text_of(accesses)), window=window))
    for start in range(len(kept) - window):
        pages = [page for page, _, _ in kept[start : start + window + 1]]
        writes = [write for _, write, _ in kept[start : start + window + 1]]
        repeats = [at for at, page in enumerate(pages) if page in pages[:at]]
        assert all(writes[at] for at in repeats)  # only a new permission repeats inside


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"I",
        b"I  ",
        b"I  0401ab70",
        b"I  0401ab70,",
        b"I  ,3",
        b"I 0401ab70,3",
        b"L  0401ab70,3",
        b" I 0401ab70,3",
        b" X 0401ab70,3",
        b" L 0401ag70,3",
        b" L 0401ab70,x",
        b" L 0401ab70,a",
        b" L 0401ab70,0",
        b" L 0401ab70,3 ",
        b" L 0401ab70,3\r",
        b" L 0401ab70,3,4",
        b" L 0401ab70,12345",
        b" L 123456789abcdef01,3",
        b"hello, world",
        b" L 0401ab\x0070,3",
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 64, 8 << 20])
def test_malformed_line_is_named(
    line: bytes, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lackey, "BLOCK_BYTES", block_bytes)
    text = b"==1== Command: x\nI  0401ab70,3\n" + line + b"\nI  0401ab70,3\n"
    with pytest.raises(InputError, match="not a line of lackey") as caught:
        import_lackey(io.BytesIO(text), name="demo.log")
    assert (caught.value.file, caught.value.line) == ("demo.log", 3)


@pytest.mark.parametrize("text", [b"", b"==1== Command: x\n==1==\n"])
def test_no_access_is_an_error(text: bytes) -> None:
    with pytest.raises(InputError, match="no access"):
        import_lackey(io.BytesIO(text))


@pytest.mark.parametrize("cut", range(1, len(" L 1ffeffe7f8,8\n")))
def test_a_cut_last_line_is_called_truncated(cut: int) -> None:
    text = b"I  00400000,3\n L 1ffeffe7f8,8\n"[:-cut]
    with pytest.raises(InputError, match="trace truncated in line 2") as caught:
        import_lackey(io.BytesIO(text))
    assert caught.value.line == 2


@pytest.mark.parametrize("page_size", [0, 1024, 5000, 4 << 20])
def test_impossible_page_sizes_are_refused(page_size: int) -> None:
    with pytest.raises(InputError, match="page size"):
        import_lackey(io.BytesIO(SAMPLE), page_size)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(InputError, match="window"):
        import_lackey(io.BytesIO(SAMPLE), window=0)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "demo.log"
    path.write_bytes(SAMPLE)
    return path


def test_convert_writes_the_trace_it_describes(log: Path) -> None:
    out = log.with_name("demo.parquet")
    header = convert(str(log), out, page_size=4096, window=2, program=None)
    assert read_trace(out).header == header
    assert records(read_trace(out)) == BY_HAND


def test_compressed_logs_are_read(log: Path) -> None:
    packed = log.with_name("demo.log.gz")
    packed.write_bytes(gzip.compress(SAMPLE))
    convert(str(packed), log.with_name("demo.parquet"), window=2)
    assert records(read_trace(log.with_name("demo.parquet"))) == BY_HAND


def test_standard_input_is_read(log: Path) -> None:
    out = log.with_name("demo.parquet")
    command = f"from simkvm.guest.lackey import convert; convert('-', {str(out)!r}, window=2)"
    subprocess.run([sys.executable, "-c", command], input=SAMPLE, check=True)
    assert records(read_trace(out)) == BY_HAND


@pytest.mark.parametrize(
    ("content", "message"),
    [(SAMPLE, "not a gzip file"), (gzip.compress(SAMPLE)[:-12], "trace truncated")],
)
def test_bad_compression_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "demo.log.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        convert(str(path), tmp_path / "demo.parquet")
    assert [other.name for other in tmp_path.iterdir()] == ["demo.log.gz"]


def test_a_missing_log_names_the_nearest(log: Path) -> None:
    with pytest.raises(InputError, match=r"no such file.*'demo\.log'"):
        convert(str(log.with_name("demo.lok")), log.with_name("demo.parquet"))


def test_a_missing_folder_is_told_before_the_work(log: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        convert(str(log), log.parent / "none" / "demo.parquet")
