"""Counts of what reclaim does, as /proc/vmstat names them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Vmstat:
    """Pages unless it says otherwise."""

    pgscan_kswapd: int = 0
    pgscan_direct: int = 0
    pgsteal_kswapd: int = 0
    pgsteal_direct: int = 0
    pgactivate: int = 0  #: folios that reclaim found in use
    pgdeactivate: int = 0  #: folios that went from an active list to an inactive one
    pgrefill: int = 0  #: folios that it sorted, or moved to another list, without a look at them
    pswpin: int = 0
    pswpout: int = 0
    nr_written: int = 0  #: pages of files that were written back
    pgmajfault: int = 0  #: faults that read from swap, or from a file
    async_page_faults: int = 0  #: of them those that a kworker took in
    swap_cache_hits: int = 0  #: faults that found their page in the swap cache
    first_faults: int = 0  #: faults that took a fresh page, cleared
    workingset_refault: int = 0  #: evicted folios that came back
    workingset_activate: int = 0  #: of those the ones that came back after a short time
    workingset_restore: int = 0  #: and that had been, or are at once, in the working set
    kswapd_wakeups: int = 0
    oom_kills: int = 0
    look_arounds: int = 0  #: calls of ``lru_gen_look_around`` that looked around
    lru_gen_walks: int = 0  #: walks of an address space that reclaim asked for
    lru_gen_walks_given_up: int = 0  #: because another walker opened the generation
    lru_gen_tables_passed: int = 0  #: page tables that the Bloom filter let pass,
    lru_gen_false_positives: int = 0  #: of them those that had never been added,
    lru_gen_tables_skipped: int = 0  #: and those that it kept out
    lru_gen_promoted: int = 0  #: folios that were moved to a younger generation
    lru_gen_protected: int = 0  #: folios that eviction moved up for the sake of their tier
