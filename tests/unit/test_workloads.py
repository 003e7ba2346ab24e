"""Closed-loop workloads: what they touch, what is said of them, what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_worlds import FOUR_KIB, MACHINE, SERVER, WAKEUP_NS, answered, seat
from worlds import MS, US, run, scenario, world

from simkvm import api
from simkvm.guest.interactive import Browser
from simkvm.guest.memcached import Layout, Server, chunk_bytes, gaussian, item_bytes
from simkvm.guest.sort import Executor
from simkvm.scenario.errors import InputError
from simkvm.scenario.load import load
from simkvm.scenario.workloads import Interactive, Memcached, Sort
from simkvm.show.tables import run_report
from simkvm.show.text import render
from simkvm.units import MIB, format_count, format_duration


def test_a_server_is_a_queue_for_each_worker() -> None:
    """All requests of a worker, against one server with its clients written out."""
    access = {**SERVER, "requests": 300}
    guest = {"vcpus": 3, "memory": 32 * MIB, "mapped": True, "access": access}
    made = world(guest=guest)
    rng = made.stream("vm0/vcpu1")
    server = Server(Memcached.model_validate(access), seat(1, 3, 8192, rng, rng))
    (stage,) = server.stages()
    asks = sorted((at, client) for client, at in enumerate(stage.first_ns))
    left, free_ns = [300] * len(asks), 0
    expected = []
    for batch in stage.batches:
        for total, gap in zip(batch.total_ns.tolist(), batch.gap_ns.tolist(), strict=True):
            asked, client = asks.pop(0)
            free_ns = total + (free_ns if asked <= free_ns else asked + WAKEUP_NS)
            expected.append((free_ns, free_ns - asked + access["network"]))
            left[client] -= 1
            if left[client]:
                asks = sorted([*asks, (free_ns + gap, client)])
    found = answered(made, vcpu=1)
    assert len(found) == 4 * 300
    assert found == expected


def test_slab_classes_are_memcacheds() -> None:
    """As ``memcached -vv`` prints them with its defaults."""
    sizes, at = [], 1
    while at <= 512 * 1024:
        sizes.append(chunk_bytes(at))
        at = sizes[-1] + 1
    assert sizes[:15] == [
        *(96, 120, 152, 192, 240, 304, 384, 480, 600, 752, 944, 1184, 1480, 1856, 2320),
    ]
    assert sizes[-3:] == [315872, 394840, 524288]


def test_items_lie_one_behind_the_other_and_may_straddle_pages() -> None:
    access = Memcached(keys=1000, value_size=1000)
    layout = Layout.of(access)
    assert layout.item == item_bytes(1000, 1000) == 48 + 8 + len("memtier-1000") + 1 + 1000 + 2
    assert layout.chunk == 1184
    assert layout.slabs_at == MIB, "a table of 65,536 pointers is half of one"
    begin = layout.items_at(np.array([0, 3, 885, 886]))
    # A slab of 1 MiB has 885 chunks; what is left over is not used.
    assert (begin - MIB).tolist() == [0, 3552, MIB, MIB + 1184]


def test_a_request_touches_bucket_and_all_pages_of_its_item() -> None:
    access = Memcached(keys=1000, value_size=1000, service=10 * US)
    rng = np.random.default_rng(1)
    server = Server(access, seat(0, 1, 4096, rng, rng))
    keys, sets = np.array([0, 3, 3]), np.array([False, False, True])
    service = np.full(3, 10 * US)
    made = server._jobs(keys, sets, service, np.full(3, 5), last=True)
    buckets = (server.layout.buckets_at(keys) // FOUR_KIB).tolist()
    assert max(buckets) < 128
    # Item 3 begins 3552 bytes into page 256 and is 1071 long.
    assert made.offsets.tolist() == [0, 2, 5, 8]
    assert made.pages.tolist() == [buckets[0], 256, buckets[1], 256, 257, buckets[2], 256, 257]
    # GET: the header is written, the rest of the item and the bucket are read.
    assert made.writes.tolist() == [False, True, False, True, False, True, True, True]
    touch = server.seat.touch_ns
    after = [0, 1, 0, 1, 2, 0, 1, 2]
    assert made.at_ns.tolist() == [5 * US + touch * number for number in after]
    assert made.total_ns.tolist() == [10 * US + touch * number for number in (2, 3, 3)]


def test_connections_are_dealt_out_in_turn_and_all_ask() -> None:
    rng = np.random.default_rng(1)
    access = Memcached(clients=5, requests=3)
    counts = []
    for vcpu in range(3):
        (stage,) = Server(access, seat(vcpu, 3, 60_000, rng, rng)).stages()
        counts.append((len(stage.first_ns), sum(len(batch) for batch in stage.batches)))
    assert counts == [(2, 6), (2, 6), (1, 3)]


def test_a_loaded_server_has_faulted_on_every_page_before_the_first_request() -> None:
    access = {**SERVER, "requests": 5}
    guest = {"vcpus": 3, "memory": 32 * MIB, "access": access}
    found = run(guest=guest).summary
    table, items = 512 * 1024 // FOUR_KIB, MIB // 1184
    slabs, rest = divmod(20_000, items)
    used = table + slabs * MIB // FOUR_KIB + -(-rest * 1184 // FOUR_KIB)
    assert int(found["faults"]) - int(found["fault_retries"]) == used
    assert found["requests"] == 13 * 5
    cold = run(guest={**guest, "access": {**access, "load": False}}).summary
    assert 0 < int(cold["faults"]) < 2 * 3 * 13 * 5, "otherwise a request faults on what it needs"


def test_gaussian_keys_stay_in_range_and_lie_around_the_middle() -> None:
    drawn = gaussian(np.random.default_rng(1), 600, 100.0, 20_000)
    assert drawn.min() >= 0
    assert drawn.max() < 600
    assert abs(float(drawn.mean()) - 300) < 5 * 100 / 20_000**0.5
    assert np.mean(np.abs(drawn - 299.5) < 100) == pytest.approx(0.6827 / 0.9973, abs=0.02)


def test_a_shuffle_reads_every_page_of_every_output_once() -> None:
    access = Sort(data=101 * FOUR_KIB, block=3 * FOUR_KIB)
    read: list[int] = []
    for vcpu in range(4):
        rng = np.random.default_rng(vcpu)
        executor = Executor(access, seat(vcpu, 4, 202, rng, rng))
        before, pages = executor._fetched()
        assert before == len(read), "where the others' parts end"
        fetched = pages.tolist()
        runs = sum(b != a + 1 for a, b in pairwise(fetched)) + 1
        assert runs <= 4 * 3, "blocks are read in order"
        assert fetched != sorted(fetched), "but come in any"
        read += fetched
    assert sorted(read) == list(range(101))


def test_a_sort_reads_and_writes_all_data_in_both_stages() -> None:
    access = {"pattern": "sort", "data": 8 * MIB, "page_cpu": US, "load": False}
    found = run(guest={"vcpus": 3, "memory": 16 * MIB, "access": access})
    assert found.summary["touches"] == 4 * 8 * MIB // FOUR_KIB
    spent_s = int(found.summary["sim_ns"]) / 1e9
    assert found.summary["bytes_per_s"] == pytest.approx(4 * 8 * MIB / spent_s, rel=0.001)


def test_a_cycle_comes_by_every_page_before_any_twice() -> None:
    made = world(
        guest={"memory": MIB, "mapped": True, "access": {"pattern": "chase", "loads": 256}}
    )
    entries = made.kvms[0].stage2.leaf.entries
    entries &= np.uint8(~2 & 0xFF)
    found = made.run()
    assert (entries & 2).all(), "256 loads, 256 pages"
    load_ns = round(MACHINE["dram_local_ns"])
    assert found.summary["sim_ns"] == 256 * load_ns
    assert found.summary["loads_per_s"] == pytest.approx(1e9 / load_ns)


def test_all_vcpus_visit_the_same_tabs() -> None:
    access = Interactive(tabs=5, tab_size=64 * FOUR_KIB, order="random", visits=30, bursts=2)
    visited = []
    for vcpu in range(2):
        rng, layout = np.random.default_rng(vcpu), np.random.default_rng(99)
        browser = Browser(access, seat(vcpu, 2, 320, rng, layout))
        tabs = []
        for stage in browser.stages():
            (batch,) = stage.batches
            assert len(set((batch.pages // 64).tolist())) == 1, "one tab a visit"
            tabs.append(int(batch.pages[0]) // 64)
        visited.append(tabs)
    assert visited[0] == visited[1]
    assert set(visited[0]) == set(range(5))
    assert all(a != b for a, b in pairwise(visited[0]))


def test_a_visit_opens_with_the_whole_working_set() -> None:
    access = {
        "pattern": "interactive",
        "tabs": 2,
        "tab_size": MIB,
        "working_set": 0.5,
        "bursts": 0,
        "visits": 2,
        "burst_pages": 64,
        "burst_cpu": 64 * 900,
    }
    found = run(guest={"vcpus": 2, "memory": 4 * MIB, "mapped": True, "access": access})
    assert found.summary["touches"] == 2 * 128
    assert found.summary["requests"] == 2 * 2
    touch_ns = round(MACHINE["page_touch_ns"])
    assert found.summary["latency_max_ns"] == 64 * (900 + touch_ns)


WRONG = {
    "keys: 1000000": "access.keys: hash table and slabs of 1000000 items take",
    "warmup: 20 ms": "access.warmup: 20 ms leaves nothing to measure: the run ends at 20 ms",
    "sd: 3": "access.sd: belongs to keys_drawn gaussian, not random",
    "requests: 0": "access.requests: ",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(FILE.format(line=line))
    with pytest.raises(InputError) as error:
        load(path)
    assert WRONG[line] in str(error.value)


FILE = """\
name: server
machine: ampere-altra-80c
kernel: linux-6.12
duration: 20 ms
guests:
  vm0:
    vcpus: 4
    memory: 160 MiB
    access:
      pattern: memcached
      clients: 16
      value_size: 1 KiB
      service: 20 us
      {line}
