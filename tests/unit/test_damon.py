"""Does a trace drawn from DAMON's recording have its heat, and are wrong recordings refused?"""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from simkvm.cli import main
from simkvm.guest import damon
from simkvm.guest.damon import convert
from simkvm.guest.damon_text import Region, recordings
from simkvm.guest.trace import read_trace
from simkvm.scenario.errors import InputError
from simkvm.units import MIB

MS = 1_000_000
BASE = 0x7F00_0000_0000

# Three regions, 2 MiB apart: hot, warm and idle. Two aggregation intervals of 100 ms.
REGIONS = [
    (BASE, BASE + MIB, 18),
    (BASE + 2 * MIB, BASE + 4 * MIB, 2),
    (BASE + 8 * MIB, BASE + 9 * MIB, 0),
]


def region(start: int, end: int, samples: int) -> dict:
    return {
        "start": f"{start:,}",
        "end": f"{end:,}",
        "nr_accesses": {"samples": samples, "percent": None},
        "age": {"usec": None, "aggr_intervals": 3},
    }


def record(target: int = 7, intervals: bool = True, regions=REGIONS, snapshots: int = 2) -> dict:
    made = {
        "target_id": target,
        "snapshots": [
            {
                "start_time": f"{place * 100} ms",
                "end_time": (place + 1) * 100 * MS,
                "regions": [region(*one) for one in regions],
                "total_bytes": None,
            }
            for place in range(snapshots)
        ],
    }
    if intervals:
        made["intervals"] = {"sample_us": "5 ms", "aggr_us": "100 ms", "ops_update_us": "1 s"}
    return made


RAW = f"""\
base_time_absolute: 8 m 59.809 s

monitoring_start:                0 ns
monitoring_end:            100.000 ms
monitoring_duration:       100.000 ms
target_id: 7
nr_regions: 3
# start_addr     end_addr        length  nr_accesses   age
{BASE:012x}-{BASE + MIB:012x} (   1.000 MiB)          18     3
{BASE + 2 * MIB:012x}-{BASE + 4 * MIB:012x} (   2.000 MiB)           2     3
{BASE + 8 * MIB:012x}-{BASE + 9 * MIB:012x} (   1.000 MiB)           0    -1

monitoring_start:          100.000 ms
monitoring_end:            200.000 ms
monitoring_duration:       100.000 ms
target_id: 7
nr_regions: 3
# start_addr     end_addr        length  nr_accesses   age
{BASE:012x}-{BASE + MIB:012x} (   1.000 MiB)          18     3
{BASE + 2 * MIB:012x}-{BASE + 4 * MIB:012x} (   2.000 MiB)           2     3
{BASE + 8 * MIB:012x}-{BASE + 9 * MIB:012x} (   1.000 MiB)           0    -1
"""

EVENTS = "".join(
    f"kdamond.0  4452 [000] {82877 + (place + 1) / 10:.6f}: damon:damon_aggregated: "
    f"target_id=7 nr_regions=3 {start}-{end}: {samples} 3\n"
    for place in range(2)
    for start, end, samples in REGIONS
)


