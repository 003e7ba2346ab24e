"""Scenarios with dirty logs, khugepaged or THP splits that cannot be, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
from worlds import MS, scenario

from simkvm.scenario.errors import InputError
from simkvm.units import GIB, KIB, MIB

LOG = {"kind": "dirty_log", "guest": "vm0"}
SPLIT = {"kind": "thp_split", "guest": "vm0", "rate": 100.0}
KHUGEPAGED = {"kind": "khugepaged", "guest": "vm0"}
THP = {"memory": 4 * MIB, "mapping": 2 * MIB}
HUGETLB = {"memory": GIB, "mapping": GIB}


@pytest.mark.parametrize(
    ("guest", "taker", "said"),
    [
        (THP, {**LOG, "eager_split_chunk": 3 * MIB}, "3 MiB is no block size of the granule"),
        (HUGETLB, {**LOG, "eager_split_chunk": 2 * MIB}, "2 MiB is less than the guest's blocks"),
        (THP, {**LOG, "clear_chunk": 96 * KIB}, "96 KiB is not a multiple of 64 pages, 256 KiB"),
        ({}, SPLIT, "has no huge page to split: it is mapped by pages"),
        (HUGETLB, SPLIT, "mapped by 1 GiB, which is no transparent huge page"),
        (HUGETLB, KHUGEPAGED, "mapped by 1 GiB, which is no transparent huge page"),
        ({"memory": MIB}, KHUGEPAGED, "smaller than a huge page of 2 MiB"),
    ],
)
def test_what_cannot_be_is_refused(guest: dict[str, Any], taker: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        scenario(guest=guest, contenders={"taker": taker}, duration=MS)


def test_a_kernel_that_cannot_split_eagerly_says_so() -> None:
    log = {**LOG, "eager_split_chunk": 2 * MIB}
    with pytest.raises(InputError, match=r"linux-6\.4 cannot split eagerly \(eager_split: none\)"):
        scenario(guest=THP, kernel="linux-6.4", contenders={"log": log}, duration=MS)
    scenario(guest=THP, kernel="linux-6.12", contenders={"log": log}, duration=MS)


def test_a_guest_has_one_dirty_log() -> None:
    with pytest.raises(InputError, match=r"contenders\.b\.guest: a logs the writes of vm0 already"):
        scenario(guest=THP, contenders={"a": LOG, "b": LOG}, duration=MS)


def test_members_of_a_group_are_looked_at_too() -> None:
    group = {**THP, "count": 2}
    with pytest.raises(
        InputError, match=r"contenders\.b\.guest: a logs the writes of vm01? already"
    ):
        scenario(guest=group, contenders={"a": LOG, "b": {**LOG, "guest": "vm01"}}, duration=MS)
    with pytest.raises(InputError, match="has no huge page to split"):
        scenario(guest={"count": 2}, contenders={"s": {**SPLIT, "guest": "vm01"}}, duration=MS)


def test_khugepaged_makes_pages_to_split() -> None:
    scenario(contenders={"s": SPLIT, "k": KHUGEPAGED}, duration=MS)
