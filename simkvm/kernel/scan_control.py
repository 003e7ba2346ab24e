"""What one round of reclaim wants and has got (mm/vmscan.c, ``struct scan_control``, v6.12)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DEF_PRIORITY: Final = 12
SWAP_CLUSTER_MAX: Final = 32  #: pages that a direct reclaimer wants


@dataclass
class ScanControl:
    """``priority``: 12 at first, and less the harder it tries."""

    nr_to_reclaim: int
    kswapd: bool
    priority: int = DEF_PRIORITY
    reclaimed: int = 0
    scanned: int = 0
