"""Call sites of ``mmu_lock``, as the account names them."""

from typing import Final

NAMES: Final = (
    "fault",  # a stage-2 translation fault
    "range_start",  # the notifier's invalidation: begin and unmap
    "range_end",
    "age",  # clear_flush_young, clear_young, test_young
    "teardown",  # kvm_free_stage2_pgd detaches the root; x86 zaps its roots
    "access_fault",  # handle_access_fault: software sets the accessed flag
    "permission_fault",  # a write to a leaf that dirty logging made read-only
    "write_protect",  # dirty logging is switched on for a memslot
    "dirty_log_get",  # KVM_GET_DIRTY_LOG
    "dirty_log_clear",  # KVM_CLEAR_DIRTY_LOG
    "eager_split",  # blocks are split before a guest writes to them
    "memslot",  # a memslot is deleted or moved
    "pre_fault",  # KVM_PRE_FAULT_MEMORY
    "recover_huge",  # x86: dirty logging is off, huge pages come back
)
(
    FAULT,
    RANGE_START,
    RANGE_END,
    AGE,
    TEARDOWN,
    ACCESS_FAULT,
    PERMISSION_FAULT,
    WRITE_PROTECT,
    DIRTY_LOG_GET,
    DIRTY_LOG_CLEAR,
    EAGER_SPLIT,
    MEMSLOT,
    PRE_FAULT,
    RECOVER_HUGE,
) = range(len(NAMES))
