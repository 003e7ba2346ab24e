"""Is the published record run as it stands, and judged as it says?"""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from simkvm.scenario.errors import InputError
from simkvm.scenario.load import require_possible
from simkvm.scenario.machine import load_machine
from simkvm.show.validation import tally
from simkvm.units import GIB
from simkvm.validate import published
from simkvm.validate.benchmarks import UNANSWERED, cut
from simkvm.validate.curves import curves, doubled, growth, ratio, shapes
from simkvm.validate.hosts import data, host_of, hosts
from simkvm.validate.row import PublishedRow, ShapeRow, document

RUN = [f for f in published.figures() if published.benchmark_of(f) is not None]


def test_every_figure_is_run_or_said_to_be_unanswered() -> None:
    assert {f.id for f in published.figures() if f not in RUN} == set(UNANSWERED)


@pytest.mark.parametrize("figure", RUN, ids=lambda f: f"{f.id}/{f.metric}/{f.arm}")
def test_a_benchmark_is_a_scenario_that_can_be_run(figure: published.Figure) -> None:
    benchmark = published.benchmark_of(figure)
    assert benchmark is not None
    run = benchmark.run(figure, host_of(figure.id), published.LIMIT_BYTES)
    require_possible(run.scenario)
    # Reclaim needs the time to go round the memory, and so a small one (the scale rule).
    assert 1 / (1024 if figure.id.startswith("V2-") else 128) <= run.scale <= 1


def test_a_benchmark_is_whole_unless_it_is_too_large() -> None:
    assert [cut(size * GIB, 32 * GIB) for size in (1, 32, 33, 112, 192)] == [1, 1, 2, 4, 8]


def test_a_fitted_constant_is_a_parameter_of_its_machine_and_says_how() -> None:
    for host in hosts():
        machine = load_machine(host.machine())
        for fitted in host.fitted:
            assert machine[fitted.name] == fitted.value
        assert all(fitted.how for fitted in (*host.fitted, *host.fitted_workload))
        assert bool(host.fitted or host.fitted_workload) == bool(host.fit)


def test_rows_that_constants_were_fitted_to_are_few_and_called_so() -> None:
    fit = [f for f in RUN if host_of(f.id).fitted_to(f.id, f.metric, f.arm)]
    assert 0 < len(fit) < len(RUN) / 3
    for host in hosts():  # each pattern says something
        for pattern in host.fit:
            wanted = replace(host, fit=(pattern,))
            assert any(wanted.fitted_to(f.id, f.metric, f.arm) for f in RUN), pattern


def test_ageing_is_predicted() -> None:
    """Of the arms with ageing only one pass of one vCPU fits a constant, on each host."""
    ageing = [f for f in RUN if f.id.startswith("V4-") and "ageing" in f.arm and f.arm[:2] != "no"]
    fit = [f for f in ageing if host_of(f.id).fitted_to(f.id, f.metric, f.arm)]
    assert [(f.id, f.metric, f.arm) for f in fit] == [("V4-1", "aging_pass", "lock-free ageing")]


def test_what_a_base_has_from_the_same_message_is_said() -> None:
    """What is said to be shared is the base's, not fitted anew, and rests on the message."""
    for host in hosts():
        messages = {f.message_id for f in RUN if host_of(f.id) is host}
        base = load_machine(host.base).parameters
        for name in host.shared:
            assert name not in {fitted.name for fitted in host.fitted}
            source = base[name].source
            through = [base[word].source for word in source.split() if word in base]
            assert any(id_ in text for id_ in messages for text in (source, *through)), name
    assert any(host.shared for host in hosts())


def test_a_small_run_end_to_end(tmp_path: Path) -> None:
    """One figure with both arms, from the record to its verdict; the second time from the store."""
    rows = published.rows("V4-1", tmp_path / "store", 1, 16 << 20)
    assert [(row.arm, row.role) for row in rows if isinstance(row, PublishedRow)] == [
        ("lock-free ageing", "fit"),
        ("write-locked ageing", "predicted"),
        ("lock-free ageing", "predicted"),
        ("no ageing", "fit"),
        ("write-locked ageing", "predicted"),
    ]
    alone = next(row for row in rows if isinstance(row, PublishedRow) and row.arm == "no ageing")
    assert alone.scale == 1 / 64
    machine = load_machine(host_of("V4-1").machine())
    pages = 1 << 18
    touched = (machine["s2_fault4k_alloc_total_ns"] + machine["page_touch_ns"]) * pages / 1e9
    assert alone.simulated == pytest.approx(touched, rel=0.02)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("point.json")}
    assert published.rows("V4-1", tmp_path / "store", 1, 16 << 20) == rows
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.parametrize("id_", ["S-1.1", "T-3.1"])
def test_a_row_with_a_constant_of_its_own_comes_out(id_: str, tmp_path: Path) -> None:
    """One constant an arm was fitted to it: one that it does not hang on would show here."""
    rows = published.rows(id_, tmp_path / "store", 1)
    assert [row.role for row in rows if isinstance(row, PublishedRow)] == ["fit", "fit"]
    for row in rows:
        assert row.simulated == pytest.approx(row.measured, rel=0.02), row.id


