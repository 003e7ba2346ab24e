"""What one round of reclaim wants and has got (mm/vmscan.c, ``struct scan_control``, v6.12)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

DEF_PRIORITY: Final = 12
SWAP_CLUSTER_MAX: Final = 32  #: pages that a direct reclaimer wants


@dataclass
class ScanControl:
    """``priority``: 12 at first, and less the harder it tries.

    What follows ``scanned`` is the classic LRU's, two values by type.
    """

    nr_to_reclaim: int
    kswapd: bool
    priority: int = DEF_PRIORITY
    reclaimed: int = 0
    scanned: int = 0
    may_deactivate: list[bool] = field(default_factory=lambda: [False, False])
    force_deactivate: bool = False  #: whatever the lists look like
    skipped_deactivate: bool = False  #: active folios were spared
    cache_trim_mode: bool = False  #: there are inactive pages of files enough
    file_is_tiny: bool = False
