"""The account of a lock by call site and mode."""

from __future__ import annotations

import numpy as np
import pytest
from lab import FAST, Lab, account

from simkvm.kernel.qrwlock import ROW
from simkvm.kernel.sites import AGE, FAULT, NAMES, RANGE_START
from simkvm.observe.lock_stat import KEEP_ROWS, MODES, LockStat
from simkvm.observe.recorder import HISTOGRAM_COLUMNS, LOCK_COLUMNS
from simkvm.units import MIB

ROWS = [  # site, mode, arrival, wait, hold, met
    *(FAULT, 0, 100, 40, 300, FAST),
    *(FAULT, 0, 500, 900, 310, 2),
    *(AGE, 1, 600, 60, 14, 0),
    *(FAULT, 0, 700, 1000, 300, 5),
    *(RANGE_START, 1, 800, 3, 5000, FAST),
]


def stat(*batches: list[int]) -> LockStat:
    made = LockStat("vm0", "mmu_lock")
    for batch in batches or (ROWS,):
        made.absorb(list(batch))
    return made


def test_one_row_a_site_and_mode() -> None:
    rows = {(row["site"], row["mode"]): row for row in stat().rows()}
    assert list(rows) == [("fault", "read"), ("range_start", "write"), ("age", "write")]
    fault = rows["fault", "read"]
    assert tuple(fault) == LOCK_COLUMNS
    assert (fault["guest"], fault["lock"]) == ("vm0", "mmu_lock")
    assert (fault["acquisitions"], fault["contended"]) == (3, 2)
    assert (fault["wait_total_ns"], fault["wait_max_ns"]) == (1940, 1000)
    assert fault["wait_mean_ns"] == 1940 / 3
    assert (fault["hold_total_ns"], fault["hold_max_ns"]) == (910, 310)
    assert fault["wait_p50_ns"] == pytest.approx(900, rel=1 / 32)
    assert fault["wait_p99_ns"] == 1000


def test_queue_lengths_count_who_stood_in_front() -> None:
    """An acquisition that did not join the line met nobody."""
    fault, start, age = stat().rows()
    assert (fault["queue_mean"], fault["queue_max"]) == (7 / 3, 5)
    assert (start["queue_mean"], start["queue_max"], start["contended"]) == (0, 0, 0)
    assert (age["queue_mean"], age["queue_max"], age["contended"]) == (0, 0, 1)


def test_absorbing_empties_the_account() -> None:
    rows = list(ROWS)
    LockStat("vm0", "mmu_lock").absorb(rows)
    assert rows == []


def test_a_short_account_is_left_alone_unless_all_is_wanted() -> None:
    made, rows = LockStat("vm0", "mmu_lock"), list(ROWS)
    made.absorb(rows, everything=False)
    assert rows == ROWS
    long = (ROWS * (KEEP_ROWS // 5 + 1))[: KEEP_ROWS * ROW]
    made.absorb(long, everything=False)
    assert long == []


def test_in_parts_or_at_once_is_the_same() -> None:
    parts = [ROWS[:ROW], ROWS[ROW : 3 * ROW], ROWS[3 * ROW :]]
    one, many = stat(), stat(*parts)
    assert one.rows() == many.rows()
    assert one.digest == many.digest
    assert one.histogram_rows() == many.histogram_rows()


def test_the_digest_knows_the_order_and_every_number() -> None:
    swapped = ROWS[ROW : 2 * ROW] + ROWS[:ROW] + ROWS[2 * ROW :]
    assert stat(swapped).rows() == stat().rows()
    assert stat(swapped).digest != stat().digest
    for place in range(ROW):
        changed = list(ROWS)
        changed[place] += 1
        assert stat(changed).digest != stat().digest


def test_histograms_add_up_to_the_rows() -> None:
    made = stat()
    for row in made.rows():
        for quantity in ("wait", "hold"):
            buckets = [
                bucket
                for bucket in made.histogram_rows()
                if (bucket["site"], bucket["mode"]) == (row["site"], row["mode"])
                and bucket["quantity"] == quantity
            ]
            assert tuple(buckets[0]) == HISTOGRAM_COLUMNS
            assert sum(bucket["count"] for bucket in buckets) == row["acquisitions"]
            assert max(bucket["high_ns"] for bucket in buckets) > row[f"{quantity}_max_ns"]


@pytest.mark.parametrize(("quantity", "column"), [("wait", 3), ("hold", 4)])
def test_all_sites_together(quantity: str, column: int) -> None:
    whole = stat().merged(quantity)
    assert (whole.number, whole.total) == (5, sum(ROWS[column::ROW]))


def test_the_account_of_a_lock_that_was_used() -> None:
    made = Lab(4 * MIB)
    made.fill()
    made.drop(0, MIB)
    made.age()
    rows = account(made.kvm.mmu_lock.rows)
    statistics = LockStat("vm", "mmu_lock")
    statistics.absorb(list(made.kvm.mmu_lock.rows))
    for line in statistics.rows():
        mine = [
            row
            for row in rows
            if NAMES[row["site"]] == line["site"] and MODES[row["mode"]] == line["mode"]
        ]
        assert line["acquisitions"] == len(mine)
        assert line["wait_total_ns"] == sum(row["wait"] for row in mine)
        assert line["hold_max_ns"] == max(row["hold"] for row in mine)
        assert line["hold_mean_ns"] == np.mean([row["hold"] for row in mine])