def written(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "damon.data"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(tmp_path: Path, content: str | bytes, **options) -> InputError:
    out = tmp_path / "out.parquet"
    with pytest.raises(InputError) as caught:
        convert(written(tmp_path, content), out, **options)
    assert not out.exists()
    return caught.value


FORMS = {
    "json": json.dumps([record()], indent=4),
    "compressed": zlib.compress(json.dumps([record()]).encode()),
    "gzip": gzip.compress(json.dumps([record()]).encode()),
    "raw": RAW,
    "events": EVENTS,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_recording(tmp_path: Path, form: str) -> None:
    (found,) = recordings(written(tmp_path, FORMS[form]))
    assert (found.target, found.sample_ns, len(found.snapshots)) == ("7", 5 * MS, 2)
    assert found.stated == (form in {"json", "compressed", "gzip"})
    for snapshot in found.snapshots:
        assert snapshot.duration_ns == 100 * MS
        assert snapshot.regions == tuple(Region(a, b, n / 20) for a, b, n in REGIONS)


def test_the_heat_of_a_trace_is_that_of_the_recording(tmp_path: Path) -> None:
    """Of 40 steps each page of the hot region is touched in 36 on average, of the warm in 4."""
    out = tmp_path / "out.parquet"
    imported = convert(written(tmp_path, FORMS["json"]), out)
    trace = read_trace(out)
    touches = np.bincount(trace.page, minlength=1024)
    hot, warm = touches[:256], touches[512:1024]
    for mean, chance, part in ((hot.mean(), 0.9, hot), (warm.mean(), 0.1, warm)):
        error = 5 * np.sqrt(40 * chance * (1 - chance) / part.size)
        assert mean == pytest.approx(40 * chance, abs=error)
    # One touch a step at most, and the pages of a region are drawn apart.
    assert hot.max() <= 40
    assert hot.std() == pytest.approx(np.sqrt(40 * 0.9 * 0.1), rel=0.2)
    assert touches[256:512].sum() == 0
    assert imported.header.pages == 1024
    assert imported.pauses_cut == 0


def test_a_trace_lasts_as_long_as_the_recording(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    convert(written(tmp_path, FORMS["json"]), out, ghz=2.5)
    trace = read_trace(out)
    assert trace.header.instructions == pytest.approx(200 * MS * 2.5, abs=1)
    assert trace.instructions.sum() == pytest.approx(200 * MS * 2.5, rel=0.001)


def test_steps_that_are_shorter_than_the_resolution_see_fewer_pages(tmp_path: Path) -> None:
    """100 ms are cut into two steps of 50 ms, ten sampling intervals each."""
    out = tmp_path / "out.parquet"
    convert(written(tmp_path, FORMS["json"]), out, resolution="80 ms")
    chance = 1 - 0.9**10
    touches = np.bincount(read_trace(out).page, minlength=1024)[512:]
    error = 5 * np.sqrt(4 * chance * (1 - chance) / 512)
    assert touches.mean() == pytest.approx(4 * chance, abs=error)


def test_at_a_coarser_resolution_a_page_is_touched_once_if_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    convert(written(tmp_path, FORMS["json"]), out, resolution="100 ms")
    touches = np.bincount(read_trace(out).page, minlength=1024)
    assert set(touches[:256]) == {2}  # 1 - 0.1 ** 20
    chance = 1 - 0.9**20
    error = 5 * np.sqrt(2 * chance * (1 - chance) / 512)
    assert touches[512:].mean() == pytest.approx(2 * chance, abs=error)


def test_first_touches_write_and_others_as_asked(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    convert(written(tmp_path, FORMS["json"]), out, writes=0)
    trace = read_trace(out)
    first = np.unique(trace.page, return_index=True)[1]
    assert trace.write[first].all()
    assert trace.header.writes == first.size
    convert(written(tmp_path, FORMS["json"]), out, writes=1)
    assert read_trace(out).write.all()


def test_idle_regions_are_touched_once_if_asked(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    convert(written(tmp_path, FORMS["json"]), out, idle=True)
    touches = np.bincount(read_trace(out).page)
    # The idle region is the third that is touched: after the hot and the warm one.
    assert set(touches[1024:1280]) == {1}
    assert read_trace(out).header.touched_pages == 256 + 512 + 256


def test_a_seed_is_a_trace(tmp_path: Path) -> None:
    source, out = written(tmp_path, FORMS["json"]), tmp_path / "out.parquet"
    digests = [convert(source, out, seed=seed).header.sha256 for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_more_samples_than_fit_count_as_all(tmp_path: Path) -> None:
    text = json.dumps([record(regions=[(BASE, BASE + MIB, 21)])])
    assert recordings(written(tmp_path, text))[0].snapshots[0].regions[0].share == 1
    out = tmp_path / "out.parquet"
    convert(written(tmp_path, text), out)
    assert set(np.bincount(read_trace(out).page)) == {40}


def test_without_a_stated_interval_the_option_counts(tmp_path: Path) -> None:
    source = written(tmp_path, json.dumps([record(intervals=False)]))
    assert recordings(source)[0].snapshots[0].regions[0].share == 18 / 20
    found = recordings(source, 4 * MS)[0]
    assert found.snapshots[0].regions[0].share == 18 / 25
    assert not found.stated
    assert refused(tmp_path, FORMS["json"], sample="4 ms").key == "--sample"
    for wrong in ("0 ms", "a while"):
        assert refused(tmp_path, FORMS["json"], sample=wrong).key == "--sample"
    longer = refused(tmp_path, FORMS["raw"], sample="1 h")
    assert longer.key == "--sample"


def test_a_target_is_to_be_chosen_among_several(tmp_path: Path) -> None:
    text = json.dumps([record(7), record(12)])
    assert "--target: 7, 12" in refused(tmp_path, text).message
    assert "only 7, 12" in refused(tmp_path, text, target="8").message
    out = tmp_path / "out.parquet"
    assert convert(written(tmp_path, text), out, target="12").recording.target == "12"


def test_a_long_pause_is_cut_and_told(tmp_path: Path) -> None:
    made = record()
    made["snapshots"][1]["start_time"] = 5000 * MS
    made["snapshots"][1]["end_time"] = 5100 * MS
    imported = convert(written(tmp_path, json.dumps([made])), tmp_path / "out.parquet")
    assert imported.pauses_cut == 1


def test_too_many_touches_are_refused_with_a_resolution_that_fits(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(damon, "MOST_TOUCHES", 2000)
    error = refused(tmp_path, FORMS["json"])
    assert "try --resolution" in error.message
    wanted = error.message.split("'")[1]
    assert convert(
        written(tmp_path, FORMS["json"]), tmp_path / "out.parquet", resolution=wanted
    ).header.touches == pytest.approx(2000, rel=0.6)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("hello\n", "not what damo prints"),
        (b"PERFILE2\0\0", "perf script"),
        ("0   addr 86.082 GiB   size 8.000 GiB   access 0 %   age 7 m\n", "--raw_form"),
        ("[]", "no regions in the recording"),
        ("[{]", "not JSON"),
        (zlib.compress(b"[]" * 99)[:-4], "damaged zlib"),
        (json.dumps([record(regions=[(BASE, BASE + MIB, 0)])]), "no region was accessed"),
        (EVENTS.replace(": 18 3", ": x 3", 1), "not an event of DAMON"),
        (RAW.replace("(   1.000 MiB)          18", "18", 1), "not a line of damo's raw form"),
        (RAW.replace("100.000 ms", "a while", 1), "is not a time"),
    ],
)
def test_wrong_recordings(tmp_path: Path, content: str | bytes, says: str) -> None:
    error = refused(tmp_path, content)
    assert says in error.message
    assert error.file


def test_wrong_values_are_told_with_their_key(tmp_path: Path) -> None:
    made = record()
    made["snapshots"][1]["regions"][2]["nr_accesses"] = {}
    error = refused(tmp_path, json.dumps([made]))
    assert error.key == "[0].snapshots[1].regions[2].nr_accesses"
    made["snapshots"][1]["regions"][2] = region(BASE, BASE + MIB, 1) | {"end": "1.5 GiB"}
    error = refused(tmp_path, json.dumps([made]))
    assert error.key == "[0].snapshots[1].regions[2].end"
    assert refused(tmp_path, FORMS["json"], resolution="1 ms").key == "--resolution"


def test_the_command_says_what_it_assumed(tmp_path: Path) -> None:
    source, out = written(tmp_path, RAW), tmp_path / "out.parquet"
    ran = CliRunner().invoke(main, ["import", "damon", source, "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "5 ms (assumed" in ran.output
    ran = CliRunner().invoke(main, ["import", "damon", source + "x", "--out", str(out)])
    assert (ran.exit_code, ran.output.count("\n")) == (2, 1)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["json", "raw", "events"]), st.data())
def test_damaged_recordings_are_read_or_refused_but_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject
) -> None:
    text = FORMS[form]
    at = data.draw(st.integers(0, len(text) - 1))
    until = data.draw(st.integers(at, min(len(text), at + 30)))
    put = data.draw(st.text(st.characters(min_codepoint=9, max_codepoint=126), max_size=5))
    path = tmp_path_factory.mktemp("damaged") / "damon.data"
    path.write_text(text[:at] + put + text[until:])
    found, error = [], None
    try:
        found = recordings(str(path))
    except InputError as refusal:
        error = refusal
    assert error is None or (error.file and "\n" not in str(error))
    for recording in found:
        for snapshot in recording.snapshots:
            assert snapshot.duration_ns > 0
            assert all(one.start < one.end and 0 <= one.share <= 1 for one in snapshot.regions)
