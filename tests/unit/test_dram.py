"""Memory bandwidth: one writer is not slowed, many together get no more than the memory takes."""

from __future__ import annotations

import pytest
from lab import Lab, world

from simkvm.kernel.dram import Dram
from simkvm.units import KIB, MIB

GB_S = 10**9


def memory() -> Dram:
    """10 GB/s: 1000 bytes are 100 ns."""
    return Dram(10 * GB_S)


# -- the server -------------------------------------------------------------------------------


def test_one_writer_alone_is_not_slowed() -> None:
    """A CPU clears at its own speed, below what the memory takes, and pauses in between or not."""
    made, t_ns = memory(), 5_000
    for pause_ns in (0, 0, 700, 0):
        begin_ns = t_ns + pause_ns
        t_ns = made.write(begin_ns, begin_ns + 250, 1000)
        assert t_ns == begin_ns + 250


def test_writers_of_one_moment_end_a_service_apart() -> None:
    """Five at once, 100 ns of memory each and 250 of a CPU: from the third on the memory binds."""
    made = memory()
    ends = [made.write(1000, 1250, 1000) for _ in range(5)]
    assert ends == [1250, 1250, 1300, 1400, 1500]
    assert made.write(1500, 1750, 1000) == 1750, "free again exactly then"


def test_the_order_is_that_of_asking() -> None:
    """A large request first holds a small one up; a small one first does not feel the large."""
    made = memory()
    assert [made.write(0, 10, size) for size in (100_000, 100)] == [10_000, 10_010]
    made = memory()
    assert [made.write(0, 10, size) for size in (100, 100_000)] == [10, 10_010]


def test_who_writes_later_than_it_asks_does_not_keep_the_memory_idle() -> None:
    """One that queues elsewhere until 50 us leaves the memory to one that can write now."""
    made = memory()
    assert made.write(1000, 50_250, 1000) == 50_250
    assert made.write(1000, 1250, 1000) == 1250


def test_service_is_size_by_bandwidth_in_whole_ns() -> None:
    made = Dram(165 * GB_S)
    assert made.service_ns(4 * KIB) == 25  # 24.8
    assert made.service_ns(2 * MIB) == 12_710  # 12 710.0


# -- faults -----------------------------------------------------------------------------------


def end_ns(vcpus: int, bandwidth: int, mapping: int = 2 * MIB, **access: object) -> int:
    """When ``vcpus`` that populate 16 MiB each are done."""
    machine = {"base": "graviton3-64c", "set": {"dram_bw_total_bytes_per_s": bandwidth}}
    guest = {
        "vcpus": vcpus,
        "memory": vcpus * 16 * MIB,
        "mapping": mapping,
        "access": {"pattern": "populate", **access},
    }
    return int(world(machine=machine, guest=guest).run().summary["sim_ns"])


def test_vcpus_that_populate_together_get_the_bandwidth_and_no_more() -> None:
    """16 vCPUs clear 256 MiB at 50 GB/s, which takes 5.37 ms; one alone does not feel it."""
    floor_ns = 256 * MIB * 10**9 // (50 * GB_S)
    assert floor_ns < end_ns(16, 50 * GB_S) < 1.05 * floor_ns
    assert end_ns(16, 10**15) < floor_ns / 4
    assert end_ns(1, 50 * GB_S) == end_ns(1, 10**15)


@pytest.mark.parametrize(("write", "slower"), [(True, True), (False, False)])
def test_the_zero_page_is_not_written(write: bool, slower: bool) -> None:
    ends = [end_ns(4, bandwidth, 4 * KIB, write=write) for bandwidth in (GB_S, 10**15)]
    assert (ends[0] > ends[1]) == slower


def test_a_copy_of_the_zero_page_is_written() -> None:
    """A read first, then a write: 4 KiB at 10 MB/s take 409.6 us."""
    machine = {"base": "graviton3-64c", "set": {"dram_bw_total_bytes_per_s": 10**7}}
    lab = Lab(2 * MIB, machine=machine)
    vcpu = lab.touch((7, False, 1000), (7, True, 0))
    lab.env.run(vcpu.process)
    assert 409_600 < vcpu.finished_ns < 409_600 + 20_000


def test_guests_share_one_memory() -> None:
    """Two guests that populate at once take as long as one with the vCPUs of both."""

    def took(guests: int) -> int:
        machine = {"base": "graviton3-64c", "set": {"dram_bw_total_bytes_per_s": 20 * GB_S}}
        guest = {"count": guests, "vcpus": 4, "memory": 64 * MIB, "mapping": 2 * MIB}
        access = {"pattern": "populate"}
        return int(
            world(machine=machine, guest={**guest, "access": access}).run().summary["sim_ns"]
        )

    floor_ns = 64 * MIB * 10**9 // (20 * GB_S)
    assert floor_ns < took(1) < 1.1 * floor_ns
    assert 2 * floor_ns < took(2) < 2.1 * floor_ns


def test_a_guest_whose_faults_queue_does_not_take_the_memory_from_another() -> None:
    """40 vCPUs stand in line for their mmap_lock; the memory, at 14 of 165 GB/s, is free."""

    def neighbour_ns(bandwidth: int) -> int:
        machine = {"base": "ampere-altra-80c", "set": {"dram_bw_total_bytes_per_s": bandwidth}}
        access = {"pattern": "populate"}
        guests = {
            "many": {"vcpus": 40, "memory": 20 * MIB, "access": access},
            "one": {"vcpus": 1, "memory": 2 * MIB, "access": access},
        }
        made = world(machine=machine, guests=guests)
        made.run()
        return made.kvms[1].vcpus[0].finished_ns

    assert neighbour_ns(165 * GB_S) == neighbour_ns(10**15)
