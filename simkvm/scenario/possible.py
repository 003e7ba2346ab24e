"""Which policies Linux could have on which machine, and with which others: else, why not.

A kernel that differs from any released one is what "what if" is about, so little is refused: what
an architecture has no code or no hardware for, what contradicts itself, what a machine lacks, and
what is known to be unsafe, unless the scenario says that it expects that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from simkvm.scenario.errors import Keys, Problem
from simkvm.scenario.kernel import KernelVariant, safety_reasons
from simkvm.scenario.machine import Machine

Choice = tuple[str, str]  #: a policy and one of its values

STAGE2_WALKER: Final = "it belongs to arm64's stage-2 walker"
ONLY: Mapping[Choice, tuple[str, str]] = {
    ("mmu", "stage2"): ("arm64", "x86 has no stage-2 table"),
    ("mmu", "tdp"): ("x86", "arm64 has a stage-2 table"),
    ("mmu", "shadow"): ("x86", "arm64 always has a second stage"),
    ("remote_flush", "broadcast"): ("arm64", "x86 flushes another CPU by interrupting it"),
    ("remote_flush", "ipi"): ("x86", "arm64 broadcasts invalidations and interrupts nobody"),
    ("unmap_tables", "free"): ("arm64", "x86 keeps no count that tells when a table is empty"),
    ("unmap_yield", "chunk"): ("arm64", "x86 looks before each entry, it has no chunks"),
    ("unmap_yield", "entry"): ("x86", "arm64's walker cannot stop inside a chunk"),
    ("unmap_tlbi", "per_leaf"): ("arm64", "x86 flushes once for all that it zapped"),
    ("root_free", "in_release"): ("arm64", "x86 zaps its roots in the release hook"),
    ("root_free", "after_unregister"): ("arm64", "x86 zaps its roots in the release hook"),
    ("root_free", "zap_rcu"): ("x86", "arm64 detaches its root and frees the tree"),
    ("teardown_walk", "single"): ("arm64", "x86 zaps its roots pass by pass"),
    ("teardown_walk", "chunked"): ("arm64", "x86 zaps its roots pass by pass"),
    ("teardown_walk", "chunked_early"): ("arm64", "x86 zaps its roots pass by pass"),
    ("teardown_walk", "chunked_whole_range"): ("arm64", "x86 zaps its roots pass by pass"),
    ("teardown_walk", "zap_roots"): ("x86", "arm64 frees the tree in one walk or in chunks"),
    ("table_free", "free_removed_table"): ("arm64", STAGE2_WALKER),
    ("table_free", "free_removed_table_count_test"): ("arm64", STAGE2_WALKER),
    ("collapse_free", "subtree"): ("arm64", STAGE2_WALKER),
    ("collapse_free", "subtree_leak"): ("arm64", STAGE2_WALKER),
    ("ageing_lock", "rmap_bit"): ("x86", "arm64 has no reverse-map chains"),
}
"""Values that one architecture alone can have, and why the other cannot."""

NEVER_WITH: Mapping[tuple[Choice, Choice], str] = {
    (("ageing_lock", "rmap_bit"), ("mmu", "tdp")): "only the shadow MMU has reverse-map chains",
    (("ageing_lock", "none"), ("mmu", "shadow")): "a walk of a reverse-map chain has to lock it",
    (("fault_lock", "read"), ("mmu", "shadow")): "adding to a reverse-map chain needs the write "
    "lock",
    **{
        (("ageing_call", "bitmap"), ("ageing_lock", lock)): "windows of PTEs are aged without lock"
        for lock in ("write", "read", "rmap_bit")
    },
}
"""Values that exclude one another, and why."""

NEEDS: Mapping[Choice, tuple[str, ...]] = {
    ("unmap_tlbi", "deferred"): ("tlbirange", "fwb"),
    ("break_tlbi", "range"): ("tlbirange",),
}
"""Values that need features of an arm64 machine."""


def kernel_problems(kernel: KernelVariant, machine: Machine, expect: str) -> Iterator[Problem]:
    """What makes ``kernel`` impossible on ``machine``.

    ``expect``: what the scenario expects of the safety oracle: "safe", "unsafe" or "any".
    """
    if kernel.arch != machine.arch:
        message = f"{kernel.name} is a kernel for {kernel.arch}, {machine.name} is {machine.arch}"
        yield Problem(("kernel",), message)
        return
    found = [*_of_the_other(kernel), *_contradictions(kernel), *_lacking(kernel, machine)]
    yield from found
    if expect != "unsafe" and not found:
        for reason in safety_reasons(kernel):
            yield Problem(("kernel",), f"{reason}; to see that, say `expect: unsafe`")


def _of_the_other(kernel: KernelVariant) -> Iterator[Problem]:
    for (policy, value), (arch, reason) in ONLY.items():
        if kernel[policy] == value and kernel.arch != arch:
            yield Problem(_key(kernel, policy), f"{policy} {value} is {arch}'s: {reason}")


def _contradictions(kernel: KernelVariant) -> Iterator[Problem]:
    for ((policy, value), (other, its)), reason in NEVER_WITH.items():
        if kernel[policy] == value and kernel[other] == its:
            set_here = policy if policy in kernel.overrides else other
            message = f"{policy} {value} does not go with {other} {its}: {reason}"
            yield Problem(_key(kernel, set_here), message)


def _lacking(kernel: KernelVariant, machine: Machine) -> Iterator[Problem]:
    """Shipped kernels fall back on machines without these; asking for them there is a mistake."""
    if machine.arch != "arm64":
        return
    for (policy, value), flags in NEEDS.items():
        lacks = [flag for flag in flags if not getattr(machine, flag)]
        if kernel.overrides.get(policy) == value and lacks:
            message = f"{value} needs {' and '.join(flags)}, {machine.name} lacks "
            message += " and ".join(lacks)
            yield Problem(_key(kernel, policy), message)


def _key(kernel: KernelVariant, policy: str) -> Keys:
    return ("kernel", "set", policy) if policy in kernel.overrides else ("kernel",)
