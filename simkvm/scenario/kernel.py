"""Kernel variants: the policies by which kernels differ.

One TOML file a variant, in ``kernels/``. A policy's value says what the simulated kernel does;
its source says where that was read: a kernel file with its version, or the message id of a
posting (readable at https://lore.kernel.org/r/ID).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

from simkvm.scenario import shipped
from simkvm.scenario.errors import InputError
from simkvm.scenario.shipped import Reference, Table, known

ARCHITECTURES: Final = ("arm64", "x86")

POLICIES: Final[dict[str, dict[str, str]]] = {
    "fault_lock": {
        "read": "stage-2 faults take mmu_lock for read and update entries by cmpxchg",
        "write": "stage-2 faults take mmu_lock for write",
    },
    "table_free": {
        "inline": "unmap drops an empty table's last reference at once, under mmu_lock",
        "put_page_rcu": "one callback a table drops the reference after a grace period",
        "free_removed_table": "as put_page_rcu, and the callback walks the empty table first",
        "free_removed_table_count_test": "as free_removed_table, but a count of 1 skips the walk",
    },
    "table_callback": {
        "call_rcu": "a table's callback is lazy where the host has lazy callbacks",
        "call_rcu_hurry": "a table's callback is never lazy",
    },
    "ageing_call": {
        "blind": "MGLRU's page-table walk asks nobody: it sees host accesses only",
        "per_pte": "one notifier call for each present PTE",
        "per_pte_twice": "one notifier call to test each present PTE, one more to clear it",
        "per_folio": "one notifier call for the PTEs of one large folio",
        "bitmap": "windows of 64 PTEs, one test and at most one clear call each",
    },
    "ageing_lock": {
        "write": "an ageing call takes mmu_lock for write",
        "read": "an ageing call takes mmu_lock for read",
        "none": "an ageing call is an RCU reader without mmu_lock",
        "rmap_bit": "an ageing call holds the bit lock of one reverse-map chain at a time",
    },
    "eviction_young": {
        "clear_flush_young": "eviction tests one page at a time and flushes the VMID if young",
        "look_around": "eviction tests the page and its 63 neighbours, without a flush",
    },
    "unmap_tlbi": {
        "per_leaf": "one invalidation for each valid leaf that unmap clears",
        "deferred": "one range invalidation a chunk, if the machine has tlbirange and fwb",
    },
    "lock_break": {
        "build": "any CONFIG_PREEMPTION build drops a contended lock between chunks",
        "runtime": "the run-time preemption model decides whether contention breaks the lock",
    },
    "root_free": {
        "in_release": "the tree goes in the notifier's release hook, readers may be running",
        "after_unregister": "the tree goes once unregistering has drained the notifier's SRCU",
        "zap_rcu": "roots are zapped under mmu_lock in the release hook, their pages go by RCU",
    },
    "teardown_walk": {
        "single": "one walk over the whole IPA space, no reschedule point",
        "chunked": "a walk a largest block of the IPA space, with reschedule points between",
        "chunked_early": "as chunked, but a chunk drops an upper table whatever still hangs in it",
        "chunked_whole_range": "as chunked, over all 64 bits of address instead of the IPA space",
        "zap_roots": "passes by level under the write lock, with yields between entries",
    },
    "mmu": {
        "stage2": "arm64's stage-2 table",
        "tdp": "x86's TDP MMU: a table per root, entries changed by cmpxchg under the read lock",
        "shadow": "x86's shadow MMU: reverse-map chains from each guest page to its entries",
    },
    "access_fault_lock": {
        "read": "setting the accessed flag in software takes mmu_lock for read",
        "write": "setting the accessed flag in software takes mmu_lock for write",
        "none": "setting the accessed flag in software takes no lock",
    },
    "permission_fault_lock": {
        "read": "making an entry writable again takes mmu_lock for read",
        "write": "making an entry writable again takes mmu_lock for write",
        "none": "making an entry writable again takes no lock",
    },
    "fault_retry": {
        "any": "a fault gives up if any invalidation of the VM runs or ran since its look-up",
        "range": "a fault gives up only if its page lies in the range that invalidations cover",
    },
    "unmap_tables": {
        "free": "unmap frees a table with its last entry",
        "keep": "unmap zaps leaf entries; tables stay until a collapse or the end of the root",
    },
    "unmap_yield": {
        "chunk": "unmap may let go of the lock after each largest block",
        "entry": "unmap may let go of the lock, after a flush, between any two entries",
    },
    "collapse_free": {
        "inline": "a table that a block replaces is freed at once",
        "subtree": "one callback walks and frees the whole subtree after a grace period",
        "subtree_leak": "as subtree, but nobody drops the subtree's root",
        "per_table": "the subtree is walked when it is unlinked, with one callback a table",
    },
    "recover_huge": {
        "on_fault": "after dirty logging a fault replaces the table by a block",
        "zap": "when dirty logging ends, tables that could be blocks are zapped",
        "recover": "when dirty logging ends, blocks are put back in one go",
    },
    "ageing_flush": {
        "none": "clearing an accessed flag invalidates nothing",
        "per_call": "a call that found something young flushes the whole VMID, under its lock",
    },
    "remote_flush": {
        "broadcast": "the interconnect broadcasts invalidations",
        "ipi": "an interrupt to each running vCPU, and a wait for all of them",
    },
    "write_protect_lock": {
        "write": "switching dirty logging on takes mmu_lock for write",
        "read": "switching dirty logging on takes mmu_lock for read",
    },
    "dirty_log_clear_lock": {
        "write": "KVM_CLEAR_DIRTY_LOG takes mmu_lock for write",
        "read": "KVM_CLEAR_DIRTY_LOG takes mmu_lock for read",
    },
    "eager_split": {
        "none": "blocks are split by the faults that write to them",
        "chunked": "blocks may be split when logging begins or is cleared, chunk by chunk",
    },
    "flush_shadow": {
        "srcu": "two ends of a VM may both flush its tables: only SRCU is held",
        "mmu_lock": "flushing a VM's tables is exclusive",
    },
    "promotion": {
        "direct": "a young page goes to the youngest generation at once",
        "two_step": "the first sighting sets the referenced bit, the next one promotes",
    },
    "relax_tlbi": {
        "broadcast": "a permission fault invalidates on all CPUs",
        "local": "a permission fault invalidates on its own CPU",
    },
    "break_tlbi": {
        "vmid": "breaking a table entry invalidates the whole VMID",
        "range": "breaking a table entry invalidates its span, if the machine has tlbirange",
    },
}
"""Every policy, its values, and what each means."""


@dataclass(frozen=True)
class Policy:
    """One choice, where it was read, and the reason where it needs one."""

    value: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class KernelVariant:
    """One kernel: a value for every policy of `POLICIES`.

    ``counterfactual``: no released kernel behaves like this. ``overrides`` holds what a
    scenario set, by policy.
    """

    name: str
    title: str
    arch: str
    policies: dict[str, Policy]
    counterfactual: bool = False
    note: str = ""
    overrides: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, policy: str) -> str:
        """Value of one policy. Raises `InputError` for an unknown one."""
        known(policy, POLICIES, f"kernel {self.name} has no policy", key=None)
        return self.policies[policy].value

    def table(self) -> list[dict[str, str]]:
        """One row a policy: policy, value, meaning, source, note."""
        return [
            {
                "policy": name,
                "value": policy.value,
                "meaning": POLICIES[name][policy.value],
                "source": policy.source,
                "note": policy.note,
            }
            for name, policy in self.policies.items()
        ]


def kernel_names() -> list[str]:
    """Names of the shipped kernel variants, sorted."""
    return shipped.names("kernels")


def load_kernel(ref: Reference) -> KernelVariant:
    """Load a shipped variant, with the policies that ``ref`` sets.

    ``ref`` is a name or ``{base: NAME, set: {POLICY: VALUE}}``. Any combination can be loaded;
    what a scenario may have is for :mod:`simkvm.scenario.possible` to say. Raises `InputError`
    for an unknown base, policy or value.
    """
    base, changes = shipped.split(ref, "kernel", kernel_names())
    kernel = _shipped_kernel(base)
    # The caller gets its own tables: what one run does to them, no other run may feel.
    kernel = replace(kernel, policies=dict(kernel.policies), overrides={})
    for name, value in changes.items():
        kernel = _override(kernel, name, value)
    return kernel


def parse_kernel(content: str, file: str) -> KernelVariant:
    """Read one variant's TOML. Raises `InputError` naming ``file`` and the key.

    With a ``base``, policies that are not listed are that kernel's, sources included.
    """
    table = Table(shipped.parse(content, file), file)
    base = table.take("base", str, default="")
    inherited = _shipped_kernel(base).policies if base else {}
    kernel = KernelVariant(
        name=table.take("name", str),
        title=table.take("title", str),
        arch=table.take_choice("arch", ARCHITECTURES),
        counterfactual=table.take("counterfactual", bool),
        note=table.take("note", str, default=""),
        policies=_policies(table.take_table("policies"), inherited),
    )
    table.finish()
    return kernel


def safety_reasons(kernel: KernelVariant) -> list[str]:
    """Say why this combination of policies is unsafe by construction; empty if nothing is known.

    For people to read. What a run reports comes from its oracle, which knows nothing of this.
    """
    if kernel["ageing_lock"] != "none":
        return []  # unmap and teardown take mmu_lock for write, which keeps out any lock holder
    reasons = []
    if kernel["table_free"] == "inline" and kernel["teardown_walk"] == "zap_roots":
        reasons.append(
            "ageing_lock none with table_free inline: zapping the roots frees tables at once, "
            "while an ageing walk without mmu_lock may still be reading them"
        )
    elif kernel["table_free"] == "inline" and kernel["unmap_tables"] == "free":
        reasons.append(
            "ageing_lock none with table_free inline: unmap frees a table at once, while an "
            "ageing walk without mmu_lock may still be reading it"
        )
    if kernel["collapse_free"] == "inline":
        reasons.append(
            "ageing_lock none with collapse_free inline: a fault that puts a block in a table's "
            "place frees the table at once, while an ageing walk may still be reading it"
        )
    if kernel["root_free"] == "in_release":
        reasons.append(
            "ageing_lock none with root_free in_release: teardown frees the tree before the "
            "notifier's SRCU has drained, so an ageing walk may still be inside"
        )
    return reasons


def diff(a: KernelVariant, b: KernelVariant) -> list[dict[str, str]]:
    """One row for each policy that differs, in the order of `POLICIES`.

    Columns policy, a, b, and where each value was read: a_source, b_source.
    """
    return [
        {
            "policy": name,
            "a": a[name],
            "b": b[name],
            "a_source": a.policies[name].source,
            "b_source": b.policies[name].source,
        }
        for name in POLICIES
        if a[name] != b[name]
    ]


@cache  # the files ship with the package and do not change under a run
def _shipped_kernel(name: str) -> KernelVariant:
    file = f"kernels/{name}.toml"
    kernel = parse_kernel(shipped.text("kernels", name), file)
    if kernel.name != name:
        raise InputError(f"is not the file's name, {name!r}", file=file, key="name")
    return kernel


def _policies(table: Table, inherited: dict[str, Policy]) -> dict[str, Policy]:
    listed = set(table.remaining())
    policies = {
        name: inherited[name]
        if name in inherited and name not in listed
        else _policy(name, table.take_table(name))
        for name in POLICIES
    }
    table.finish()
    return policies


def _policy(name: str, table: Table) -> Policy:
    policy = Policy(
        value=table.take_choice("value", POLICIES[name]),
        source=table.take("source", str),
        note=table.take("note", str, default=""),
    )
    table.finish()
    return policy


def _override(kernel: KernelVariant, name: str, value: Any) -> KernelVariant:
    key = f"kernel.set.{name}"
    known(name, POLICIES, "unknown policy", key=key)
    known(value, POLICIES[name], f"unknown value of {name}", key=key)
    old = kernel.policies[name]
    new = Policy(value, f"set by the scenario; {kernel.name} has {old.value}")
    return replace(
        kernel,
        policies={**kernel.policies, name: new},
        counterfactual=kernel.counterfactual or value != old.value,
        overrides={**kernel.overrides, name: value},
    )
