"""Do the commands print what the API yields, say what is wrong, and exit with the right status?

The simulation is replaced by made-up records; a Ctrl-C and a violation are made up too.
"""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import synthetic_results as synthetic
from click.testing import CliRunner, Result

import simkvm
from simkvm.api import default_folder
from simkvm.cli import main

TABLES = ("locks", "histograms", "timeline", "grace_periods", "passes", "series")
HEAVY = ("numpy", "pandas", "matplotlib", "pyarrow", "pydantic", "ruamel", "rich", "simpy")

ONE = """\
name: one
description: One guest that ages.
machine: ampere-altra-80c
kernel: linux-7.1
guests:
  vm0: {vcpus: 2, memory: 64 MiB, access: {pattern: populate}}
ageing: {interval: 10 ms}
"""
SWEEP = ONE.replace("name: one", "name: many").replace(
    "kernel: linux-7.1", "kernel: [linux-7.1, linux-7.1-lockless]"
)


class World(ModuleType):
    """A stand-in for the simulation: counts runs, and misbehaves when told to."""

    def __init__(self) -> None:
        super().__init__("simkvm.kernel.world")
        self.runs: list[str] = []
        self.violations: list[dict] = []
        self.interrupt_at: str | None = None
        self.break_at: str | None = None
        self.fingerprint = ""

    def simulate(self, scenario, machine, kernel):
        self.runs.append(kernel.name)
        if kernel.name == self.interrupt_at:
            raise KeyboardInterrupt
        if kernel.name == self.break_at:
            raise RuntimeError("the model has a bug")
        made = synthetic.result(
            kernel.name,
            vcpus=scenario.guests["vm0"].vcpus,
            seed=scenario.seed,
            replication=scenario.replication,
            violations=self.violations,
        )
        return SimpleNamespace(
            summary=made.summary.to_dict(),
            violations=made.violations,
            fingerprint=self.fingerprint or made.fingerprint,
            **{name: getattr(made, name).to_dict("list") for name in TABLES},
            phases={},
        )


@pytest.fixture
def world(monkeypatch) -> World:
    stand_in = World()
    monkeypatch.setitem(sys.modules, "simkvm.kernel.world", stand_in)
    return stand_in


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder to be in, with a scenario and a sweep."""
    (tmp_path / "one.yaml").write_text(ONE)
    (tmp_path / "many.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def simkvm_command(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments, prog_name="simkvm")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def assert_refused(result: Result, message: str) -> None:
    """One line on stderr, nothing on stdout, status 2."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


# --- start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["machines"]])
def test_nothing_heavy_is_imported_before_it_is_needed(arguments):
    unwanted = set(HEAVY) - ({"rich"} if arguments == ["machines"] else set())
    script = (
        "import sys\n"
        "from simkvm.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print(sorted({unwanted} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )

    assert done.stdout, "the command did run"
    assert done.stderr.splitlines()[-1] == "[]"


def test_import_simkvm_imports_nothing_and_offers_its_names():
    script = (
        "import sys, simkvm\n"
        "light = [name for name in sys.modules if name.startswith('simkvm')]\n"
        "simkvm.InputError, simkvm.load\n"
        f"print(light, sorted(set({HEAVY}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "['simkvm'] []"


def test_every_public_name_exists():
    for name in simkvm.__all__:
        assert getattr(simkvm, name) is not None
    assert dir(simkvm) == simkvm.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = simkvm.nothing


def test_module_is_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "simkvm", "--version"], capture_output=True, text=True, check=True
    )

    assert done.stdout.startswith("simkvm ")


@pytest.mark.parametrize(
    ("arguments", "hint"), [(["swep"], "sweep"), (["run", "x", "--sedd", "1"], "--seed")]
)
def test_slips_of_the_command_line_are_status_2_with_a_suggestion(arguments, hint):
    result = simkvm_command(*arguments)

    assert result.exit_code == 2
    assert "Did you mean" in result.stderr
    assert hint in result.stderr


def test_a_reader_that_has_gone_ends_the_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "simkvm", "kernels"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)

    assert done.stderr == ""
    assert done.returncode == 141


