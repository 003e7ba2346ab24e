"""Does calibration take the constants that were measured, and can a scenario run with them?"""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

import simkvm
from simkvm.api import open_result
from simkvm.cli import main
from simkvm.measure.calibrate import LEAST, NO_OVERHEAD, Overhead, calibrate, overhead_of
from simkvm.measure.mapping import PHASES, RULES
from simkvm.measure.observation import WHAT, Observation
from simkvm.measure.read import read, read_all
from simkvm.scenario.errors import InputError
from simkvm.scenario.load import identity, load
from simkvm.scenario.machine import load_machine, machine_names, parse_machine
from simkvm.scenario.profile import to_toml
from simkvm.show.lock_stat import text_of

MEASURED = Path(__file__).parents[1] / "measured"
ALTRA, GRAVITON = "ampere-altra-80c", "graviton3-64c"

FILES = [
    f"fault_present={MEASURED / 'fault-present.trace.gz'}",
    f"fault_present={MEASURED / 'map.trace.gz'}",
    f"fault_alloc={MEASURED / 'fault-alloc.trace.gz'}",
    f"age_page={MEASURED / 'age-held.trace.gz'}",
    f"age_page={MEASURED / 'age-outer.trace.gz'}",
    str(MEASURED / "overhead.trace.gz"),
]

SCENARIO = """\
name: calibrated
machine: ./mine.toml
kernel: linux-6.12
guests:
  vm0: {vcpus: 1, memory: 2 MiB, access: {pattern: populate, repeat: 20}}
ageing: {interval: 200 us}
contenders:
  vmm: {kind: madvise_dontneed, guest: vm0, range: 64 KiB, rate: 20000 / s}
"""


def function(key: str, ns: float, phase: str = "", n: int = 100) -> Observation:
    return Observation(
        "function", key, n, p10_ns=ns - 2, p50_ns=ns, p90_ns=ns + 5, phase=phase, tool="ftrace"
    )


def invoked(*args: object) -> tuple[int, str]:
    ran = CliRunner().invoke(main, [str(arg) for arg in args])
    return ran.exit_code, ran.output


# --- The rules ---


def test_every_rule_names_what_exists() -> None:
    everything = {name for machine in machine_names() for name in load_machine(machine).parameters}
    for rule in RULES:
        assert rule.parameter in everything
        assert rule.what in WHAT
        assert not rule.phase or rule.phase in PHASES
        for name in rule.needs:
            assert name in everything or name in {"tlbirange", "fwb"}
    assert {rule.phase for rule in RULES} | {rule.also[1] for rule in RULES if rule.also} == {
        "",
        *PHASES,
    }


def test_a_median_less_the_tracer_is_the_constant() -> None:
    made = calibrate(
        [function("call_rcu", 350)],
        load_machine(ALTRA),
        name="x",
        overhead=Overhead(150),
        kernel="6.12.1",
    )
    parameter = made.machine.parameters["call_rcu_ns"]
    assert (parameter.value, parameter.low, parameter.high) == (200, 198, 205)
    assert parameter.basis == "M"
    assert "6.12.1" in parameter.source
    assert "n = 100" in parameter.source
    unchanged = {n: p for n, p in made.machine.parameters.items() if n != "call_rcu_ns"}
    shipped = load_machine(ALTRA).parameters
    assert unchanged == {n: p for n, p in shipped.items() if n != "call_rcu_ns"}


def test_a_fault_is_its_handler_and_the_exit() -> None:
    base = load_machine(ALTRA)
    rows = [function("kvm_handle_guest_abort", 1000, "fault_present")]
    made = calibrate(rows, base, name="x")
    assert made.machine["s2_map4k_total_ns"] == 1000 + base["exit_roundtrip_ns"]
    assert made.machine["s2_fault4k_alloc_total_ns"] == base["s2_fault4k_alloc_total_ns"]


def test_a_later_rule_sees_what_an_earlier_one_set() -> None:
    base = load_machine(ALTRA)
    rows = [
        function("kvm_age_gfn", 200, "age_page"),
        function("kvm_mmu_notifier_clear_young", 300, "age_page"),
        function("__mmu_notifier_clear_young", 400, "age_page"),
    ]
    made = calibrate(rows, base, name="x").machine
    lookup = 300 - 200 - base["srcu_ns"] - 2 * base["atomic_uncontended_ns"]
    assert made["age_walk_ns"] == 200
    assert made["memslot_lookup_ns"] == lookup
    assert made["notifier_call_ns"] == 100


