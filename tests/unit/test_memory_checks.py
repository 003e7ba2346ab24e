"""What is said of scenarios under memory pressure that cannot be: file, line, keys, status 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from simkvm.cli import main
from simkvm.scenario.load import load
from simkvm.units import SIZE_SPELLINGS

GOOD = """\
name: short
machine: ampere-altra-80c
kernel: linux-6.12
host:
  memory:
    size: 24 MiB
  swap: {kind: optane}
guests:
  vm0:
    vcpus: 1
    memory: 4 MiB
    access: {pattern: populate}
duration: 100 us
"""
KSM = "contenders:\n  c: {kind: ksm, guest: vm0}\n"
SELFTEST = GOOD[: GOOD.index("guests:")]
FILLING = SELFTEST.replace("24 MiB", "6 MiB") + (
    "selftest: {test: max_guest_memory_test, vcpus: 1, memory: 8 MiB, slot_size: 8 MiB}\n"
)
SIZE = "host.memory.size"


def said(tmp_path: Path, text: str) -> tuple[int, str]:
    """Exit status and the first line that ``simkvm run`` says of a scenario."""
    path = tmp_path / "short.yaml"
    path.write_text(text)
    result = CliRunner().invoke(main, ["run", str(path)])
    lines = [line for line in result.output.splitlines() if str(path) in line]
    return result.exit_code, lines[0].removeprefix(f"{path}:") if lines else result.output


def test_the_scenario_to_begin_with_is_right(tmp_path: Path) -> None:
    assert said(tmp_path, GOOD)[0] == 0


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            GOOD + KSM,
            15,
            "contenders.c.kind: ksm under memory pressure is not modelled: madvise_dontneed, "
            "free_page_reporting, balloon are",
        ),
        (
            SELFTEST + "selftest: {test: dirty_log_perf_test, vcpus: 1}\n",
            8,
            "selftest.test: dirty_log_perf_test under memory pressure is not modelled: "
            "max_guest_memory_test, access_tracking_perf_test are",
        ),
        (
            GOOD.replace(
                "duration",
                "  vm1: {vcpus: 1, memory: 4 MiB, page_size: 16 KiB, "
                "access: {pattern: populate}}\nduration",
            ),
            5,
            "host.memory: has pages of one size, guests have pages of 4 KiB and 16 KiB",
        ),
        (
            GOOD.replace("    access", "    mapping: 2 MiB\n    access"),
            12,
            "guests.vm0.mapping: reclaim takes single pages, not 2 MiB",
        ),
        (
            GOOD.replace("    access", "    folio: 64 KiB\n    access"),
            12,
            "guests.vm0.folio: reclaim takes single pages, not 64 KiB",
        ),
        (
            GOOD.replace("    access", "    teardown: {order: close_vm, at: 50 us}\n    access"),
            12,
            "guests.vm0.teardown: the end of a VM under memory pressure is not modelled",
        ),
        (
            GOOD.replace("24 MiB", "24578 KiB"),
            6,
            f"{SIZE}: 24578 KiB is not a multiple of the guests' page_size, 4 KiB",
        ),
        (
            GOOD.replace("24 MiB", "600 KiB"),
            6,
            f"{SIZE}: page tables, memory caches and the high watermark alone take 704 KiB",
        ),
        (
            GOOD.replace("24 MiB", "4 MiB")
            .replace("optane}", "optane, size: 128 KiB}")
            .replace("    access", "    mapped: true\n    access"),
            6,
            f"{SIZE}: guests that are mapped from the start exceed it by 640 KiB: host.swap has to "
            "hold 640 KiB",
        ),
        (
            GOOD.replace("24 MiB", "4 MiB")
            .replace("{kind: optane}", "{kind: zram, ratio: 0.5, size: 640 KiB}")
            .replace("    access", "    mapped: true\n    access"),
            6,
            f"{SIZE}: guests that are mapped from the start exceed it by 640 KiB: host.swap has to "
            "hold 1280 KiB",
        ),
        (
            GOOD.replace("24 MiB", "4 MiB")
            .replace("optane}", "zram, ratio: 1.0}")
            .replace("    access", "    mapped: true\n    access"),
            6,
            f"{SIZE}: guests that are mapped from the start exceed it by 640 KiB, and compressed "
            "they have no room either",
        ),
        (
            FILLING.replace("  swap: {kind: optane}\n", ""),
            6,
            f"{SIZE}: what max_guest_memory_test writes to beforehand exceeds it by 2784 KiB: "
            "host.swap has to hold 2784 KiB",
        ),
        (
            FILLING.replace("optane}", "nvme, size: 2 MiB}"),
            6,
            f"{SIZE}: what max_guest_memory_test writes to beforehand exceeds it by 2784 KiB: "
            "host.swap has to hold 2784 KiB",
        ),
        (
            GOOD.replace("  memory:\n    size: 24 MiB\n", ""),
            5,
            "host.swap: is never used by a host whose memory cannot run out: host.memory says its "
            "size",
        ),
        (
            GOOD.replace("24 MiB", "24 MiB\n    lru_gen: 0\n    min_ttl: 1 s"),
            8,
            "host.memory.min_ttl: the multi-gen LRU is off (lru_gen): there are no ages of "
            "generations",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    status, told = said(tmp_path, text)
    assert status == 2
    assert told.startswith(f"{line}:"), told
    assert told.partition(": ")[2] == message


@pytest.mark.parametrize("swap", ["optane, size: 2784 KiB", "zram, ratio: 0.4", "zram"])
def test_what_a_selftest_writes_to_beforehand_fits_with_so_much_swap(
    tmp_path: Path, swap: str
) -> None:
    assert said(tmp_path, FILLING.replace("optane", swap))[0] == 0


SWEEP = GOOD.replace("24 MiB", "[24 MiB, 32 MiB]").replace("linux-6.12", "[linux-6.4, linux-6.12]")
RUN = "run: {kernel: linux-6.12, host.memory.size: 24 MiB}\n"


def first(tmp_path: Path, text: str, *sets: str) -> list[list[str]]:
    """Values of the axes of the points that ``simkvm run`` makes."""
    path = tmp_path / "short.yaml"
    path.write_text(text)
    return [list(map(str, point.axes.values())) for point in load(path, sets).first]


def test_a_sweep_says_what_to_run_first(tmp_path: Path) -> None:
    assert first(tmp_path, SWEEP) == []
    assert first(tmp_path, SWEEP + RUN) == [["linux-6.12", "24 MiB"]]
    both = "run: {kernel: [linux-6.12, linux-6.4]}\n"
    assert len(first(tmp_path, SWEEP + both)) == 4


def test_what_is_set_from_outside_is_run(tmp_path: Path) -> None:
    one = f"{SIZE}=28 MiB"
    assert first(tmp_path, SWEEP + RUN, one) == [["linux-6.12"]]
    two = f"{SIZE}=[28 MiB, 30 MiB]"
    assert [size for _, size in first(tmp_path, SWEEP + RUN, two)] == ["28 MiB", "30 MiB"]
    assert first(tmp_path, SWEEP + RUN, one, "kernel=linux-7.1") == [[]]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            "run: {kernels: linux-6.12}\n",
            "run.kernels: is no axis of this sweep: kernel, host.memory.size "
            "(did you mean 'kernel'?)",
        ),
        (
            "run: {host.memory.size: 24 GiB}\n",
            f"run.{SIZE}: 24 GiB is no value of this axis: 24 MiB, 32 MiB (did you mean '32 MiB'?)",
        ),
        (
            "run: {host.memory.size: 99 XiB}\n",
            f"run.{SIZE}: 'XiB' is not a unit of size: {SIZE_SPELLINGS}",
        ),
        (
            "run: {host.memory.size: some}\n",
            f"run.{SIZE}: 'some' is not a size such as '64 MiB'",
        ),
        ("run: 3\n", "run: is a mapping from axes of the sweep to values"),
    ],
)
def test_what_a_sweep_cannot_run_first(tmp_path: Path, run: str, message: str) -> None:
    status, told = said(tmp_path, SWEEP + run)
    assert (status, told.partition(": ")[2]) == (2, message)


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("{}", "host.memory: --lru-gen needs memory that can run out, such as --set "),
        (
            "{memory: {size: 32 MiB, lru_gen: 0}}",
            "host.memory.lru_gen: --lru-gen needs the multi-gen LRU, which is off",
        ),
    ],
)
def test_generations_of_a_host_that_has_none(tmp_path: Path, host: str, said: str) -> None:
    path = tmp_path / "none.yaml"
    memory = GOOD[GOOD.index("host:") : GOOD.index("guests:")]
    path.write_text(GOOD.replace(memory, f"host: {host}\n"))
    result = CliRunner().invoke(main, ["run", str(path), "--lru-gen"])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert result.output.partition(": ")[2].startswith(said)


def test_generations_of_one_run(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text(SWEEP + "run: {kernel: linux-6.12}\n")
    result = CliRunner().invoke(main, ["run", str(path), "--lru-gen"])
    assert result.exit_code == 2
    assert result.output.partition(": ")[2] == (
        "--lru-gen takes one run, and these are 2, over host.memory.size: choose, such as "
        "--set 'host.memory.size=24 MiB'\n"
    )
    path.write_text(SWEEP + RUN)
    result = CliRunner().invoke(main, ["run", str(path), "--lru-gen"])
    assert result.exit_code == 0
    assert "memcg     1 /vm0" in result.output
