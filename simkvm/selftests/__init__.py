"""The KVM selftests' own threads: what a test does around the guests that it makes.

One module a test, found by its name. A new test is a class with a ``name`` here, and its model in
:mod:`simkvm.scenario.selftests`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simkvm.selftests.access_tracking_perf import AccessTrackingPerf
from simkvm.selftests.demand_paging import DemandPaging
from simkvm.selftests.dirty_log_perf import DirtyLogPerf
from simkvm.selftests.kvm_page_table import KvmPageTable
from simkvm.selftests.main_thread import MainThread
from simkvm.selftests.max_guest_memory import MaxGuestMemory
from simkvm.selftests.memslot_perf import MemslotPerf
from simkvm.selftests.mmu_stress import MmuStress

if TYPE_CHECKING:
    from simkvm.kernel.world import World

TESTS: dict[str, Any] = {
    "access_tracking_perf_test": AccessTrackingPerf,
    "demand_paging_test": DemandPaging,
    "dirty_log_perf_test": DirtyLogPerf,
    "kvm_page_table_test": KvmPageTable,
    "max_guest_memory_test": MaxGuestMemory,
    "memslot_perf_test": MemslotPerf,
    "mmu_stress_test": MmuStress,
}


def build(world: World) -> MainThread:
    """The main thread of the scenario's selftest; it makes the vCPUs of ``world``'s guests."""
    spec = world.scenario.selftest
    assert spec is not None
    test: MainThread = TESTS[spec.test](world, spec.on(world.machine.arch))
    return test