# --- run ---------------------------------------------------------------------------------------


def test_run_prints_the_report(here, world):
    result = simkvm_command("run", "one.yaml")

    assert result.exit_code == 0
    assert result.stdout.startswith("one: linux-7.1 on ampere-altra-80c, seed 1\n")
    assert "mmu_lock, by call site and mode" in result.stdout
    assert result.stderr == ""
    assert sorted(path.name for path in here.iterdir()) == ["many.yaml", "one.yaml"]


def test_run_takes_settings_and_a_seed(here, world):
    result = simkvm_command(
        *("run", "one.yaml", "--seed", "7"),
        *("--set", "kernel=linux-7.1-lockless", "--set", "guests.vm0.vcpus=5"),
    )

    assert result.stdout.startswith("one: linux-7.1-lockless on ampere-altra-80c, seed 7\n")
    assert "vm0: 5 vCPUs, 64 MiB in 4 KiB pages, populate" in result.stdout


def test_json_is_one_document_and_nothing_else(here, world):
    result = simkvm_command("run", "one.yaml", "--json")
    parsed = json.loads(result.stdout)

    assert parsed["scenario"]["name"] == "one"
    assert parsed["safety"] == {"verdict": "clean", "violations": [], "expected": "safe"}
    assert parsed["summary"]["grace_periods"] == parsed["grace_periods"]["count"] == 25
    assert {lock["site"] for lock in parsed["locks"]} == set(synthetic.SITES)
    assert parsed["axes"] == {}


def test_a_violation_that_was_not_expected_is_status_1(here, world):
    world.violations = [synthetic.violation()]
    result = simkvm_command("run", "one.yaml")

    assert result.exit_code == 1
    assert "VIOLATED: 1 violation" in result.stdout
    assert "unlinks table 17" in result.stdout


def test_a_violation_that_was_expected_is_status_0(here, world):
    world.violations = [synthetic.violation()]
    result = simkvm_command("run", "one.yaml", "--set", "expect=unsafe")

    assert result.exit_code == 0
    assert result.stderr == ""


@pytest.mark.parametrize("found", [0, 1])
def test_whatever_is_found_where_that_is_the_question_is_status_0(here, world, found):
    world.violations = [synthetic.violation()] * found
    result = simkvm_command("run", "one.yaml", "--set", "expect=any")

    assert result.exit_code == 0
    assert result.stderr == ""


def test_an_expected_violation_that_did_not_happen_is_a_warning(here, world):
    result = simkvm_command("run", "one.yaml", "--set", "expect=unsafe")

    assert result.exit_code == 0
    assert result.stderr == "simkvm: warning: one expects a violation, none was found\n"