@pytest.mark.parametrize(("machine", "flush"), [(GRAVITON, 0), (ALTRA, 900)])
def test_a_page_of_an_unmap_is_a_difference_of_two_sizes(machine: str, flush: int) -> None:
    """Without range invalidation each page's flush is in the difference too."""
    base = load_machine(machine)
    page = 240
    visit, table = base["stage2_leaf_visit_ns"], base["free_page_ns"] + 900
    rows = [
        function("__kvm_tlb_flush_vmid_ipa", 900),
        function("kvm_unmap_gfn_range", 700, "unmap_page"),
        function("kvm_unmap_gfn_range", 700 + table + 511 * (page + visit + flush), "unmap_table"),
    ]
    made = calibrate(rows, base, name="x").machine
    assert made["unmap_s2_4k_noflush_ns"] == pytest.approx(page)
    (alone,) = (
        change
        for change in calibrate([rows[0], rows[2]], base, name="x").changes
        if change.parameter == "unmap_s2_4k_noflush_ns"
    )
    assert alone.measured is None
    assert "unmap_page" in alone.reason


def test_parts_that_belong_together_are_added_up() -> None:
    rows = [function("__srcu_read_lock", 30), function("__srcu_read_unlock", 20, n=50)]
    made = calibrate(rows, load_machine(ALTRA), name="x", overhead=Overhead(10))
    assert made.machine["srcu_ns"] == 30
    with pytest.raises(InputError, match="no observation gives"):
        calibrate(rows[:1], load_machine(ALTRA), name="x")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (function("call_rcu", 90, n=LEAST - 1), "observations"),
        (function("call_rcu", 10), "nothing is left"),
        (Observation("function_outer", "call_rcu", 99, p50_ns=9.0), "trace it alone"),
        (Observation("function", "call_rcu", 99, mean_ns=90.0), "no median"),
    ],
)
def test_what_does_not_fit_stays_as_shipped_and_says_why(row: Observation, reason: str) -> None:
    rows = [row, function("find_vma", 500)]
    made = calibrate(rows, load_machine(ALTRA), name="x", overhead=Overhead(20))
    (change,) = (one for one in made.changes if one.parameter == "call_rcu_ns")
    assert change.measured is None
    assert reason in change.reason
    assert made.machine["call_rcu_ns"] == load_machine(ALTRA)["call_rcu_ns"]


def test_a_phase_that_was_not_said_is_asked_for() -> None:
    rows = [function("kvm_age_gfn", 500), function("find_vma", 500)]
    made = calibrate(rows, load_machine(ALTRA), name="x")
    (change,) = (one for one in made.changes if one.parameter == "age_walk_ns")
    assert "PHASE=FILE" in change.reason


def test_the_tracer_is_a_duration_or_a_function() -> None:
    rows = [function("kvm_s2_put_page", 912), function("kvm_s2_put_page", 950, n=40)]
    assert overhead_of("250 ns", rows) == Overhead(250)
    assert overhead_of("kvm_s2_put_page", rows) == Overhead(912, "kvm_s2_put_page")
    assert overhead_of(None, rows) == NO_OVERHEAD
    with pytest.raises(InputError) as caught:
        overhead_of("kvm_s2_putpage", rows)
    assert caught.value.hint == "kvm_s2_put_page"


def test_the_function_that_stands_for_the_tracer_gives_no_constant() -> None:
    rows = [function("__srcu_read_lock", 130), function("__srcu_read_unlock", 100)]
    rows.append(function("find_vma", 500))
    overhead = overhead_of("__srcu_read_unlock", rows)
    made = calibrate(rows, load_machine(ALTRA), name="x", overhead=overhead)
    (change,) = (one for one in made.changes if one.parameter == "srcu_ns")
    assert change.measured is None
    assert "stands for the tracer" in change.reason


# --- Profiles ---


@pytest.mark.parametrize("name", machine_names())
def test_a_machine_comes_back_from_its_toml(name: str) -> None:
    machine = load_machine(name)
    assert parse_machine(to_toml(machine, "two\nlines"), "x.toml") == machine


def test_real_traces_make_a_profile_and_a_scenario_runs_with_it(tmp_path: Path) -> None:
    """The medians are those that sorting the durations of the traces gives; 912 is the tracer's."""
    out = tmp_path / "mine.toml"
    status, output = invoked(
        "calibrate", *FILES, "--overhead", "kvm_s2_put_page", "--machine", GRAVITON, "--out", out
    )
    assert status == 0, output
    machine = load_machine(str(out))
    assert machine.name == "mine"
    measured = {n: p.value for n, p in machine.parameters.items() if p.basis == "M"}
    exit_ns = load_machine(GRAVITON)["exit_roundtrip_ns"]
    assert measured["s2_map4k_total_ns"] == 4112 - 912 + exit_ns
    assert measured["s2_fault4k_alloc_total_ns"] == 7632 - 912 + exit_ns
    assert measured["fault_hold_ns"] == 1888 - 912
    assert set(measured) >= {"age_walk_ns", "memslot_lookup_ns"}
    scenario = tmp_path / "mine.yaml"
    scenario.write_text(SCENARIO)
    ran = simkvm.run(str(scenario))
    locks = ran.locks.set_index("site")
    assert locks.loc["age", "hold_p50_ns"] == pytest.approx(measured["age_walk_ns"], abs=1)


