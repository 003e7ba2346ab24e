"""When dirty pages of files are written back, and which (fs/fs-writeback.c, v6.12)."""

from __future__ import annotations

import numpy as np
from pressed import MIB, Pressed

from simkvm.kernel.file_memory import FileMemory
from simkvm.kernel.swappable import DIRTY
from simkvm.units import NS_PER_S


def of_files(size: int, guests: int = 1) -> Pressed:
    """Guests of ``size`` whose pages have all been read, on a host of 64 MiB, and the flusher."""
    made = Pressed(size, backing="file", mapped=False, guests=guests, host={"size": 64 * MIB})
    for guest in range(guests):
        for leaf in range(size // 4096):
            host(made, guest).swapped_in(leaf, write=False)
            made.pgdat.pages.take()
    made.world.env.process(made.world.flusher.run())  # type: ignore[union-attr]
    made.world.env.run(1)
    return made


def host(made: Pressed, guest: int = 0) -> FileMemory:
    found = made.kvms[guest].host
    assert isinstance(found, FileMemory)
    return found


def dirty(made: Pressed, guest: int = 0) -> list[int]:
    return np.flatnonzero(host(made, guest).swap & DIRTY).tolist()


def write(made: Pressed, first: int, last: int, guest: int = 0) -> None:
    for leaf in range(first, last):
        host(made, guest).written(leaf)


def test_background_writeback_goes_on_until_little_is_dirty() -> None:
    """wb_over_bg_thresh() after every chunk of 1024: a tenth of nearly 16384 pages may stay."""
    made = of_files(32 * MIB)
    write(made, 0, 1500)
    made.world.env.run(NS_PER_S)
    assert len(dirty(made)) == 1500
    write(made, 1500, 8192)
    made.world.env.run(2 * NS_PER_S)
    assert dirty(made) == list(range(7 * 1024, 8192))


def test_it_goes_on_where_it_ended() -> None:
    """mapping->writeback_index: what lies at high addresses has its turn too."""
    made = of_files(32 * MIB)
    write(made, 0, 8192)
    made.world.env.run(2 * NS_PER_S)
    write(made, 0, 1024)
    made.world.env.run(3 * NS_PER_S)
    assert dirty(made) == list(range(1024))
    write(made, 1024, 2000)
    made.world.env.run(4 * NS_PER_S)
    assert len(dirty(made)) == 2000, "it found nothing between there and the end"
    write(made, 2000, 2048)
    made.world.env.run(5 * NS_PER_S)
    assert dirty(made) == list(range(1024, 2048))


def test_reclaim_has_all_written() -> None:
    """wakeup_flusher_threads(): as many pages as are dirty, however few."""
    made = of_files(32 * MIB)
    write(made, 0, 1500)
    made.pgdat.wake_flusher()
    made.world.env.run(NS_PER_S)
    assert dirty(made) == []


def test_files_are_written_when_they_have_been_dirty_for_long() -> None:
    """wb_check_old_data_flush(), every 5 s: the whole file, 30 s after its first dirty page."""
    made = of_files(4 * MIB, guests=2)
    made.world.env.run(6 * NS_PER_S)
    write(made, 0, 100)
    made.world.env.run(20 * NS_PER_S)
    write(made, 500, 600)
    write(made, 0, 10, guest=1)
    made.world.env.run(34 * NS_PER_S)
    assert len(dirty(made)) == 200
    made.world.env.run(41 * NS_PER_S)
    assert (dirty(made), len(dirty(made, 1))) == ([], 10)
    write(made, 0, 1)  # newly dirty
    made.world.env.run(52 * NS_PER_S)
    assert (len(dirty(made)), dirty(made, 1)) == (1, [])