"""


def test_a_file_says_it_in_units(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(FILE.format(line="keys: 20000"))
    access = load(path).points[0].scenario.guests["vm0"].access
    assert isinstance(access, Memcached)
    assert (access.value_size, access.service, access.keys) == (1024, 20_000, 20_000)


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ({"pattern": "sort", "data": 3 * MIB}, "twice 3 MiB"),
        ({"pattern": "sort", "data": MIB, "block": 5000}, "not a multiple of page_size"),
        ({"pattern": "interactive", "tab_size": MIB}, "8 x 1 MiB are more"),
        ({"pattern": "chase"}, "is endless: that needs a duration"),
        ({"pattern": "interactive", "tabs": 1, "tab_size": MIB}, "is endless"),
    ],
)
def test_what_does_not_fit_is_refused(access: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(guest={"memory": 4 * MIB, "access": access})


def test_software_accessed_flags_are_refused() -> None:
    machine = {"base": "ampere-altra-80c", "set": {"hw_af": False}}
    with pytest.raises(InputError, match="no hardware accessed flag"):
        scenario(guest={"memory": 64 * MIB, "access": SERVER}, machine=machine, duration=MS)


def test_a_report_says_what_clients_saw_and_only_if_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(FILE.format(line="keys: 20000"))
    result = api.run(path)
    summary = result.summary
    text = render(run_report(result))
    (row,) = (
        line.split() for line in text.splitlines() if format_count(summary["requests"]) in line
    )
    assert "Requests and work done" in text
    assert format_duration(int(summary["latency_p999_ns"])) in " ".join(row)
    histograms = result.histograms
    ours = histograms[histograms["site"] == "request"]
    assert ours["count"].sum() == summary["requests"] > 1000
    assert set(ours["quantity"]) == {"latency"}

    path.write_text(QUIET)
    quiet = api.run(path)
    assert "Requests" not in render(run_report(quiet))
    assert quiet.summary["requests"] == 0
    assert np.isnan(quiet.summary["latency_p99_ns"])
    assert np.isnan(quiet.summary["requests_per_s"])


QUIET = """\
name: quiet
machine: ampere-altra-80c
kernel: linux-6.12
guests:
  vm0: {memory: 1 MiB, access: {pattern: populate}}
"""


def test_loading_does_not_count() -> None:
    access = {**SERVER, "requests": 20, "think_law": "constant"}
    guest = {"vcpus": 1, "memory": 32 * MIB, "access": access}
    loaded = run(guest=guest).summary
    mapped = run(guest={**guest, "mapped": True}).summary
    assert int(loaded["sim_ns"]) > 2 * int(mapped["sim_ns"])
    assert loaded["requests"] == mapped["requests"] == 13 * 20
    assert loaded["requests_per_s"] == pytest.approx(mapped["requests_per_s"], rel=0.01)
