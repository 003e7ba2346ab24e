"""Call sites of ``mmu_lock``, as the account names them."""

from typing import Final

NAMES: Final = ("fault", "range_start", "range_end", "age", "teardown")
FAULT, RANGE_START, RANGE_END, AGE, TEARDOWN = range(len(NAMES))
