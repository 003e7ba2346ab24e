"""Are the recipes whole, and do they say what the importers and the rules know?"""

import gzip
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from simkvm.measure.mapping import PHASES, RULES
from simkvm.measure.observation import WHAT
from simkvm.measure.read import read

CONTRIB = Path(__file__).parents[2] / "contrib"
SCRIPTS = sorted(CONTRIB.glob("*.sh"))
PROBES = sorted(CONTRIB.glob("*.bt"))
README = (CONTRIB / "README.md").read_text()


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_explain_themselves(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0
    asked = run("bash", script, "-h")
    assert asked.returncode == 2
    assert asked.stdout.count(script.name) == 1
    assert "set -eu" not in asked.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    checked = run("shellcheck", script)
    assert checked.returncode == 0, checked.stdout


def test_every_recipe_is_in_the_readme_and_can_be_run() -> None:
    for path in (*SCRIPTS, *PROBES):
        assert f"`{path.name}`" in README
        assert os.access(path, os.X_OK)


def test_the_readme_tells_every_rule_and_every_phase() -> None:
    for rule in RULES:
        assert f"`{rule.parameter}`" in README
    for phase in PHASES:
        assert f"| `{phase}` |" in README


def test_maps_of_the_probes_have_names_that_the_importer_knows() -> None:
    for path in PROBES:
        for name in re.findall(r"@(\w+)_ns\b", path.read_text()):
            assert name in WHAT, path.name


def test_sites_of_the_probes_are_those_of_the_rules() -> None:
    text = (CONTRIB / "measure-mmu-lock.bt").read_text()
    sites = set(re.findall(r'@hold_ns\["(\w+)"\]', text))
    known = {key for rule in RULES if rule.what == "hold" for key in rule.keys}
    assert {"age", "fault"} <= sites & known


def test_what_the_ftrace_recipe_traces_is_what_the_rules_want() -> None:
    text = (CONTRIB / "measure-stage2-ftrace.sh").read_text()
    by_hand = {"clear_page", "clear_page_erms", "copy_page", "dcache_clean_inval_poc"}
    aliases = {"vma_lookup", "__call_rcu_common", "__clean_dcache_guest_page"}
    wanted = {part for rule in RULES for key in rule.keys for part in key.split("+")}
    for key in wanted - by_hand - aliases - {"fault", "age", "range_end"}:
        assert re.search(rf"\b{key}\b", text), key


@pytest.fixture
def tracefs(tmp_path: Path) -> Path:
    """Plain files in place of the kernel's, with a trace that does not mind being cleared."""
    root = tmp_path / "tracing"
    for folder in ("events", "options", "per_cpu/cpu0", "per_cpu/cpu1"):
        (root / folder).mkdir(parents=True)
    (root / "current_tracer").write_text("nop\n")
    (root / "buffer_size_kb").write_text("7 (expanded: 1408)\n")
    (root / "trace_clock").write_text("[local] global mono\n")
    (root / "available_filter_functions").write_text(
        "kvm_age_gfn\nkvm_age_gfn_range\n__srcu_read_lock\nfind_vma\n"
    )
    for cpu in ("cpu0", "cpu1"):
        (root / "per_cpu" / cpu / "stats").write_text("entries: 5\noverrun: 3\n")
    return root


def test_the_ftrace_recipe_traces_each_function_alone_and_restores(
    tracefs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # The command stands for the guest, and writes what the kernel would trace meanwhile.
    guest = (
        f'f=$(cat {tracefs}/set_ftrace_filter); printf " 0)  %s\\n" '
        f'"             |  /* $(cat {tracefs}/trace_marker) */" "  1.000 us   |  $f();" '
        f"> {tracefs}/trace"
    )
    script = CONTRIB / "measure-stage2-ftrace.sh"
    ran = run("bash", script, "-o", out, "age_page", "sh", "-c", guest, TRACEFS=str(tracefs))
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("6 events overwritten") == 2
    names = {path.name for path in out.iterdir()}
    assert names == {f"age_page-{name}.trace.gz" for name in ("kvm_age_gfn", "__srcu_read_lock")}
    (row,) = read(str(out / "age_page-kvm_age_gfn.trace.gz"))
    assert (row.what, row.key, row.phase, row.sum_ns) == (
        *("function", "kvm_age_gfn", "age_page"),
        1000,
    )
    other = gzip.decompress((out / "age_page-__srcu_read_lock.trace.gz").read_bytes())
    assert other.count(b"__srcu_read_lock();") == 1
    restored = {
        name: (tracefs / name).read_text().strip()
        for name in ("current_tracer", "set_ftrace_filter", "buffer_size_kb", "trace_clock")
    }
    assert restored == {
        "current_tracer": "nop",
        "set_ftrace_filter": "",
        "buffer_size_kb": "7",
        "trace_clock": "local",
    }


def test_the_ftrace_recipe_leaves_somebody_elses_tracing_alone(tracefs: Path) -> None:
    (tracefs / "current_tracer").write_text("function\n")
    script = CONTRIB / "measure-stage2-ftrace.sh"
    ran = run("bash", script, "age_page", "true", TRACEFS=str(tracefs))
    assert ran.returncode == 1
    assert "somebody else traces (function)" in ran.stderr
    assert (tracefs / "buffer_size_kb").read_text().startswith("7 (")


def test_an_unknown_phase_is_refused(tracefs: Path) -> None:
    script = CONTRIB / "measure-stage2-ftrace.sh"
    ran = run("bash", script, "age_pages", "true", TRACEFS=str(tracefs))
    assert ran.returncode == 2
    assert all(phase in ran.stderr for phase in PHASES)
