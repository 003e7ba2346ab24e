"""The switch that puts known mistakes back: what it takes, what it says, what it leaves alone.

That each mistake is found is in test_safety.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lab import world

from simkvm import api, cli
from simkvm.kernel.bugs import BUGS, with_bugs
from simkvm.scenario.errors import InputError
from simkvm.scenario.kernel import POLICIES, load_kernel
from simkvm.scenario.load import load

UNSAFE = Path(__file__).parents[2] / "workloads" / "unsafe"


def test_every_bug_says_what_it_is_and_where_it_was() -> None:
    kinds = {bug.kind for bug in BUGS.values()}
    assert len(BUGS) >= 10
    assert len(kinds) == 8, "all that the oracle knows"
    for bug in BUGS.values():
        assert bug.about.endswith(".")
        assert "<" in bug.source or bug.source.startswith("forbidden: ")
        for policy, value in bug.policies.items():
            assert value in POLICIES[policy]


def test_policies_change_for_the_run_alone() -> None:
    kernel = load_kernel("linux-6.4-yuzhao-v2")
    changed = with_bugs(kernel, ["inline_free", "root_freed_in_release"])
    assert (changed["table_free"], changed["root_free"]) == ("inline", "in_release")
    assert (kernel["table_free"], kernel["root_free"]) == ("put_page_rcu", "after_unregister")
    assert changed.policies["table_free"].source == "the bug inline_free"


def test_nothing_is_replaced_without_bugs() -> None:
    built = world(kernel="linux-7.1-lockless")
    assert built.kernel["table_free"] == "put_page_rcu"
    kvm = built.kvms[0]
    for thing in (kvm, kvm.table_free, kvm.notifier):
        replaced = [name for name, value in vars(thing).items() if callable(value)]
        # What policies choose when a guest is built stands in instances too.
        assert set(replaced) <= {"fault_path", "_queue_callback", "stale"}


@pytest.mark.parametrize(
    ("bugs", "expected"),
    [
        ("[inline_fre]", "bugs.0: no bug 'inline_fre' (did you mean 'inline_free'?)"),
        ("[inline_free, zzz]", "bugs.1: no bug 'zzz', expected one of inline_free, "),
        ("inline_free", "bugs: expects a list, not 'inline_free'"),
    ],
)
def test_an_unknown_name_is_one_message(bugs: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        load(UNSAFE / "no-grace-period.yaml", [f"bugs={bugs}"])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_the_list_and_the_key() -> None:
    listed = CliRunner().invoke(cli.main, ["bugs"])
    assert listed.exit_code == 0
    for bug in BUGS.values():
        assert any(
            line.split()[:2] == [bug.name, bug.kind] for line in listed.stdout.splitlines()
        ), bug.name
    explained = CliRunner().invoke(cli.main, ["explain", "bugs"])
    assert explained.exit_code == 0
    assert "simkvm bugs" in explained.stdout


def test_a_report_says_which_mistakes_were_made() -> None:
    run = ["run", str(UNSAFE / "table-missed-at-end.yaml")]
    result = CliRunner().invoke(cli.main, run)
    assert result.exit_code == 1
    head = result.stdout.split("Guests")[0]
    assert "bugs         table_missed_at_end" in head
    assert "VIOLATED: 1 violation" in head
    assert "entries visited" in result.stdout
    clean = CliRunner().invoke(cli.main, [*run, "--set", "bugs=[]"])
    assert clean.exit_code == 0
    assert "bugs" not in clean.stdout


def teardown(**keys: Any) -> list[str]:
    return [
        f"guests.vm0.teardown={{order: {keys['order']}, at: 5 ms"
        + (f", close_at: {keys['close_at']}}}" if "close_at" in keys else "}")
    ]


def test_the_second_process_needs_a_second_end_and_a_cpu() -> None:
    path = UNSAFE / "double-flush-2026.yaml"
    for sets, expected in (
        (teardown(order="close_vm", close_at="6 ms"), "only order both has it, not close_vm"),
        (teardown(order="both", close_at="10 ms"), "10 ms is too late"),
        (["kernel.set.teardown_walk=zap_roots"], "zap_roots is x86's"),
        (["host.cpus=1"], "1 vCPU + 1 process that drops a last reference need 2 CPUs"),
    ):
        with pytest.raises(InputError, match=expected.replace("+", r"\+")):
            load(path, sets)


def test_the_shipped_sweep_of_ends() -> None:
    """A reduced one: the form of the walk decides the stretch, not the whole."""
    study = load(UNSAFE.parent / "teardown.yaml", ["guests.vm0.memory=2 GiB"])
    summaries = [api.run(point.scenario).summary for point in study.points]
    once, cut, everything = (summary["teardown_longest_ns"] for summary in summaries)
    assert once == pytest.approx(2 * cut, rel=0.01)
    assert everything == cut
    walks = [summary["teardown_walk_ns"] for summary in summaries]
    assert walks[0] < walks[1] < 2 * walks[0] < walks[2] / 1000
