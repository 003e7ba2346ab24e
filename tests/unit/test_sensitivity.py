"""Does the analysis find what a constant does, name what nothing hangs on, and run only that?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from simkvm.cli import main
from simkvm.scenario.errors import InputError
from simkvm.scenario.fields import FrozenDict
from simkvm.scenario.load import Study, load
from simkvm.scenario.machine import load_machine
from simkvm.show import sensitivity as shown
from simkvm.show.text import render
from simkvm.study import metric as metrics
from simkvm.study.effect import Effect, Tornado, corners_of
from simkvm.study.metric import Metric
from simkvm.study.point import measure
from simkvm.study.progress import Silent
from simkvm.study.result import Results
from simkvm.study.sensitivity import Sensitivity, sensitivity
from simkvm.study.subject import at

WORKLOADS = Path(__file__).parents[2] / "workloads"
ALTRA = load_machine("ampere-altra-80c")
HOLD = "range_start.hold_total_ns"
FLUSHES = 513
"""A call that takes back 2 MiB of mapped 4 KiB pages flushes 512 leaves and their table."""


def study(folder: Path, **keys: Any) -> Study:
    """One call of MADV_DONTNEED over the half of a mapped guest that hardly runs."""
    guest = {"memory": "4 MiB", "mapped": True, "access": {"pattern": "uniform", "touches": 1}}
    vmm = {"kind": "madvise_dontneed", "guest": "vm0", "range": "2 MiB", "rate": "1000 / s"}
    document = {
        "name": "one call",
        "machine": "ampere-altra-80c",
        "kernel": "linux-6.12",
        "duration": "5 ms",
        "guests": {"vm0": guest},
        "contenders": {"vmm": {**vmm, "start": "1 ms", "stop": "2 ms"}},
        **keys,
    }
    path = folder / "one-call.yaml"
    path.write_text(json.dumps(document))
    return load(path)


def analyse(wanted: Study, out: Path, metric: str = HOLD, **options: Any) -> Sensitivity:
    return sensitivity(wanted, metric, out, 1, progress=Silent(), **options)


def test_the_swing_of_a_flush_is_its_cost_times_the_flushes(tmp_path: Path) -> None:
    """Without range TLBI each leaf is flushed under mmu_lock, and a flush takes at least the time
    that the machine serves a broadcast in.
    """
    found = analyse(study(tmp_path), tmp_path / "out", parameters=["tlbi_s2_page_ns"])
    (effect,) = found.tornados[0].effects
    flush, least = ALTRA.parameters["tlbi_s2_page_ns"], ALTRA["tlbi_global_service_ns"]
    assert effect.at_high - effect.value == pytest.approx(FLUSHES * (flush.high - flush.value))
    assert effect.value - effect.at_low == pytest.approx(
        FLUSHES * (flush.value - max(flush.low, least))
    )
    assert effect.swing == effect.at_high - effect.at_low
    assert math.isinf(effect.half_width)


def test_what_no_run_uses_is_said_and_not_run(tmp_path: Path) -> None:
    wanted = study(tmp_path)
    record, certificate = measure(wanted.points[0].scenario)
    asked = set(certificate["parameters_read"])
    assert "tlbi_s2_page_ns" in asked
    assert "zram_in_lz4_ns" not in asked  # nothing swaps yet
    names = ["tlbi_s2_page_ns", "zram_in_lz4_ns", "age_walk_ns", "srcu_ns"]
    found = analyse(wanted, tmp_path / "out", parameters=names)
    (one,) = found.tornados
    assert [effect.parameter.name for effect in one.moving] == ["tlbi_s2_page_ns"]
    assert set(one.unused) == {"zram_in_lz4_ns", "age_walk_ns"}  # asked for in vain counts, too
    assert one.still == ("srcu_ns",)  # the call comes later, its hold is the same
    tried = found.results.summary["parameter"]
    assert set(tried) == {"", "tlbi_s2_page_ns", "age_walk_ns", "srcu_ns"}
    assert record.fingerprint == found.results[0].fingerprint


def test_everything_is_tried_and_the_largest_comes_first(tmp_path: Path) -> None:
    analysis = analyse(study(tmp_path), tmp_path / "out")
    (one,) = analysis.tornados
    swings = [effect.swing for effect in one.effects]
    assert swings == sorted(swings, reverse=True)
    assert {effect.parameter.name for effect in one.effects} == set(ALTRA.parameters)
    assert [effect.parameter.name for effect in one.moving][:2] == [
        "tlbi_s2_page_ns",
        "unmap_s2_4k_noflush_ns",
    ]
    # 1.3 us at most, below the latency of one flush; there is never more than one here
    assert "tlbi_global_service_ns" in one.unused
    assert {e.parameter.basis for e in one.among("E")} == {"E"}
    assert one.lowest < one.value < one.highest
    rows = analysis.frame
    assert list(rows["swing"]) == swings
    assert rows.set_index("parameter").loc["tlbi_s2_page_ns", "high"] == 2200
    assert len(one.moving) + len(one.still) + len(one.unused) == len(ALTRA.parameters)


def test_the_corners_add_up_where_constants_act_by_themselves(tmp_path: Path) -> None:
    """What a leaf costs adds to its flush. The flush is the larger of two, so those two do not."""
    leaf, flush = "unmap_s2_4k_noflush_ns", "tlbi_s2_page_ns"
    (one,) = analyse(study(tmp_path), tmp_path / "out", parameters=[leaf, flush]).tornados
    assert one.added_up == pytest.approx((one.lowest, one.highest))
    served, quick_ns = "tlbi_global_service_ns", 1000
    quick = {"base": ALTRA.name, "set": {flush: quick_ns}}
    wanted = study(tmp_path, machine=quick)
    (two,) = analyse(wanted, tmp_path / "out", parameters=[flush, served]).tornados
    dearest, slowest = ALTRA.parameters[flush].high, ALTRA.parameters[served].high
    assert quick_ns < slowest < dearest
    assert two.highest - two.value == pytest.approx(FLUSHES * (dearest - quick_ns))
    assert two.added_up[1] - two.highest == pytest.approx(FLUSHES * (slowest - quick_ns))
    (alone,) = analyse(study(tmp_path), tmp_path / "out", parameters=[leaf]).tornados
    assert math.isnan(alone.lowest)
    assert math.isnan(alone.highest)


def test_a_comparison_divides_at_the_same_setting(tmp_path: Path) -> None:
    """Half the range has half the flushes, and with each setting by itself."""
    vmm = {"kind": "madvise_dontneed", "guest": "vm0", "rate": "1000 / s", "start": "1 ms"}
    wanted = study(
        tmp_path, contenders={"vmm": {**vmm, "stop": "2 ms", "range": ["2 MiB", "1 MiB"]}}
    )
    names = ["tlbi_s2_page_ns", "unmap_s2_4k_noflush_ns"]
    plain = analyse(wanted, tmp_path / "out", parameters=names)
    ratio = analyse(wanted, tmp_path / "out", parameters=names, over="range=1 MiB")
    (one,) = ratio.tornados
    assert one.axes == {"contenders.vmm.range": "2 MiB / 1 MiB"}
    above, below = plain.tornados
    for effect in one.effects:
        name = effect.parameter.name
        (two,) = (e for e in above.effects if e.parameter.name == name)
        (half,) = (e for e in below.effects if e.parameter.name == name)
        assert effect.at_high == two.at_high / half.at_high
        assert effect.at_low == two.at_low / half.at_low
    assert one.value == above.value / below.value == pytest.approx(2, rel=0.02)


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, out = study(tmp_path), tmp_path / "out"
    names = ["tlbi_s2_page_ns", "unmap_s2_4k_noflush_ns"]
    first = analyse(wanted, out, parameters=names[:1])
    before = {r.certificate["key"]: r.certificate["finished_utc"] for r in first.results}
    runs = []
    monkeypatch.setattr(
        "simkvm.study.sweep.measure", lambda *a: runs.append(a[1]["setting"]) or measure(*a)
    )
    both = analyse(wanted, out, parameters=names)
    assert runs == ["low", "high", "lowest", "highest"]
    after = {r.certificate["key"]: r.certificate["finished_utc"] for r in both.results}
    assert before.items() <= after.items()
    pd.testing.assert_frame_equal(both.results.summary, Results(out).summary)
    again = analyse(wanted, out, parameters=names)
    assert len(runs) == 4
    assert again.tornados == both.tornados


def test_replications_give_an_interval_by_pairs(tmp_path: Path) -> None:
    """What is drawn decides which pages are mapped when the call comes."""
    guest = {"memory": "4 MiB", "access": {"pattern": "uniform", "touches": 400, "think": "1 us"}}
    wanted = study(tmp_path, guests={"vm0": guest})
    found = analyse(wanted, tmp_path / "out", parameters=["tlbi_s2_page_ns"], replications=3)
    one = found.tornados[0]
    (effect,) = one.effects
    assert 0 < one.half_width < math.inf
    # The flushes differ between replications, but high and low of one have the same ones.
    assert effect.half_width < 2 * one.half_width
    assert set(found.results.summary["replication"]) == {0, 1, 2}
    assert "noise" in render(shown.report(found))


def test_what_chance_explains_does_not_tell() -> None:
    """A change within its half width is no effect; with one replication nothing is known of it."""
    base = ALTRA.parameters["srcu_ns"]

    def effect(name: str, half_width: float) -> Effect:
        parameter = replace(base, name=name)
        return Effect(parameter, 9.0, 10.0, 12.0, changed=True, half_width=half_width)

    told, lost, alone = effect("told", 2.9), effect("lost", 3.1), effect("alone", math.inf)
    one = Tornado({}, 10.0, 0.0, (told, lost, alone))
    assert one.telling == (told, alone)
    assert one.moving == (told, lost, alone)
    assert corners_of(one) == {  # a span has to hold what may be an effect, too
        "lowest": (("told", "low"), ("lost", "low"), ("alone", "low")),
        "highest": (("told", "high"), ("lost", "high"), ("alone", "high")),
    }
    assert one.added_up == (7.0, 16.0)
    up = Effect(base, 11.0, 10.0, 12.0, changed=True, half_width=math.inf)  # raises it either way
    assert corners_of(Tornado({}, 10.0, 0.0, (told, up)))["lowest"] == (("told", "low"),)


def test_a_setting_that_changes_nothing_is_the_same_scenario(tmp_path: Path) -> None:
    scenario = study(tmp_path).points[0].scenario
    assert at(scenario, (("tlb_l2_entries", "low"),)) is scenario
    changed = at(scenario, (("srcu_ns", "high"),))
    assert load_machine(changed.machine)["srcu_ns"] == ALTRA.parameters["srcu_ns"].high
    twice = at(changed, (("call_rcu_ns", "low"),))
    assert dict(twice.machine["set"]) == {"srcu_ns": 40, "call_rcu_ns": 60}  # type: ignore[index]


SMALL = {
    "quick.yaml": ["guests.vm0.memory_per_vcpu=2 MiB", "guests.vm0.access.repeat=2"],
    "deferred-frees.yaml": ["host.hz=250", "kernel=linux-6.4-yuzhao-v2", "duration=30 ms"],
    "shadow-mmu.yaml": ["guests.vm0.vcpus=1", "guests.vm0.memory_per_vcpu=2 MiB"],
    "selftests/demand_paging_test.yaml": ["selftest.vcpus=1", "selftest.vcpu_memory=2MiB"],
    "takers/ksm.yaml": [],
}


@pytest.mark.parametrize("file", SMALL)
def test_what_a_run_did_not_ask_for_has_no_part_in_it(file: str) -> None:
    """All of that set to its high at once, and nothing comes out otherwise."""
    scenario = load(WORKLOADS / file, SMALL[file]).points[0].scenario
    record, certificate = measure(scenario)
    machine = load_machine(scenario.machine)
    asked = set(certificate["parameters_read"])
    unasked = [p for p in machine.parameters.values() if p.name not in asked and p.high > p.value]
    assert len(unasked) > 20
    changes = {p.name: p.high for p in unasked}
    elsewhere = scenario.model_copy(
        update={"machine": FrozenDict({"base": machine.name, "set": FrozenDict(changes)})}
    )
    again, _ = measure(elsewhere)
    assert (again.fingerprint, again.summary) == (record.fingerprint, record.summary)


# -- wrong words ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "agein_pass_mean_ns"}, "did you mean 'ageing_pass_mean_ns'"),
        ({"metric": "fault.wait_p98_ns"}, "did you mean 'fault.wait_p99_ns'"),
        ({"metric": "safety"}, "no metric 'safety'"),  # no number
        ({"parameters": ["tlbi_s2_pag_ns"]}, "did you mean 'tlbi_s2_page_ns'"),
        ({"over": "kernal=linux-6.12"}, "did you mean 'kernel'"),
        ({"over": "kernel=linux-6.13"}, "did you mean 'linux-6.12'"),
        ({"over": "kernel"}, "expected KEY=VALUE"),
    ],
)
def test_a_wrong_name_is_said_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    wanted = study(tmp_path, kernel=["linux-6.12", "linux-7.1-lockless"])
    with pytest.raises(InputError) as error:
        analyse(wanted, tmp_path / "out", **options)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_machines_are_not_compared(tmp_path: Path) -> None:
    wanted = study(tmp_path, machine=["ampere-altra-80c", "graviton3-64c"])
    with pytest.raises(InputError, match="ranges of its own"):
        analyse(wanted, tmp_path / "out", over="machine=graviton3-64c")


def test_a_site_that_took_no_lock_has_no_value(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no value"):
        analyse(study(tmp_path), tmp_path / "out", "memslot.wait_mean_ns", parameters=["srcu_ns"])


def test_names_are_those_of_a_run() -> None:
    assert {"ageing_pass_mean_ns", "deferred_bytes_peak", "age.wait_p99_ns"} <= set(metrics.names())
    assert "safety" not in metrics.names()


def test_a_lock_figure_is_taken_over_guests_and_modes() -> None:
    """Sums, maxima, means by weight; a quantile from the merged buckets, at most the maximum."""
    locks = pd.DataFrame(
        {
            "site": ["fault", "fault", "age"],
            "acquisitions": [1, 3, 9],
            "wait_mean_ns": [10.0, 30.0, 0.0],
            "wait_max_ns": [10, 40, 0],
            "wait_p50_ns": [10, 30, 0],
        }
    )
    histograms = pd.DataFrame(
        {
            "site": ["fault"] * 3,
            "quantity": ["wait"] * 3,
            "high_ns": [11, 21, 41],
            "count": [1, 1, 2],
        }
    )

    class Found:
        summary: dict[str, float] = {}  # noqa: RUF012

    found: Any = Found()
    found.locks, found.histograms = locks, histograms
    expected = {"acquisitions": 4, "wait_mean_ns": 25, "wait_max_ns": 40, "wait_p50_ns": 20}
    for column, value in expected.items():
        assert Metric("", "fault", column).of(found) == value
    assert math.isnan(Metric("", "teardown", "acquisitions").of(found))


# -- the command ------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["sensitivity", *arguments])


def test_the_command_prints_the_rows_and_draws_them(tmp_path: Path) -> None:
    file, out = study(tmp_path).path, tmp_path / "out"
    chosen = ("--parameter", "tlbi_s2_page_ns", "--parameter", "zram_in_lz4_ns")
    words = (file, "--metric", HOLD, *chosen, "--jobs", "1", "--out", str(out))
    said = command(*words)
    assert said.exit_code == 0, said.output
    assert "tlbi_s2_page_ns  D      900 ns  1.5 us  2.2 us" in said.stdout
    assert "Used by no run (1): zram_in_lz4_ns." in said.stdout
    assert (out / "figures" / f"tornado-{HOLD}.png").stat().st_size < 100_000
    document = json.loads(command(*words, "--json").stdout)
    (point,) = document["points"]
    assert point["unused"] == ["zram_in_lz4_ns"]
    (row,) = point["rows"]
    assert row["basis"] == "D"
    assert row["swing"] == row["at_high"] - row["at_low"]


def test_the_command_refuses_a_wrong_metric(tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = command(study(tmp_path).path, "--metric", "vcpu_wal_ns", "--out", str(out))
    assert said.exit_code == 2
    assert said.stderr.strip() == "metric: no metric 'vcpu_wal_ns' (did you mean 'vcpu_wall_ns'?)"
    assert not out.exists()


def test_the_figure_has_a_bar_for_each_end(tmp_path: Path) -> None:
    found = analyse(study(tmp_path), tmp_path / "out", parameters=["tlbi_s2_page_ns"])
    panel = found.plot_tornado().axes[0]
    (effect,) = found.tornados[0].effects
    ends = {round(bar.get_x() + bar.get_width()) for bar in panel.patches}  # type: ignore[attr-defined]
    assert ends == {round(effect.at_low), round(effect.at_high)}