def test_a_calibration_recovers_the_constants_of_a_simulated_host(tmp_path: Path) -> None:
    """The holds of a run on one machine, as a bpftrace script prints them, calibrate another."""
    truth = {"age_walk_ns": 130, "range_bookkeeping_ns": 210, "fault_hold_ns": 777}
    scenario = tmp_path / "host.yaml"
    change = "{base: graviton3-64c, set: " + json.dumps(truth) + "}"
    scenario.write_text(SCENARIO.replace("./mine.toml", change))
    ran = simkvm.run(str(scenario))
    (tmp_path / "holds").write_text(_as_bpftrace(ran.histograms.to_dict("records")))
    made = calibrate(read(str(tmp_path / "holds")), load_machine(GRAVITON), name="x")
    retry = made.machine["retry_check_ns"]
    assert made.machine["age_walk_ns"] == pytest.approx(130, rel=1 / 16)
    assert made.machine["range_bookkeeping_ns"] == pytest.approx(210, rel=1 / 16)
    assert made.machine["fault_hold_ns"] == pytest.approx(777 + retry, rel=1 / 16)


def _as_bpftrace(rows: list[dict]) -> str:
    lines = []
    for site in sorted({row["site"] for row in rows}):
        lines.append(f"@hold_ns[{site}]:")
        lines += [
            f"[{row['low_ns']}, {row['high_ns']})   {row['count']} |@@@@|"
            for row in rows
            if row["site"] == site and row["quantity"] == "hold"
        ]
        lines.append("")
    return "\n".join(lines)


def test_a_simulated_run_comes_back_through_lock_stat(tmp_path: Path) -> None:
    scenario = tmp_path / "run.yaml"
    scenario.write_text(SCENARIO.replace("./mine.toml", ALTRA))
    out = tmp_path / "lock_stat"
    status, output = invoked("run", scenario, "--lock-stat", out)
    assert status == 0, output
    locks = simkvm.run(str(scenario)).locks
    rows = {(row.what, row.key): row for row in read(str(out))}
    assert len(locks) >= 4
    for lock in locks.to_dict("records"):
        key = f"{lock['guest']}.{lock['lock']}/{lock['site']}-{lock['mode'][0].upper()}"
        hold = rows["hold", key]
        assert hold.n == lock["acquisitions"]
        assert hold.sum_ns == pytest.approx(lock["hold_total_ns"], abs=5)
        assert hold.max_ns == pytest.approx(lock["hold_max_ns"], abs=5)
        assert hold.mean_ns == pytest.approx(lock["hold_mean_ns"], abs=5.1)
        wait = rows.get(("wait", key))
        assert (wait.n if wait else 0) == lock["contended"]
        if wait is not None:
            assert wait.sum_ns == pytest.approx(lock["wait_total_ns"], abs=5)


def test_lock_stat_has_the_kernels_columns() -> None:
    """Names end where the kernel's do, so that a class lies under its heading."""
    row = {
        **{"guest": "vm0", "lock": "mmu_lock", "site": "age", "mode": "write"},
        **{"acquisitions": 1000, "contended": 0, "wait_total_ns": 7000, "wait_max_ns": 7},
        **{"hold_total_ns": 16_000, "hold_max_ns": 16},
    }
    lines = text_of([row], []).splitlines()
    assert lines[2].index("class name") + len("class name") == 40
    assert lines[5].split() == [
        *("vm0.mmu_lock/age-W:", "0", "0", "0.00", "0.00", "0.00", "0.00"),
        *("0", "1000", "0.00", "0.02", "16.00", "0.02"),
    ]


def test_a_result_on_a_profile_needs_the_file_no_more(tmp_path: Path) -> None:
    profile = tmp_path / "mine.toml"
    profile.write_text(to_toml(load_machine({"base": ALTRA, "set": {"age_walk_ns": 55}})))
    scenario = tmp_path / "mine.yaml"
    scenario.write_text(SCENARIO)
    result = simkvm.run(str(scenario), out=str(tmp_path / "kept"))
    kept = next((tmp_path / "kept" / "points").glob("*/*"))
    assert str(tmp_path) not in json.dumps(open_result(kept).certificate)
    profile.unlink()
    assert [found for _, found in simkvm.verify(kept)] == [[]]
    assert result.certificate["machine"]["parameters"]["age_walk_ns"] == 55


