"""Do the pages of docs/answers say what their runs say, at a size that takes seconds?"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from simkvm.answers import deferred_tables, eviction
from simkvm.answers.ageing_locks import KERNELS, SITUATIONS, Cell
from simkvm.answers.headline import CALLBACK
from simkvm.answers.page import assumptions, duration, fill, percent, table, times
from simkvm.answers.pages import PAGES, write
from simkvm.answers.runs import Points, Runs, place, ratio
from simkvm.cli import main
from simkvm.scenario.load import load
from simkvm.study.progress import Silent
from simkvm.study.result import Results
from simkvm.study.statistics import Interval

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    store = tmp_path_factory.mktemp("answers")
    return Runs(ROOT / "workloads", store, 1, 2, reduced=True, progress=Silent())


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs")


@pytest.mark.parametrize("name", list(PAGES))
def test_a_page_is_whole(name: str, runs: Runs, docs: Path) -> None:
    """Everything filled in, figures beside it and small, commands that can be typed."""
    (path,) = write([name], docs, runs)
    assert path == docs / PAGES[name].path
    text = path.read_text()
    assert not re.search(r"\$[a-z_]+|\bnan\b|\binf\b|None", text)
    figures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert figures
    for figure in figures:
        assert 0 < (path.parent / figure).stat().st_size < 100_000, figure
    commands = re.findall(r"(?m)^    (simkvm .*)$", text)
    assert {shlex.split(line)[1] for line in commands} <= {"sweep", "sensitivity"}
    for line in commands:
        words = shlex.split(line)
        sets = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
        assert load(words[2], sets).points  # each is a command that one can type
        assert Results(words[words.index("--out") + 1]).failed == []
    assert f"`simkvm answers {name}`" in text


def test_the_page_shows_what_the_store_holds(runs: Runs, docs: Path) -> None:
    """One cell of a table, taken from the stored points by other means."""
    (path,) = write(["empty-table-walk"], docs, runs)
    summary = Results(runs.store / "empty-table-walk").summary
    walked = summary[summary["kernel"] == "linux-6.4-upton"].set_index("guests.vm0.page_size")
    found = walked.loc["64 KiB", "callback_ns_per_table"]
    (row,) = re.findall(r"(?m)^\| 8192 \(64 KiB pages\) \| ([\d.]+) us ", path.read_text())
    assert float(row) == pytest.approx(found / 1000, rel=0.005)


def test_older_points_of_a_store_are_left_alone(tmp_path: Path) -> None:
    """A constant that changed leaves points with the same axes behind; a page must not mix them."""
    (tmp_path / "one.yaml").write_text(
        "name: one\nmachine: ampere-altra-80c\nkernel: linux-6.12\nduration: 1 ms\n"
        "guests: {vm0: {memory: 1 MiB, access: {pattern: uniform, think: [1 us, 2 us]}}}\n"
    )
    runs = Runs(tmp_path, tmp_path / "store", 1, 2, progress=Silent())
    dearer = "machine={base: ampere-altra-80c, set: {exit_roundtrip_ns: 500}}"
    before = runs.sweep("one.yaml", [dearer])
    after = runs.sweep("one.yaml")
    assert len(Results(tmp_path / "store" / "one")) == 8
    for points, exit_ns in ((before, 500), (after, 306)):
        assert len(points.results) == 4
        costs = [r.certificate["machine"]["parameters"] for r in points.results]
        assert {cost["exit_roundtrip_ns"] for cost in costs} == {exit_ns}
    values = after.values(lambda result: float(result.summary["touches"]))
    assert [dict(at)["guests.vm0.access.think"] for at in values] == ["1 us", "2 us"]
    assert all(set(by_number) == {0, 1} for by_number in values.values())
    assert runs.commands[0].startswith(f"simkvm sweep {tmp_path}/one.yaml --set 'machine=")


# -- their arithmetic -------------------------------------------------------------------------


def result(**summary: Any) -> Any:
    """A point whose VMM starts at 100 ns of 400; 2 tables wait from 200 on, 6 from 300 on."""
    steps = {"t_ns": [0, 200, 300], "deferred_tables": [0, 2, 6]}
    return SimpleNamespace(
        summary={"sim_ns": 400, "callbacks": 0, **summary},
        timeline=pd.DataFrame(steps),
        scenario={"contenders": {"vmm": {"start": "100 ns"}}},
        axes={},
    )


def test_what_waits_is_a_mean_over_the_time_from_the_start_on() -> None:
    assert deferred_tables.waiting(result()) == pytest.approx((2 * 100 + 6 * 100) / 300)
    assert deferred_tables.waiting(result(), 2 / 3, 1) == pytest.approx(6)
    assert deferred_tables.peak(result(), 0, 0.5) == 2
    assert deferred_tables.growth(result()) == pytest.approx(3)


def test_k_is_what_waits_over_what_comes_in_a_grace_period() -> None:
    """Six tables in 300 ns, none freed: four in a grace period of 200 ns, and 8/3 that wait."""
    assert deferred_tables.queued_per_s(result()) == pytest.approx(6 / 300e-9)
    assert deferred_tables.factor(result(grace_period_p50_ns=200)) == pytest.approx(8 / 3 / 4)


def cell(**slowdowns: float) -> Cell:
    """Guests that take so much longer under each lock, and pages that take 100 ns under all."""
    pages = {kernel: {0: 100.0, 1: 100.0} for kernel in KERNELS}
    guest = {
        kernel: {0: 50 * slowdowns[lock.split()[0]], 1: 70 * slowdowns[lock.split()[0]]}
        for kernel, lock in KERNELS.items()
    }
    return Cell(SITUATIONS[0], "m", 1, pages, guest, {0: 50.0, 1: 70.0})


def test_a_guest_notices_from_a_hundredth_on() -> None:
    assert cell(write=1.009, read=1.0, no=1.0).unnoticed
    assert not cell(write=1.0, read=1.011, no=1.0).unnoticed
    slow_by_ageing = cell(write=1.5, read=1.505, no=1.5)
    assert slow_by_ageing.costs_nothing("linux-7.1")
    assert slow_by_ageing.costs_nothing("linux-7.1-read-locked")
    assert not cell(write=1.5, read=1.52, no=1.5).costs_nothing("linux-7.1-read-locked")
    assert cell(write=1.5, read=1.0, no=1.0).alike
    slow = cell(write=1.5, read=1.0, no=1.0).slowdown("linux-7.1")
    assert slow.mean == pytest.approx(1.5)  # by pairs, so that what differs by seed drops out
    assert slow.half_width == pytest.approx(0, abs=1e-12)


def test_pairs_need_both_partners() -> None:
    with pytest.raises(KeyError):
        ratio({0: 1.0, 1: 2.0}, {0: 1.0})


def test_numbers_are_written_with_their_intervals() -> None:
    assert percent(Interval(1.02, 0.003, 0.95, 3)) == "+2.0 % ± 0.3"
    assert percent(Interval(0.9999, 0.0001, 0.95, 3)) == "+0.0 %"
    assert times(Interval(2.5, float("inf"), 0.95, 1)) == "2.5"
    assert duration(Interval(2500.0, 120.0, 0.95, 3)) == "2.5 us ± 120 ns"
    assert duration(Interval(2500.0, 2.0, 0.95, 3)) == "2.5 us"  # a thousandth says nothing
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| :-- | --: |\n| 1 | 2 |"
    assert place({"b": 1, "a": "x", "replication": 2}) == (("a", "x"), ("b", "1"))


def test_assumptions_span_the_estimates(runs: Runs) -> None:
    """A visit is an estimate of 2 to 15 ns, a table has 512."""
    analysis = CALLBACK.analyse(runs)
    (one,) = analysis.tornados
    low, high = one.value - 512 * 2, one.value + 512 * 11
    said = assumptions(analysis, one)
    assert f"between {low / 1000:.3g} us and {high / 1000:.3g} us" in said


def test_a_template_wants_all_its_parts() -> None:
    with pytest.raises(KeyError):
        fill("sensitivity", weights="")


def test_points_are_grouped_by_axis() -> None:
    points = Points([SimpleNamespace(axes={"hz": 100}), SimpleNamespace(axes={"hz": 250})])  # type: ignore[list-item]
    assert points.axis("hz") == [100, 250]


def test_a_wrong_page_is_named_before_anything_is_run(tmp_path: Path) -> None:
    said = CliRunner().invoke(main, ["answers", "empty-table-wak", "--out", str(tmp_path / "docs")])
    assert said.exit_code == 2
    assert "did you mean 'empty-table-walk'" in said.stderr
    assert not (tmp_path / "docs").exists()


def test_a_longer_wait_without_a_lock_is_explained_where_it_happens() -> None:
    names = ("queued_share", "queued_wait", "starts", "start_wait", "by_kswapd")

    def pressed(kernel: str, wait_ns: float) -> eviction.Pressed:
        values = {"fault_wait": {0: wait_ns}, **{name: {0: 0.5} for name in names}}
        return eviction.Pressed("8 MiB", kernel, values)

    longer = [pressed("write", 4.0), pressed("read", 3.0), pressed("none", 6.0)]
    assert "On the host of 8 MiB a fault waits longer" in eviction._longer_wait(longer)
    assert eviction._longer_wait(longer[::-1]) == ""