def test_run_refuses_a_sweep_and_says_what_to_use(here, world):
    result = simkvm_command("run", "many.yaml", "--out", "store")

    assert_refused(result, "many.yaml: is a sweep of 2 points over kernel; use: simkvm sweep")
    assert not (here / "store").exists()
    assert world.runs == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "none.yaml: no such file"),
        (["run", "one.yaml", "--set", "kernel=linux-7.2"], "(did you mean 'linux-7.1'?)"),
        (["run", "one.yaml", "--set", "kernel=linux-6.13"], "(did you mean 'linux-6.12'?)"),
        (["run", "one.yaml", "--set", "guests.vm0.vcpu=2"], "(did you mean 'vcpus'?)"),
        (["sweep", "many.yaml", "--shard", "2/2"], "expected I/N with I from 0 to N - 1"),
        (["plot", "nowhere"], "nowhere: no such folder"),
        (["plot", "."], ".: holds no study"),
        (["results", "."], ".: holds no study"),
        (["verify", "."], ".: holds no study"),
        (["machines", "ampere"], "unknown machine 'ampere'"),
        (["kernels", "linux-7.l"], "did you mean 'linux-7.1'?"),
        (["kernels", "--diff", "linux-7.1", "linux-7"], "unknown kernel 'linux-7'"),
        (["explain", "host.hs"], "(did you mean 'host.hz'?)"),
        (["workloads", "nowhere"], "nowhere: no such folder"),
        (["import", "lackey", "none", "--out", "x.parquet"], "none: "),
        (["import", "lackey", "one.yaml", "--out", "x", "--page-size", "4"], "needs a unit"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(here, world, arguments, message):
    before = sorted(here.rglob("*"))
    assert_refused(simkvm_command(*arguments), message)

    assert sorted(here.rglob("*")) == before
    assert world.runs == []


def test_run_keeps_its_result_and_its_figures(here, world):
    first = simkvm_command("run", "one.yaml", "--out", "store")
    again = simkvm_command("run", "one.yaml", "--out", "store")

    assert len(world.runs) == 1, "what is in the store is not run again"
    assert first.stdout == again.stdout
    (kept,) = simkvm.open_results("store")
    assert kept.fingerprint in first.stdout
    assert sorted(path.name for path in (here / "store" / "figures").iterdir()) == [
        "lock_hold.png",
        "lock_wait.png",
    ]
    assert first.stderr.splitlines() == [
        f"store/figures/lock_{quantity}.png" for quantity in ("hold", "wait")
    ]


def test_json_stays_alone_on_stdout_when_figures_are_drawn(here, world):
    assert json.loads(simkvm_command("run", "one.yaml", "--out", "store", "--json").stdout)


# --- sweep -------------------------------------------------------------------------------------


def test_sweep_reports_every_point_and_keeps_it_under_the_name(here, world):
    result = simkvm_command("sweep", "many.yaml", "--jobs", "1")

    assert result.exit_code == 0
    assert world.runs == ["linux-7.1", "linux-7.1-lockless"]
    assert [r.axes for r in simkvm.open_results("results/many")] == [
        {"kernel": "linux-7.1"},
        {"kernel": "linux-7.1-lockless"},
    ]
    rows = [line.split()[0] for line in result.stdout.splitlines() if "linux-7.1" in line]
    assert rows == world.runs * 4
    assert "points" not in result.stdout
    assert "simkvm: 2 points in results/many" in result.stderr


def test_sweep_as_json(here, world):
    result = simkvm_command("sweep", "many.yaml", "--jobs", "1", "--out", "store", "--json")
    parsed = json.loads(result.stdout)

    assert [point["axes"]["kernel"] for point in parsed["points"]] == world.runs
    assert parsed["failed"] == []


def test_sweep_replicates_and_shards(here, world):
    simkvm_command("sweep", "many.yaml", "--jobs", "1", "--replications", "2", "--shard", "1/2")

    stored = simkvm.open_results("results/many")
    assert [r.axes["replication"] for r in stored] == [1, 1]
    assert len(stored.summary) == 4


def test_sweep_with_a_violation_is_status_1(here, world):
    world.violations = [synthetic.violation()]

    assert simkvm_command("sweep", "many.yaml", "--jobs", "1").exit_code == 1


def test_sweep_with_a_failed_point_says_why_and_is_status_1(here, world):
    world.break_at = "linux-7.1-lockless"
    result = simkvm_command("sweep", "many.yaml", "--jobs", "1")

    assert result.exit_code == 1
    assert "failed: kernel=linux-7.1-lockless: RuntimeError: the model has a bug" in result.stdout
    assert "linux-7.1 " in result.stdout


def test_ctrl_c_keeps_what_was_finished_and_says_how_to_go_on(here, world):
    world.interrupt_at = "linux-7.1-lockless"
    stopped = simkvm_command("sweep", "many.yaml", "--jobs", "1")

    assert stopped.exit_code == 130
    assert stopped.stdout == ""
    assert stopped.stderr.splitlines()[-1].endswith("the same command goes on from there")
    assert "after 1 of 2 points" in stopped.stderr

    world.interrupt_at = None
    assert simkvm_command("sweep", "many.yaml", "--jobs", "1").exit_code == 0
    assert world.runs == ["linux-7.1", "linux-7.1-lockless", "linux-7.1-lockless"]


def test_ctrl_c_during_a_run(here, world):
    world.interrupt_at = "linux-7.1"
    stopped = simkvm_command("run", "one.yaml")

    assert (stopped.exit_code, stopped.stderr) == (130, "simkvm: interrupted\n")


def test_sigterm_is_a_ctrl_c(here, world, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(world, "simulate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    stopped = simkvm_command("sweep", "many.yaml", "--jobs", "1")

    assert stopped.exit_code == 130
    assert "after 0 of 2 points" in stopped.stderr
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("shard", ["1", "a/b", "1/", "-1/2"])
def test_a_shard_is_two_numbers(here, world, shard):
    result = simkvm_command("sweep", "many.yaml", "--shard", shard)

    assert result.exit_code == 2
    assert "not two numbers such as 0/4" in result.stderr


# --- what was kept -----------------------------------------------------------------------------


@pytest.fixture
def store(here, world) -> Path:
    """A finished sweep over kernels."""
    simkvm_command("sweep", "many.yaml", "--jobs", "1", "--out", "store")
    world.runs.clear()
    return here / "store"


def a_point(store: Path) -> Path:
    return next(store.glob("points/*/*/point.json")).parent


def test_plot_draws_all_figures_that_apply(store):
    result = simkvm_command("plot", "store")

    names = ["lock_hold", "lock_wait", "deferred_memory", "deferred_peak"]
    assert result.stdout.split() == [f"store/figures/{name}.png" for name in names]
    assert all((store / "figures" / f"{name}.png").is_file() for name in names)


def test_plot_draws_one_figure_of_one_point(store, here):
    result = simkvm_command(
        "plot", str(a_point(store)), "--figure", "lock_wait", "--out", "wait.svg"
    )

    assert result.stdout == "wait.svg\n"
    assert "<svg" in (here / "wait.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figure", "lock_holds"], "(did you mean 'lock_hold'?)"),
        (["--figure", "ageing_scaling"], "needs a sweep over the number of vCPUs"),
        (["--figure", "lock_hold", "--out", "a.gif"], "png, svg, pdf"),
    ],
)
def test_plot_refuses_what_it_cannot_draw(store, here, arguments, message):
    assert_refused(simkvm_command("plot", "store", *arguments), message)
    assert not (store / "figures").exists()
    assert not (here / "a.gif").exists()


