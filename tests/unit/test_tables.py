"""Do the reports say what the tables of a result hold, legibly and in people's units?"""

import json
import re

import numpy as np
import pandas as pd
import pytest
import synthetic_results as synthetic

from simkvm.show import document, points, tables
from simkvm.show.distribution import distribution, site_figure
from simkvm.show.text import named_table, render
from simkvm.units import format_count, format_duration, format_size


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def row(text: str, first: str) -> list[str]:
    """The cells of the only line that starts with `first`."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(first)]
    return cells(line)


@pytest.fixture(scope="module")
def locked() -> synthetic.SyntheticResult:
    return synthetic.result("linux-7.1")


@pytest.fixture(scope="module")
def sweep() -> synthetic.SyntheticResults:
    return synthetic.kernel_sweep(vcpus=(1, 8))


def test_headline_says_what_was_run_and_that_it_was_safe(locked):
    text = render(tables.headline(locked))

    assert text.splitlines()[0] == "synthetic: linux-7.1 on ampere-altra, seed 1"
    assert "vm0: 8 vCPUs, 8 GiB in 4 KiB pages, zipf" in text
    assert cells(text.splitlines()[2]) == ["simulated", "200 ms in 1.23 M events"]
    assert locked.fingerprint in text
    assert cells(text.splitlines()[4]) == ["safety", "clean"]


def test_guest_is_described_from_a_resolved_scenario():
    guest = {
        "vcpus": 1,
        "memory": None,
        "memory_per_vcpu": "256 MiB",
        "page_size": "4 KiB",
        "mapping": "2 MiB",
        "access": {"pattern": "populate"},
    }

    assert tables.describe_guest(guest) == (
        "1 vCPU, 256 MiB each in 4 KiB pages mapped as 2 MiB, populate"
    )


@pytest.mark.parametrize(
    ("found", "expect", "text"),
    [
        (0, "safe", "clean"),
        (0, "unsafe", "clean, though a violation was expected"),
        (1, "safe", "VIOLATED: 1 violation"),
        (3, "unsafe", "VIOLATED: 3 violations, as expected"),
        (0, "any", "clean"),
        (2, "any", "VIOLATED: 2 violations, which was the question"),
    ],
)
def test_verdict_weighs_what_was_found_against_what_was_expected(found, expect, text):
    result = synthetic.result(violations=[synthetic.violation()] * found, expect=expect)

    assert tables.verdict(result).plain == text
    assert points.unexpected(result) == (found > 0 and expect == "safe")


def test_lock_table_has_every_site_in_order_with_its_own_numbers(locked):
    (table,) = tables.lock_tables(locked)
    lines = render(table).splitlines()
    sites = [cells(line)[0] for line in lines[4:]]
    assert sites == ["fault", "age", "range_start", "range_end"]

    for site in sites:
        (stored,) = locked.locks[locked.locks["site"] == site].to_dict("records")
        assert row("\n".join(lines), f"{site} ") == [
            site,
            stored["mode"],
            format_count(stored["acquisitions"]),
            f"{stored['contended'] / stored['acquisitions']:.1%}",
            *(format_duration(stored[f"wait_{f}_ns"]) for f in ("p50", "p99", "max")),
            *(format_duration(stored[f"hold_{f}_ns"]) for f in ("p50", "p99", "max")),
            str(stored["queue_max"]),
        ]


def test_each_guest_has_its_own_lock_table():
    text = render(*tables.lock_tables(synthetic.result(guests=2)))

    assert "mmu_lock of vm0, by call site and mode" in text
    assert "mmu_lock of vm1, by call site and mode" in text


def group(number: int) -> synthetic.SyntheticResult:
    """A result of ``number`` guests vm0, vm1... that were asked for as one group."""
    result = synthetic.result(guests=number)
    one = next(iter(result.scenario["guests"].values()))
    result.scenario = {**result.scenario, "guests": {"vm": {**one, "count": number}}}
    return result


def test_a_group_of_guests_is_one_lock_table_with_the_figures_of_all():
    result = group(3)
    (table,) = tables.lock_tables(result)
    text = render(table)
    assert "mmu_lock of vm (3), by call site and mode" in text
    for site in ("fault", "range_start"):
        stored = result.locks[result.locks["site"] == site]
        cell = row(text, f"{site} ")
        assert cell[2] == format_count(stored["acquisitions"].sum())
        assert cell[6] == format_duration(stored["wait_max_ns"].max())
        merged = distribution([result], site, "wait")
        assert cell[5] == format_duration(round(merged.quantile_ns(0.99)))


def test_of_a_group_the_extremes_are_shown_and_the_whole():
    text = render(tables.guest_table(group(2)))
    assert row(text, "least: vm0")[1:3] == ["400 k", "2 M"]
    assert row(text, "most: vm1")[1:3] == ["800 k", "4 M"]
    assert row(text, "vm (2)")
    assert "  all " not in text


def test_passes_over_the_guests_of_a_group_are_one_row():
    result = group(2)
    passes = [("vm0", 0, 4_000_000, 1_000, 100, 16), ("vm1", 5_000_000, 7_000_000, 3_000, 500, 48)]
    columns = ["guest", "start_ns", "end_ns", "scanned", "young", "calls"]
    result.passes = pd.DataFrame(passes, columns=columns)
    assert row(render(tables.ageing_table(result)), "vm (2)")[1:3] == ["2", "3 ms"]


def test_guests_are_told_apart_and_added_up():
    result = synthetic.result(guests=2)
    text = render(tables.guest_table(result))

    # vm1 touches twice as often, for the 200 ms of the run.
    assert row(text, "vm0")[1:3] == ["400 k", "2 M"]
    assert row(text, "vm1")[1:3] == ["800 k", "4 M"]
    assert row(text, "all")[2] == format_count(result.summary["touches_per_s"])


def test_ageing_table_sums_passes_up():
    passes = pd.DataFrame(
        [("vm0", 0, 4_000_000, 1_000, 100, 16), ("vm0", 5_000_000, 15_000_000, 3_000, 500, 48)],
        columns=["guest", "start_ns", "end_ns", "scanned", "young", "calls"],
    )
    result = synthetic.result()
    result.passes = passes

    assert row(render(tables.ageing_table(result)), "vm0") == (
        ["vm0", "2", "7 ms", "7 ms", "10 ms", "4 k", "600", "15.0%", "64"]
    )


def test_a_run_without_ageing_or_locks_says_so():
    result = synthetic.result()
    result.passes = result.passes.iloc[:0]
    result.locks = result.locks.iloc[:0]
    text = render(tables.run_report(result))

    assert "no pass was completed" in text
    assert "was never taken" in text


def test_rcu_table_shows_deferred_memory_in_bytes():
    result = synthetic.result("linux-7.1-lockless")
    last = render(tables.rcu_table(result)).splitlines()[5]

    assert cells(last) == [
        "25",
        "7.85 ms",
        "7.85 ms",
        format_count(result.summary["callbacks"]),
        format_count(result.summary["deferred_tables_mean"]),
        format_count(result.summary["deferred_tables_peak"]),
        format_size(result.summary["deferred_bytes_mean"]),
        format_size(result.summary["deferred_bytes_peak"]),
        "4.1 k",
        "2.05 k",
    ]


def test_a_value_that_does_not_exist_is_a_dash():
    result = synthetic.result()
    result.summary["grace_period_p50_ns"] = float("nan")
    result.summary = result.summary.drop("callbacks")
    last = render(tables.rcu_table(result)).splitlines()[5]

    assert cells(last)[1] == "-"
    assert cells(last)[3] == "-"


def test_without_grace_periods_there_is_no_percentile():
    result = synthetic.result()
    for name in ("grace_periods", "grace_period_p50_ns", "grace_period_p99_ns"):
        result.summary[name] = 0

    assert cells(render(tables.rcu_table(result)).splitlines()[5])[:3] == ["0", "-", "-"]
    assert "grace" not in render(tables.sweep_report([result]))
    assert "grace" in render(tables.sweep_report([result, synthetic.result()]))


def test_violations_come_with_the_events_that_led_there():
    found = [synthetic.violation(time_ns=1_000 * i) for i in range(1, 8)]
    lines = render(*tables.violations(synthetic.result(violations=found))).splitlines()

    assert lines[1] == "  1. use after free at 1 us, guest vm0"
    assert lines[2].strip() == found[0]["message"]
    assert [line.strip() for line in lines[3:7]] == found[0]["timeline"]
    assert lines[-1] == "  and 2 more"


def test_a_report_is_plain_ascii_within_100_columns():
    text = render(
        tables.run_report(synthetic.result(guests=2, violations=[synthetic.violation()])),
        tables.run_report(synthetic.result("linux-7.1-lockless")),
    )

    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert all(line == line.rstrip() for line in text.splitlines())


def test_colours_only_on_request():
    result = synthetic.result(violations=[synthetic.violation()])

    assert "\x1b[" in render(tables.headline(result), colour=True)


def test_sweep_has_a_row_for_each_point_in_their_order(sweep):
    text = render(tables.sweep_report(sweep))
    first = text.split("\n\n")[0].splitlines()[4:]

    assert [cells(line)[:2] for line in first] == [
        [result.axes["kernel"], str(result.axes["guests.vm0.vcpus"])] for result in sweep
    ]
    assert [cells(line)[2] for line in first] == [
        format_count(result.summary["touches_per_s"]) for result in sweep
    ]


def test_sweep_shows_sites_and_leaves_out_locks_that_are_not_taken(sweep):
    locks = render(tables.sweep_report(sweep)).split("\n\n")[1]
    lockless = row(locks, "linux-7.1-lockless     8")
    (stored,) = [r for r in sweep if r.scenario["kernel"] == "linux-7.1-lockless"][1:]
    fault, range_start = (
        stored.locks[stored.locks["site"] == site].iloc[0] for site in ("fault", "range_start")
    )

    assert lockless[2:] == [
        *(format_duration(fault[f"wait_{f}_ns"]) for f in ("p50", "p99", "max")),
        "-",
        "-",
        *(format_duration(range_start[f"hold_{f}_ns"]) for f in ("p99", "max")),
    ]


def test_sweep_numbers_replications():
    results = [
        synthetic.result(axes={"kernel": "linux-7.1", "replication": i}, replication=i)
        for i in range(2)
    ]
    text = render(tables.sweep_report(results))

    assert [cells(line)[:2] for line in text.splitlines()[4:6]] == [
        ["linux-7.1", "0"],
        ["linux-7.1", "1"],
    ]


def test_sweep_says_why_points_have_no_result():
    failure = {"axes": {"kernel": "linux-7.1", "host.hz": 100}, "reason": "its worker died"}

    assert render(tables.sweep_report([], [failure])) == (
        "failed: kernel=linux-7.1, host.hz=100: its worker died"
    )


def test_overrides_of_a_kernel_are_shown_in_words():
    result = synthetic.result(axes={"kernel": "{base: linux-7.1, set: {table_free: inline}}"})
    result.scenario["kernel"] = {"base": "linux-7.1", "set": {"table_free": "inline"}}
    text = render(tables.sweep_report([result]))

    assert row(text.split("\n\n")[0], "linux-7.1")[0] == "linux-7.1 table_free=inline"


def test_a_long_place_takes_two_lines_not_half_of_the_width():
    result = synthetic.result(axes={"kernel": ""})
    result.scenario["kernel"] = {"base": "linux-7.1", "set": {"table_free": "free_removed_table"}}
    text = render(tables.sweep_report([result]))

    first = text.split("\n\n")[0]
    assert row(first, "linux-7.1") == ["linux-7.1"]
    assert row(first, "table_free")[0] == "table_free=free_removed_table"
    assert len(row(first, "table_free")) == 9


def test_a_site_of_several_guests_is_one_distribution():
    result = synthetic.result(guests=2)
    rows = result.locks[result.locks["site"] == "fault"]
    merged = site_figure([result], "fault", "hold", "p99")

    assert rows["hold_p99_ns"].nunique() == 2
    assert merged == distribution([result], "fault", "hold").quantile_ns(0.99)
    assert rows["hold_p99_ns"].min() * 0.96 <= merged <= rows["hold_p99_ns"].max() * 1.04
    assert site_figure([result], "fault", "hold", "max") == rows["hold_max_ns"].max()
    below = rows["hold_p50_ns"].min()
    result.locks["hold_max_ns"] = below  # as if all were at the bottom of their bucket
    assert site_figure([result], "fault", "hold", "p99") == below
    assert site_figure([result], "teardown", "hold", "p99") is None


def test_wide_text_is_wrapped_but_addresses_stay_whole():
    address = "https://example.org/" + "x" * 60
    text = render(
        named_table([{"name": "a", "source": f"see {address}"}], {"name": None, "source": 20})
    )

    assert address in text
    assert "see" in text.splitlines()[2]
    assert address not in text.splitlines()[2]


def test_brackets_in_values_are_not_markup():
    access = "{a: [/a, [bold]b[/bold]]} :smile:"
    text = render(tables.sweep_report([synthetic.result(axes={"guests.vm0.access": access})]))

    assert text.count("{a: [/a, [bold]b[/bold]]}") == text.count(":smile:") == 3


def test_json_document_has_everything_and_nothing_that_json_does_not_know():
    result = synthetic.result(
        "linux-7.1-lockless", violations=[synthetic.violation()], axes={"host.hz": 250}
    )
    result.summary["ageing_pass_mean_ns"] = np.float64("nan")
    parsed = json.loads(document.as_json(document.run_document(result)))

    assert list(parsed) == [
        *("fingerprint", "safety", "summary", "locks", "grace_periods", "phases"),
        *("scenario", "axes"),
    ]
    assert parsed["safety"] == {
        "verdict": "violated",
        "violations": [synthetic.violation()],
        "expected": "safe",
    }
    assert parsed["summary"]["ageing_pass_mean_ns"] is None
    assert parsed["summary"]["deferred_tables_peak"] == result.summary["deferred_tables_peak"]
    assert [lock["site"] for lock in parsed["locks"]] == ["fault", "range_start", "range_end"]
    assert parsed["axes"] == {"host.hz": 250}


def test_json_grace_periods_are_durations():
    periods = pd.DataFrame({"start_ns": [0, 10, 30], "end_ns": [8, 25, 60]})

    assert document.grace_periods(periods) == {
        "count": 3,
        "mean_ns": pytest.approx(53 / 3),
        "p50_ns": 15,
        "p99_ns": 30,
        "max_ns": 30,
    }


def test_json_of_a_run_without_grace_periods():
    result = synthetic.result()
    result.grace_periods = result.grace_periods.iloc[:0]
    parsed = json.loads(document.as_json(document.run_document(result)))

    assert parsed["grace_periods"] == {
        "count": 0,
        "mean_ns": None,
        "p50_ns": None,
        "p99_ns": None,
        "max_ns": None,
    }


def test_json_of_a_sweep_keeps_order_and_failures(sweep):
    failure = {"key": "ab", "axes": {"host.hz": 100}, "reason": "gone"}
    parsed = json.loads(document.as_json(document.sweep_document(sweep, [failure])))

    assert [point["axes"] for point in parsed["points"]] == [result.axes for result in sweep]
    assert parsed["failed"] == [failure]


def test_a_sweep_of_a_selftest_shows_how_long_its_passes_took():
    names = ("linux-6.12", "linux-7.1")
    results = [synthetic.result(name, axes={"kernel": name}) for name in names]
    assert tables.SELFTEST not in render(tables.sweep_report(results))
    for result, ns in zip(results, (3_000_000, 2_000_000), strict=True):
        result.summary["run1_ns"], result.summary["run2_ns"] = 5_000_000, ns
    _, text = render(tables.sweep_report(results)).split(tables.SELFTEST)
    assert cells(text.splitlines()[1]) == ["kernel", "run 1", "run 2"]
    text = text.split("\n\n")[0]
    assert row(text, "linux-6.12")[1:] == ["5 ms", "3 ms"]
    assert row(text, "linux-7.1")[1:] == ["5 ms", "2 ms"]