def test_identity_is_the_numbers_of_a_profile_not_its_path(tmp_path: Path) -> None:
    points = []
    for folder, value in (("a", 55), ("b", 55), ("c", 56)):
        (tmp_path / folder).mkdir()
        machine = load_machine({"base": ALTRA, "set": {"age_walk_ns": value}})
        (tmp_path / folder / "mine.toml").write_text(to_toml(machine))
        (tmp_path / folder / "mine.yaml").write_text(SCENARIO)
        points.append(load(tmp_path / folder / "mine.yaml").points[0].scenario)
    assert identity(points[0]) == identity(points[1]) != identity(points[2])


def test_a_profile_can_be_changed_and_swept(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(to_toml(load_machine(ALTRA)))
    path = tmp_path / "mine.yaml"
    path.write_text(SCENARIO.replace("./mine.toml", "[./mine.toml, graviton3-64c]"))
    study = load(path, ["machine.set.age_walk_ns=3"])
    walks = [load_machine(point.scenario.machine)["age_walk_ns"] for point in study.points]
    assert walks == [3, 3]
    assert load(path).points[0].axes["machine"] == "./mine.toml"


def test_two_profiles_of_one_name_are_refused(tmp_path: Path) -> None:
    """A result keeps the name and not the folder, so its tables could not tell them apart."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.toml").write_text(to_toml(load_machine(ALTRA)))
    path = tmp_path / "mine.yaml"
    path.write_text(SCENARIO.replace("./mine.toml", "[one/mine.toml, two/mine.toml]"))
    with pytest.raises(InputError, match="there twice: results would call both mine"):
        load(path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("age_walk_ns]\nvalue = 55.0", "age_walk_ns]\nvalue = 99999.0", "is outside low to high"),
        ('unit = "ns"', 'unit = "us"', "does not fit"),
        ("[parameters.age_walk_ns]", "[parameters.age_wlk_ns]", "(did you mean 'age_walk_ns'?)"),
        ("tlbirange = false", "tlbirange = 1", "expected bool"),
        ('arch = "arm64"', 'arch = "arm64', ":5:"),
    ],
)
def test_a_wrong_profile_is_told_with_both_places(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    text = to_toml(load_machine(ALTRA), "a head")
    assert old in text
    profile, scenario = tmp_path / "mine.toml", tmp_path / "mine.yaml"
    profile.write_text(text.replace(old, new, 1))
    scenario.write_text(SCENARIO)
    status, output = invoked("run", scenario)
    assert status == 2
    assert output.count("\n") == 1
    assert output.startswith(f"{scenario}:2:1: machine: {profile}")
    assert says in output


def test_a_missing_profile_has_a_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "mine2.toml").write_text("")
    (tmp_path / "mine.yaml").write_text(SCENARIO)
    status, output = invoked("run", tmp_path / "mine.yaml")
    assert (status, output.count("\n")) == (2, 1)
    assert "no such machine profile (did you mean 'mine2.toml'?)" in output


# --- The command ---


def test_the_command_reads_kept_observations_too(tmp_path: Path) -> None:
    kept = tmp_path / "kept.csv"
    trace = MEASURED / "age-held.trace.gz"
    assert invoked("import", "ftrace", trace, "--phase", "age_page", "--out", kept)[0] == 0
    status, output = invoked("calibrate", kept, "--json")
    assert status == 0, output
    direct = invoked("calibrate", f"age_page={trace}", "--json")[1]
    assert json.loads(output) == json.loads(direct)
    (change,) = (one for one in json.loads(output)["changes"] if one["measured"])
    assert change["parameter"] == "age_walk_ns"
    assert math.isclose(change["measured"], 1328)


def test_wrong_input_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "x.toml"
    cases = [
        ["calibrate", FILES[0], "--machine", "ampere-altra", "--out", out],
        ["calibrate", str(MEASURED / "locks.trace.gz"), "--out", out],
        ["calibrate", "nothing.gz", "--out", out],
        ["calibrate", FILES[0], "--overhead", "a while", "--out", out],
        ["calibrate", FILES[0], "--out", tmp_path / "x.yaml"],
        ["calibrate", FILES[0], "--out", tmp_path / "no" / "x.toml"],
        ["calibrate", "fault_prsent=x", "--out", out],
        ["calibrate", FILES[0], "--out", tmp_path / f"{ALTRA}.toml"],
        ["calibrate", MEASURED, "--out", out],
    ]
    for case in cases:
        status, output = invoked(*case)
        assert (status, output.count("\n")) == (2, 1), output
    assert list(tmp_path.iterdir()) == []


def test_several_files_of_one_function_do_not_mix_phases() -> None:
    rows = read_all(FILES[:3])
    found = {(row.key, row.phase): row.p50_ns for row in rows if row.what == "function"}
    assert found["kvm_handle_guest_abort", "fault_present"] == 4112
    assert found["kvm_handle_guest_abort", "fault_alloc"] == 7632