def test_plot_to_a_file_needs_one_figure(store):
    result = simkvm_command("plot", "store", "--out", "a.png")

    assert result.exit_code == 2
    assert "--figure" in result.stderr


def test_verify_runs_every_point_again(store, world):
    result = simkvm_command("verify", "store")

    assert result.exit_code == 0
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["reproduced"] * 2
    assert world.runs == ["linux-7.1", "linux-7.1-lockless"]


def test_verify_says_what_came_out_otherwise(store, world):
    world.fingerprint = "0" * 64
    result = simkvm_command("verify", str(a_point(store)))

    assert result.exit_code == 1
    assert "DIFFERS" in result.stdout
    assert "fingerprint" in result.stdout
    assert "0" * 64 in result.stdout
    assert "touches" not in result.stdout


def test_verify_looks_for_traces_where_told(store, monkeypatch):
    asked = []
    monkeypatch.setattr("simkvm.api.verify", lambda *given: asked.append(given) or ())
    simkvm_command("verify", "store")
    simkvm_command("verify", "store", "--traces", "a", "--traces", "b")

    assert asked == [("store", (".",)), ("store", ("a", "b"))]


def test_results_are_reported_again(store):
    swept = simkvm_command("sweep", "many.yaml", "--jobs", "1", "--out", "store")

    assert simkvm_command("results", "store").stdout == swept.stdout


def test_results_as_csv(store, here):
    simkvm_command("results", "store", "--csv", "out.csv")
    rows = list(csv.DictReader(io.StringIO((here / "out.csv").read_text())))

    assert [row["kernel"] for row in rows] == ["linux-7.1", "linux-7.1-lockless"]
    assert [row["status"] for row in rows] == ["done", "done"]
    assert rows[0]["sim_ns"] == "200000000"
    assert simkvm_command("results", "store", "--csv", "-").stdout == (here / "out.csv").read_text()


def test_a_path_that_cannot_be_written_is_one_line(store):
    assert_refused(
        simkvm_command("results", "store", "--csv", "no/such/out.csv"),
        "no/such/out.csv: no such file or directory",
    )


