"""What is refused, with what reason, and what is not: it is "what if" that scenarios are for.

Rules: which code an architecture has (arch/{arm64,x86}/kvm, v6.12), which hardware a machine has,
what excludes itself, and what is known to be unsafe.
"""

from __future__ import annotations

from typing import Any

import pytest
from worlds import scenario

from simkvm.scenario.errors import InputError
from simkvm.scenario.kernel import POLICIES, kernel_names, load_kernel
from simkvm.scenario.machine import load_machine
from simkvm.scenario.possible import NEEDS, NEVER_WITH, ONLY, kernel_problems
from simkvm.units import MIB

MACHINES = {"arm64": "graviton3-64c", "x86": "x86-icelake-64c"}


def problems(base: str, machine: str = "", expect: str = "safe", **changes: str) -> list[str]:
    """What is wrong with a shipped kernel and some changes, each with its key."""
    kernel = load_kernel({"base": base, "set": changes})
    host = load_machine(machine or MACHINES[kernel.arch])
    found = kernel_problems(kernel, host, expect)
    return [f"{'.'.join(map(str, problem.keys))}: {problem.message}" for problem in found]


@pytest.mark.parametrize("machine", [*MACHINES.values(), "ampere-altra-80c"])
@pytest.mark.parametrize("name", kernel_names())
def test_every_shipped_kernel_is_possible_on_its_machines(name: str, machine: str) -> None:
    """Also where it has to fall back, on machines without range TLBI."""
    if load_kernel(name).arch == load_machine(machine).arch:
        assert problems(name, machine) == []
    else:
        (found,) = problems(name, machine)
        assert found.startswith(f"kernel: {name} is a kernel for ")


def test_the_rules_speak_of_policies_that_there_are() -> None:
    choices = [*ONLY, *NEEDS, *(choice for pair in NEVER_WITH for choice in pair)]
    for policy, value in choices:
        assert value in POLICIES[policy]
    for policy in ("mmu", "remote_flush", "root_free", "teardown_walk"):
        assert {value for name, value in ONLY if name == policy} == set(POLICIES[policy])


@pytest.mark.parametrize(("choice", "where"), ONLY.items(), ids="-".join)
def test_what_the_other_architecture_has_is_refused_with_a_reason(
    choice: tuple[str, str], where: tuple[str, str]
) -> None:
    policy, value = choice
    arch, reason = where
    base = "linux-6.12" if arch == "x86" else "linux-6.12-x86"
    expected = f"kernel.set.{policy}: {policy} {value} is {arch}'s: {reason}"
    assert expected in problems(base, **{policy: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"unmap_tables": "keep"},
        {"fault_retry": "range"},
        {"access_fault_lock": "none"},
        {"permission_fault_lock": "none"},
        {"fault_lock": "write"},
        {"promotion": "two_step", "relax_tlbi": "broadcast"},
    ],
)
def test_what_arm64_could_do_is_not_refused(changes: dict[str, str]) -> None:
    assert problems("linux-6.12", **changes) == []


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        ("linux-6.12-x86", {"ageing_lock": "rmap_bit"}, "shadow MMU has reverse-map chains"),
        ("linux-6.15-x86-shadow", {"ageing_lock": "none"}, "has to lock it"),
        ("linux-6.12-x86-shadow", {"fault_lock": "read"}, "needs the write lock"),
        ("linux-6.4-yuzhao-v2", {"ageing_lock": "read"}, "are aged without lock"),
        ("linux-6.15-x86-shadow", {"ageing_call": "bitmap"}, "are aged without lock"),
    ],
)
def test_contradictions_are_refused(base: str, changes: dict[str, str], expected: str) -> None:
    (found,) = problems(base, **changes)
    (policy,) = changes
    assert found.startswith(f"kernel.set.{policy}: ")
    assert found.endswith(expected)


@pytest.mark.parametrize(
    ("policy", "value", "expected"),
    [
        ("unmap_tlbi", "deferred", "deferred needs tlbirange and fwb, ampere-altra-80c lacks"),
        ("break_tlbi", "range", "range needs tlbirange, ampere-altra-80c lacks tlbirange"),
    ],
)
def test_features_that_a_machine_lacks_cannot_be_asked_for(
    policy: str, value: str, expected: str
) -> None:
    """A shipped kernel that has the value falls back instead, as Linux does."""
    assert load_kernel("linux-6.12")[policy] == value
    (found,) = problems("linux-6.12", "ampere-altra-80c", **{policy: value})
    assert found.startswith(f"kernel.set.{policy}: {expected}")
    assert problems("linux-6.12", "graviton3-64c", **{policy: value}) == []


UNSAFE: list[tuple[str, dict[str, str], str]] = [
    ("linux-6.4-yuzhao-v2", {"table_free": "inline"}, "unmap frees a table at once"),
    ("linux-7.1-lockless", {"collapse_free": "inline"}, "frees the table at once"),
    ("linux-7.1-lockless", {"root_free": "in_release"}, "notifier's SRCU"),
    ("linux-6.15-x86", {"table_free": "inline"}, "zapping the roots frees tables at once"),
]


@pytest.mark.parametrize(("base", "changes", "why"), UNSAFE)
def test_what_is_unsafe_is_run_only_by_who_expects_it(
    base: str, changes: dict[str, str], why: str
) -> None:
    (found,) = problems(base, **changes)
    assert why in found
    assert found.endswith("; to see that, say `expect: unsafe`")
    assert problems(base, expect="unsafe", **changes) == []


def test_tables_that_are_kept_may_be_freed_inline() -> None:
    """There are none to free: no walker without lock can meet one."""
    changes = {"ageing_lock": "none", "root_free": "after_unregister", "collapse_free": "subtree"}
    assert problems("linux-6.12", **changes, unmap_tables="keep") == []
    assert len(problems("linux-6.12", **changes)) == 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"kernel": "linux-6.12-x86", "guest": {"rmap_chain": 2}}, "guests.vm0.rmap_chain"),
        ({"kernel": "linux-6.12-x86", "guest": {"page_size": 65536}}, "guests.vm0.page_size"),
        (
            {"kernel": {"base": "linux-6.12-x86", "set": {"remote_flush": "broadcast"}}},
            "kernel.set.remote_flush",
        ),
    ],
)
def test_a_scenario_says_which_key_is_wrong(keys: dict[str, Any], expected: str) -> None:
    guest = {"memory": 512 * MIB, "access": {"pattern": "populate"}, **keys.pop("guest", {})}
    with pytest.raises(InputError) as error:
        scenario(machine="x86-icelake-64c", guests={"vm0": guest}, **keys)
    assert error.value.key == expected
