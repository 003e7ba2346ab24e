"""When the page of an unlinked table is free again, and who pays for it.

The policies come from messages 20230526234435.662652-1-yuzhao@google.com (patch 4 of 10),
ZHJHJPBF6euzOFdw@linux.dev and ZHfWzX04GlcNngdU@linux.dev, and from v6.12.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from lab import Lab

from simkvm.kernel.costs import FreeCosts
from simkvm.kernel.stage2 import TableId
from simkvm.kernel.table_free import POLICIES
from simkvm.scenario import kernel
from simkvm.units import MIB

COSTS = FreeCosts(free_ns=60, call_rcu_ns=100, callback_ns=45, visit_ns=4, count_test_ns=26)
TABLE = TableId(3, 7, 1)
DEFERRED = ["put_page_rcu", "free_removed_table", "free_removed_table_count_test"]


@dataclass
class Guest:
    """Writes down what a policy tells it."""

    entries: int = 512
    free_costs: FreeCosts = COSTS
    told: list[tuple[object, ...]] = field(default_factory=list)

    def table_reported_free(self, t_ns: int) -> None:
        self.told.append(("reported", t_ns))

    def table_freed(self, table: TableId, t_ns: int, deferred: bool) -> None:
        self.told.append(("freed", table, t_ns, deferred))

    def call_rcu(self, t_ns: int, cpu: int, table: TableId) -> None:
        self.told.append(("call_rcu", table, t_ns, cpu))


def test_every_policy_of_a_kernel_is_there() -> None:
    assert set(POLICIES) == set(kernel.POLICIES["table_free"])
    assert all(POLICIES[name].name == name for name in POLICIES)


def test_inline_frees_under_the_lock() -> None:
    policy, guest = POLICIES["inline"](), Guest()
    assert policy.under_lock_ns(COSTS) == 60
    policy.unlinked(guest, TABLE, 1000, 2)
    assert guest.told == [("reported", 1000), ("freed", TABLE, 1000, False)]
    with pytest.raises(AssertionError):
        policy.callback(guest, TABLE, 2000)


@pytest.mark.parametrize(
    ("name", "reported_at", "callback_ns"),
    [
        ("put_page_rcu", 1000, 45),
        ("free_removed_table", 9000, 45 + 512 * 4),
        ("free_removed_table_count_test", 9000, 45 + 26),
    ],
)
def test_deferred_frees_queue_one_callback(name: str, reported_at: int, callback_ns: int) -> None:
    """Statistics drop at once only with put_page_rcu; the second walk looks at every entry."""
    policy, guest = POLICIES[name](), Guest()
    assert policy.under_lock_ns(COSTS) == 100
    policy.unlinked(guest, TABLE, 1000, 2)
    assert ("call_rcu", TABLE, 1000, 2) in guest.told
    assert not [what for what in guest.told if what[0] == "freed"]
    assert policy.callback(guest, TABLE, 9000) == callback_ns
    assert ("freed", TABLE, 9000, True) in guest.told
    assert [what for what in guest.told if what[0] == "reported"] == [("reported", reported_at)]


@pytest.mark.parametrize("entries", [512, 2048, 8192])
def test_the_second_walk_grows_with_the_granule(entries: int) -> None:
    policy, guest = POLICIES["free_removed_table"](), Guest(entries)
    assert policy.callback(guest, TABLE, 0) == 45 + entries * 4


# -- in a guest -------------------------------------------------------------------------------


def emptied(policy: str) -> tuple[Lab, dict[str, list[int]]]:
    """A 32 MiB guest after its 17 tables went, and the time line of table memory."""
    made = Lab(32 * MIB, kernel={"base": "linux-6.12", "set": {"table_free": policy}})
    made.fill()
    made.drop()
    made.env.run()
    line = made.world.memory.timeline(max(made.t_ns, int(made.env.now)))
    return made, {name: column.tolist() for name, column in line.items()}


def test_inline_holds_nothing_back() -> None:
    made, line = emptied("inline")
    assert not any(line["deferred_bytes"])
    assert line["table_bytes"] == line["reported_table_bytes"]
    assert line["table_bytes"][-1] == 2 * 4096, "the root stays"
    assert made.kvm.tables_freed == 17
    assert made.world.rcu.completed == 0


@pytest.mark.parametrize("policy", DEFERRED)
def test_a_grace_period_lies_between_unlink_and_free(policy: str) -> None:
    made, line = emptied(policy)
    assert max(line["deferred_bytes"]) == 17 * 4096
    assert line["deferred_bytes"][-1] == 0
    assert line["table_bytes"][-1] == line["reported_table_bytes"][-1] == 2 * 4096
    (_, start, end, _), *_ = made.world.recorder.grace_periods
    waiting = dict(zip(line["t_ns"], line["deferred_bytes"], strict=True))
    full = min(t_ns for t_ns, held in waiting.items() if held == 17 * 4096)
    freed_from = min(t_ns for t_ns, held in waiting.items() if t_ns > full and held < 17 * 4096)
    assert full <= start < end <= freed_from
    assert made.kvm.tables_freed == 17
    assert made.world.rcu.idle
    assert not made.kvm.oracle.violations
    made.kvm.oracle.finished(int(made.env.now))
    assert not made.kvm.oracle.violations, "nothing leaked"


@pytest.mark.parametrize("policy", DEFERRED)
def test_reported_and_real_memory_differ_only_with_put_page_rcu(policy: str) -> None:
    _, line = emptied(policy)
    apart = line["table_bytes"] != line["reported_table_bytes"]
    assert apart == (policy == "put_page_rcu")


def test_the_hold_pays_for_the_policy() -> None:
    holds = {}
    for policy in ("inline", "put_page_rcu"):
        made = Lab(32 * MIB, kernel={"base": "linux-6.12", "set": {"table_free": policy}})
        made.fill()
        made.drop()
        holds[policy] = made.lock_rows("range_start")[0]["hold"]
    costs = made.kvm.costs.free
    assert holds["put_page_rcu"] - holds["inline"] == 17 * (costs.call_rcu_ns - costs.free_ns)