def test_a_store_without_finished_points_has_no_figures(here, world):
    world.break_at = "linux-7.1"
    simkvm_command("sweep", "one.yaml", "--jobs", "1", "--out", "store")

    assert_refused(simkvm_command("plot", "store"), "no finished point")
    assert simkvm_command("results", "store").stdout.startswith("failed: ")


@pytest.mark.parametrize(("name", "folder"), [("a/b", "a-b"), ("..", "study"), ("x", "x")])
def test_a_study_stays_below_results_whatever_its_name(name, folder):
    assert default_folder(SimpleNamespace(name=name)) == Path("results") / folder


def test_results_of_a_point_name_the_way_in(store):
    assert_refused(simkvm_command("results", str(a_point(store))), "holds one point")


# --- what ships --------------------------------------------------------------------------------


def test_machines_are_listed_and_shown():
    listed = simkvm_command("machines").stdout
    shown = simkvm_command("machines", "ampere-altra-80c").stdout

    assert all(name in listed for name in simkvm.machines())
    machine = simkvm.machines()["ampere-altra-80c"]
    assert machine.title in shown
    assert all(name in shown for name in machine.parameters)


def test_kernels_are_listed_shown_and_compared():
    listed = simkvm_command("kernels").stdout
    shown = simkvm_command("kernels", "linux-7.1").stdout
    compared = simkvm_command("kernels", "--diff", "linux-7.1", "linux-7.1-lockless").stdout

    assert all(name in listed for name in simkvm.kernels())
    assert all(name in shown for name in simkvm.kernels()["linux-7.1"].policies)
    values, _, sources = compared.partition("Where each was read")
    assert "patch 04/10" in sources
    differing = {line.split()[0]: line.split()[1:] for line in values.splitlines()[2:] if line}
    assert differing["ageing_lock"] == ["write", "none"]
    assert "fault_lock" not in differing


def test_equal_kernels_have_no_difference():
    same = simkvm_command("kernels", "--diff", "linux-7.1", "linux-7.1").stdout

    assert same == "linux-7.1 and linux-7.1 have the same policies\n"


def test_schema_is_json():
    assert "guests" in json.loads(simkvm_command("schema").stdout)["properties"]


def test_explain_says_what_a_key_means():
    assert "Default: 250" in simkvm_command("explain", "host.hz").stdout


def test_workloads_are_listed_with_points_and_descriptions(here):
    (here / "broken.yaml").write_text("name: broken\n")
    result = simkvm_command("workloads", ".")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()[2:]}

    assert result.exit_code == 0
    assert rows["one.yaml"] == "1 One guest that ages."
    assert rows["many.yaml"].startswith("2 ")
    assert rows["broken.yaml"].startswith("0 broken.yaml:")


def test_a_recording_becomes_a_trace(here):
    lines = ["I  00001000,4", " L 00400000,8", " S 00500000,8", " M 00400008,4"]
    (here / "recording").write_text("\n".join(lines) + "\n")
    result = simkvm_command("import", "lackey", "recording", "--out", "t.parquet", "--window", "1")

    assert result.exit_code == 0
    assert result.stdout.startswith("t.parquet: ")
    assert (here / "t.parquet").is_file()


def test_theory_says_what_it_should_be_and_what_it_is() -> None:
    one = simkvm_command("validate", "theory", "--only", "tables/16k/r*")
    assert one.exit_code == 0
    assert "1 inside" in one.stdout
    as_json = simkvm_command("validate", "theory", "--only", "tables/16k/r*", "--json")
    (row,) = json.loads(as_json.stdout)
    assert (row["id"], row["expected"], row["simulated"]) == ("tables/16k/roots", 16, 16)
    assert (row["half_width"], row["verdict"], row["role"]) == (0, "inside", "predicted")


def test_rows_that_nobody_knows_are_refused() -> None:
    refused = simkvm_command("validate", "theory", "--only", "tables/16k/root")
    assert_refused(refused, "no row of the theory matches 'tables/16k/root' (did you mean")