def test_a_glob_without_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row matches 'V4-9'"):
        published.rows("V4-9", tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("only", ["A-7", "V4-8", "V5-4"])
def test_a_limit_that_leaves_too_little_to_measure_is_refused(only: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--memory: \d+ vCPUs need \d+ MiB at least"):
        published.rows(only, tmp_path / "store", 1, 32 << 20)
    assert not (tmp_path / "store").exists()


# -- verdicts and shapes -------------------------------------------------------------------------


def row(simulated: float | None, measured: float = 1.0, **keys: object) -> PublishedRow:
    made = PublishedRow(
        id="A-1",
        workload="",
        params="-v 1",
        metric="populate",
        arm="write-locked faults",
        unit="s",
        measured=measured,
        simulated=simulated,
        role="predicted",
        source="",
    )
    return replace(made, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("simulated", "verdict"),
    [(0.79, "outside"), (0.81, "inside"), (1.19, "inside"), (1.21, "outside"), (None, "missing")],
)
def test_twenty_per_cent_either_way(simulated: float | None, verdict: str) -> None:
    assert row(simulated).verdict == verdict


def test_more_than_is_a_bound_below() -> None:
    assert row(5.0, bound="more than").verdict == "inside"
    assert row(0.9, bound="more than").verdict == "outside"


def test_the_tally_counts_what_is_missing_as_no_prediction() -> None:
    said = tally([row(1.0), row(2.0), row(None), row(1.0, role="fit")])
    assert said == "4 rows: 2 inside, 1 missing, 1 outside; of 2 predictions 1 inside (50%)"


def test_the_tally_says_how_many_predictions_are_bounds() -> None:
    said = tally([row(1.0), row(5.0, bound="more than")])
    assert said.endswith("of 2 predictions 2 inside (100%), 1 of them a mere bound")


def test_json_has_no_number_that_json_does_not_know() -> None:
    (told,) = document([row(None)])
    assert told["deviation"] is told["ratio"] is None
    assert told["verdict"] == "missing"
    (told,) = document([row(1.5, role="fit")])
    assert (told["role"], told["ratio"], told["deviation"]) == ("fit", 1.5, 0.5)


LINE = [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (8.0, 2.0), (16.0, 4.0)]


def test_a_curve_that_is_flat_and_then_a_line() -> None:
    assert doubled(LINE) == pytest.approx(8)
    assert growth(LINE) == pytest.approx(1)
    assert growth([(x, x**0.5) for x, _ in LINE]) == pytest.approx(0.5)
    assert doubled([(1.0, 1.0), (4.0, 4.0)]) == pytest.approx(2)
    assert doubled([(1.0, 1.0), (4.0, 1.5)]) is None
    assert ratio(LINE, [(8.0, 4.0), (16.0, 4.0)]) == [(8.0, 0.5), (16.0, 1.0)]


def made_of(change: float) -> list[ShapeRow]:
    """Shapes of a record whose simulated curve bends ``change`` times later than the measured."""
    vcpus = (1, 2, 4, 8, 16, 32)
    rows = [
        row(
            max(1.0, v / (4 * change)),
            max(1.0, v / 4),
            id=f"A-{n}",
            params=f"-v {v}",
            arm=arm,
        )
        for n, v in enumerate(vcpus)
        for arm in ("write-locked faults", "parallel faults (read lock)")
    ]
    assert len(curves(rows)) == 2
    return list(shapes(rows))


def test_the_same_curve_has_the_same_shape_and_another_has_not() -> None:
    assert {shape.verdict for shape in made_of(1)} == {"inside"}
    knees = [shape for shape in made_of(3) if shape.id.endswith("knee")]
    assert [shape.verdict for shape in knees] == ["outside", "outside"]
    assert [shape.simulated / shape.measured for shape in knees] == pytest.approx([3, 3])


def test_every_explanation_is_of_a_row_of_the_record() -> None:
    entries = tomllib.loads(data("misses.toml"))["miss"]
    rows = [row(9.0, id=f.id, metric=f.metric, arm=f.arm) for f in RUN]
    given = {published.explanation(each) for each in rows}
    for entry in entries:
        assert " ".join(entry["why"].split()) in given, entry
