"""madvise(MADV_PAGEOUT) over a part of a guest's memory."""

from __future__ import annotations

import numpy as np
import pytest
from pressed import Pressed

from simkvm.kernel.pageout import Pageout
from simkvm.kernel.swappable import SLOT


@pytest.fixture
def pressed() -> Pressed:
    """One guest of 512 pages, all of which it has just used."""
    pressed = Pressed()
    pressed.use(*range(512))
    return pressed


def page_out(pressed: Pressed, first: int, last: int) -> None:
    pageout = Pageout(pressed.pgdat, pressed.task)
    pressed.do(pageout.run(0, 0, first, last, pressed.now()))


def test_used_pages_go_and_nobody_is_asked(pressed: Pressed) -> None:
    kvm, vmstat = pressed.kvms[0], pressed.pgdat.vmstat
    page_out(pressed, 100, 164)
    out = np.zeros(512, np.bool_)
    out[100:164] = True
    assert ((pressed.host.swap == SLOT) == out).all()
    assert ((pressed.host.state == 0) == out).all()
    assert kvm.young_calls.locked == kvm.young_calls.lockless == 0
    assert vmstat.pswpout == 64
    assert vmstat.pgscan_direct == vmstat.pgsteal_direct == 0
    assert sum(pressed.by_age()) == 512 - 64


def test_pages_go_in_order_of_addresses(pressed: Pressed) -> None:
    order: list[int] = []
    pressed.kvms[0].stage2.on_unmap = lambda walk: order.append(walk.first)
    page_out(pressed, 100, 164)
    assert order == list(range(100, 164))


def test_what_is_not_on_the_lru_stays(pressed: Pressed) -> None:
    pressed.lruvec.listed_guests[0].remove(np.array([101, 120]))
    page_out(pressed, 100, 164)
    assert np.flatnonzero(pressed.host.state[100:164]).tolist() == [1, 20]


def test_lists_of_several_generations(pressed: Pressed) -> None:
    lruvec = pressed.lruvec
    lruvec.putback(lruvec.take_off(np.arange(100, 110)), lruvec.max_seq)
    page_out(pressed, 96, 128)
    assert sum(pressed.by_age()) == sum(lruvec.on_list[0]) == 512 - 32
