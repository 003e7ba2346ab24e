"""Does a scenario file mean what it says, and does a wrong one get the right message?"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from pydantic import ValidationError

from simkvm.guest.trace import assemble, write_trace
from simkvm.scenario import load as load_module
from simkvm.scenario.access import Phases, Populate, Trace, Uniform, Zipf
from simkvm.scenario.contenders import Contender, FreePageReporting, MadviseDontneed
from simkvm.scenario.describe import explain, json_schema, key_names
from simkvm.scenario.document import read_document
from simkvm.scenario.errors import InputError, nearest
from simkvm.scenario.load import Study, identity, load, require_possible, resolved
from simkvm.scenario.schema import Guest, Scenario
from simkvm.units import GIB

BASE = """\
name: base
machine: graviton3-64c
kernel: linux-6.12
duration: 1 s
guests:
  vm0:
    vcpus: 2
    memory_per_vcpu: 1 GiB
    access:
      pattern: zipf
      think: 100 ns
ageing:
  interval: 1 ms
contenders:
  drop:
    kind: madvise_dontneed
    guest: vm0
    range: 2 MiB
    rate: 100 / s
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "w.yaml"


def changed(*changes: tuple[str, str], text: str = BASE) -> str:
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is not in the text once"
        text = text.replace(old, new)
    return text


def kinds(union: Any) -> list[str]:
    """The kinds of a union of models, in the order of the union."""
    return [get_args(m.model_fields["kind"].annotation)[0] for m in get_args(get_args(union)[0])]


def loaded(file: Path, text: str, *sets: str, seed: int | None = None) -> Study:
    file.write_text(text)
    return load(file, sets, seed)


def only(study: Study) -> Scenario:
    (point,) = study.points
    return point.scenario


def message(file: Path, text: str, *sets: str) -> str:
    """The one line that is printed for a wrong file, without the folder."""
    with pytest.raises(InputError) as caught:
        loaded(file, text, *sets)
    return str(caught.value).replace(f"{file.parent}/", "")


# --- what a right file means -----------------------------------------------------------------


def test_values_and_defaults(file: Path) -> None:
    study = loaded(file, BASE)
    scenario = only(study)
    assert (study.name, study.path, study.axes) == ("base", str(file), ())
    assert study.points[0].axes == {}
    assert scenario.duration == 1_000_000_000
    guest = scenario.guests["vm0"]
    assert (guest.memory, guest.memory_per_vcpu, guest.memory_bytes) == (None, GIB, 2 * GIB)
    assert guest.memory_pages == 2 * GIB // 4096
    assert (guest.page_size, guest.mapping, guest.folio) == (4096, 4096, 4096)
    assert (guest.ipa_bits, guest.ipa_base) == (40, GIB)
    assert guest.access == Zipf(touches=None, exponent=0.99, write_ratio=0.5, think=100)
    assert scenario.contenders["drop"] == MadviseDontneed(guest="vm0", range=2 << 20, rate=100.0)
    assert (scenario.host.hz, scenario.host.preemption) == (250, "full")
    assert (scenario.seed, scenario.ties, scenario.expect) == (1, "fifo", "safe")


@pytest.mark.parametrize(
    ("written", "page_size", "mapping", "folio"),
    [
        ("page_size: 16 KiB", 16 << 10, 16 << 10, 16 << 10),
        ("mapping: 2 MiB", 4 << 10, 2 << 20, 2 << 20),
        ("mapping: 1 GiB", 4 << 10, 1 << 30, 1 << 30),
        ("folio: 64 KiB", 4 << 10, 4 << 10, 64 << 10),
        ("{page_size: 64 KiB, mapping: 512 MiB}", 64 << 10, 512 << 20, 512 << 20),
    ],
)
def test_mapping_and_folio_follow_page_size(
    file: Path, written: str, page_size: int, mapping: int, folio: int
) -> None:
    lines = written.strip("{}").replace(", ", "\n    ")
    guest = only(loaded(file, changed(("vcpus: 2", f"vcpus: 2\n    {lines}")))).guests["vm0"]
    assert (guest.page_size, guest.mapping, guest.folio) == (page_size, mapping, folio)


def test_reporting_defaults_are_the_kernels() -> None:
    reporting = FreePageReporting(guest="vm0")
    assert (reporting.block, reporting.batch, reporting.delay) == (2 << 20, 32, 2_000_000_000)


def test_anchors_merges_and_number_forms(file: Path) -> None:
    text = """\
name: forms
machine: graviton3-64c
kernel: linux-6.12
guests:
  a: &a
    vcpus: 0x2
    memory: 1 GiB
    access: {pattern: uniform, touches: 1_000, write_ratio: 1e-1}
  b:
    <<: *a
    vcpus: 3
"""
    guests = only(loaded(file, text)).guests
    assert (guests["a"].vcpus, guests["b"].vcpus) == (2, 3)
    assert guests["a"].access == guests["b"].access == Uniform(touches=1000, write_ratio=0.1)


def test_a_byte_order_mark_is_no_part_of_the_text(file: Path) -> None:
    file.write_text(BASE, encoding="utf-8-sig")
    assert only(load(file)).name == "base"


def test_phases_nest_and_keep_their_order(file: Path) -> None:
    access = """
      pattern: phases
      phases:
        - {pattern: populate, write: false}
        - pattern: phases
          repeat: 2
          phases: [{pattern: uniform, touches: 5}]
"""
    text = changed(("\n      pattern: zipf\n      think: 100 ns\n", access))
    assert only(loaded(file, text)).guests["vm0"].access == Phases(
        phases=(
            Populate(write=False),
            Phases(phases=(Uniform(touches=5),), repeat=2),
        )
    )


# --- what a wrong file gets ------------------------------------------------------------------

GUEST = "w.yaml:7:5: guests.vm0"
NO_MADVISE = (("    range: 2 MiB\n", ""), ("    rate: 100 / s\n", ""))
WRONG = {
    # the file as a whole
    "empty": ("", "w.yaml: is empty"),
    "only a comment": ("# later\n", "w.yaml: is empty"),
    "a list": ("- name: x\n", "w.yaml:1: holds a list: a scenario is a mapping"),
    "a word": ("scenario\n", "w.yaml:1: holds a single value"),
    "two documents": (
        "name: a\n---\nname: b\n",
        "w.yaml:2:1: not YAML: expected a single document",
    ),
    "syntax": ("name: [a\n", "w.yaml:2:1: not YAML: while parsing a flow sequence, expected ','"),
    "tab": (changed(("  vm0:", "\tvm0:")), "w.yaml:6:1: not YAML: "),
    "control character": ("name: a\nx: \x01\n", "w.yaml:2: not YAML: the character"),
    "duplicate key": (
        changed(("duration: 1 s", "duration: 1 s\nmachine: x")),
        "w.yaml:5:1: the key 'machine' is there twice",
    ),
    "itself": ("&x\nname: *x\n", "w.yaml:2:1: name: unfolds without end"),
    "number as key": (
        changed(("  drop:", "  3:")),
        "w.yaml:14:1: contenders: the key 3 is not text: quote it",
    ),
    "date": (
        changed(("name: base", "name: 2023-05-26")),
        "w.yaml:1:1: name: expects text, a number",
    ),
    "tag": (changed(("vcpus: 2", "vcpus: !n 2")), f"{GUEST}.vcpus: expects text, a number"),
    # keys
    "unknown key": (
        changed(("vcpus: 2", "vcpu: 2")),
        f"{GUEST}.vcpu: unknown key (did you mean 'vcpus'?)",
    ),
    "unknown key at the top": (
        changed(("duration:", "durration:")),
        "w.yaml:4:1: durration: unknown key (did you mean 'duration'?)",
    ),
    "unlike any key": (
        changed(("vcpus: 2", "colour: 2")),
        f"{GUEST}.colour: unknown key, expected one of count, vcpus, memory, memory_per_vcpu, ",
    ),
    "required key misspelled": (
        changed(("    access:", "    acess:")),
        "w.yaml:9:5: guests.vm0.acess: unknown key (did you mean 'access'?)",
    ),
    "missing": (changed(("machine: graviton3-64c\n", "")), "w.yaml:1:1: machine: is missing"),
    "missing in a contender": (
        changed(("    range: 2 MiB\n", "")),
        "w.yaml:15:3: contenders.drop.range: is missing",
    ),
    "guest's name": (
        changed(("  vm0:", "  vm.0:")),
        "w.yaml:6:3: guests.vm.0: 'vm.0' is not a name: letters, digits",
    ),
    # types
    "word for a number": (
        changed(("vcpus: 2", "vcpus: two")),
        f"{GUEST}.vcpus: expects a whole number, not 'two'",
    ),
    "float for an int": (
        changed(("vcpus: 2", "vcpus: 2.0")),
        f"{GUEST}.vcpus: expects a whole number, not 2.0",
    ),
    "bool for an int": (
        changed(("vcpus: 2", "vcpus: true")),
        f"{GUEST}.vcpus: expects a whole number, not true",
    ),
    "number for a name": (
        changed(("name: base", "name: 7")),
        "w.yaml:1:1: name: expects text, not 7",
    ),
    "mapping for a scalar": (
        changed(("vcpus: 2", "vcpus: {n: 2}")),
        f"{GUEST}.vcpus: expects a whole number, not a mapping",
    ),
    "scalar for a mapping": (
        changed(("ageing:\n  interval: 1 ms", "ageing: 5 ms")),
        "w.yaml:12:1: ageing: expects a mapping, not '5 ms'",
    ),
    "list for a mapping": (
        changed(("duration: 1 s", "duration: 1 s\nhost: [{hz: 100}, 250]")),
        "w.yaml:5:19: host: expects a mapping, not 250",
    ),
    "guests as a list": ("name: a\nguests: []\n", "w.yaml:1:1: machine: is missing"),
    "no guests": (
        changed((BASE[BASE.index("guests:") : BASE.index("ageing:")], "guests: {}\n")),
        "w.yaml:5:1: guests: must not be empty",
    ),
    "out of range": (
        changed(("vcpus: 2", "vcpus: 0")),
        f"{GUEST}.vcpus: must be at least 1, not 0",
    ),
    "not finite": (
        changed(("pattern: zipf", "pattern: zipf\n      exponent: .nan")),
        "w.yaml:11:7: guests.vm0.access.exponent: must be finite",
    ),
    "not a choice": (
        changed(("duration: 1 s", "duration: 1 s\nhost: {preemption: volontary}")),
        "w.yaml:5:8: host.preemption: 'volontary' is not one of none, voluntary, full, lazy "
        "(did you mean 'voluntary'?)",
    ),
    "not a number's choice": (
        changed(("duration: 1 s", "duration: 1 s\nhost: {hz: 200}")),
        "w.yaml:5:8: host.hz: 200 is not one of 100, 250, 300, 1000",
    ),
    # units
    "size without unit": (
        changed(("1 GiB", "1024")),
        "w.yaml:8:5: guests.vm0.memory_per_vcpu: a size needs a unit, '1024' has none: B, KiB",
    ),
    "duration without unit": (
        changed(("100 ns", "0")),
        "w.yaml:11:7: guests.vm0.access.think: a duration needs a unit, '0' has none: ns, us",
    ),
    "rate without unit": (
        changed(("100 / s", "100")),
        "w.yaml:19:5: contenders.drop.rate: '100' is not a rate such as '200 / s'",
    ),
    "decimal unit": (
        changed(("1 GiB", "1 GB")),
        "GB is ambiguous (1000 or 1024?), sizes here are binary (did you mean '1 GiB'?)",
    ),
    "bool for a duration": (
        changed(("100 ns", "true")),
        "guests.vm0.access.think: expects a duration such as '250 us', not true",
    ),
    "no duration": (
        changed(("duration: 1 s", "duration: 0 s")),
        "4:1: duration: must be above zero",
    ),
    # unions
    "wrong pattern": (
        changed(("pattern: zipf", "pattern: zipff")),
        "w.yaml:10:7: guests.vm0.access.pattern: 'zipff' is not one of populate, uniform, zipf, "
        "hot_cold, phases, trace, memcached, sort, chase, interactive (did you mean 'zipf'?)",
    ),
    "no pattern": (
        changed(("      pattern: zipf\n", "")),
        "w.yaml:9:5: guests.vm0.access.pattern: is missing, expected one of populate, uniform",
    ),
    "pattern alone": (
        changed(("\n      pattern: zipf\n      think: 100 ns\n", " zipf\n")),
        "w.yaml:9:5: guests.vm0.access: expects a mapping with pattern, not 'zipf' "
        "(did you mean '{pattern: zipf}'?)",
    ),
    "key of another pattern": (
        changed(("zipf", "uniform\n      exponent: 1")),
        "w.yaml:11:7: guests.vm0.access.exponent: unknown key of pattern uniform, expected one of "
        "pattern, touches, write_ratio, think",
    ),
    "wrong kind": (
        changed(("madvise_dontneed", "baloon")),
        "w.yaml:16:5: contenders.drop.kind: 'baloon' is not one of "
        f"{', '.join(kinds(Contender))} (did you mean 'balloon'?)",
    ),
    "within a phase": (
        changed(
            (
                "pattern: zipf\n      think: 100 ns",
                "pattern: phases\n      phases:\n        - pattern: populate\n          thnk: 1 ns",
            )
        ),
        "w.yaml:13:11: guests.vm0.access.phases.0.thnk: unknown key of pattern populate "
        "(did you mean 'think'?)",
    ),
    "key of phases": (
        changed(
            (
                "pattern: zipf\n      think: 100 ns",
                "pattern: phases\n      repeat: 0\n      phases: []",
            )
        ),
        "w.yaml:11:7: guests.vm0.access.repeat: must be at least 1, not 0",
    ),
    # machine and kernel
    "machine": (
        changed(("graviton3-64c", "graviton-64c")),
        "w.yaml:2:1: machine: unknown machine 'graviton-64c' (did you mean 'graviton3-64c'?)",
    ),
    "kernel": (
        changed(("linux-6.12", "linux-6.21")),
        "w.yaml:3:1: kernel: unknown kernel 'linux-6.21' (did you mean 'linux-6.12'?)",
    ),
    "machine's base": (
        changed(("machine: graviton3-64c", "machine:\n  set: {}\n  base: graviton")),
        "w.yaml:4:3: machine.base: unknown machine 'graviton'",
    ),
    "machine's parameter": (
        changed(
            (
                "machine: graviton3-64c",
                "machine:\n  base: graviton3-64c\n  set:\n    cores: 64\n    core: 3",
            )
        ),
        "w.yaml:6:5: machine.set.core: machine graviton3-64c has no parameter 'core' "
        "(did you mean 'cores'?)",
    ),
    "policy": (
        changed(("kernel: linux-6.12", "kernel:\n  base: linux-6.12\n  set:\n    table_fre: x")),
        "w.yaml:6:5: kernel.set.table_fre: unknown policy 'table_fre' (did you mean 'table_free'?)",
    ),
    "policy's value": (
        changed(("kernel: linux-6.12", "kernel: {base: linux-6.12, set: {table_free: inlin}}")),
        "w.yaml:3:34: kernel.set.table_free: unknown value of table_free 'inlin' "
        "(did you mean 'inline'?)",
    ),
    "neither name nor change": (
        changed(("linux-6.12", "6.12")),
        "w.yaml:3:1: kernel: expects the name of a kernel, or a mapping with base and set",
    ),
    "key of a change": (
        changed(("machine: graviton3-64c", "machine:\n  bas: graviton3-64c")),
        "w.yaml:3:3: machine.bas: unknown key (did you mean 'base'?)",
    ),
    "kernel of another architecture": (
        changed(("graviton3-64c", "x86-icelake-64c")),
        "w.yaml:3:1: kernel: linux-6.12 is a kernel for arm64, x86-icelake-64c is x86",
    ),
    # what takes two keys to tell
    "unknown guest": (
        changed(("guest: vm0", "guest: vm1")),
        "w.yaml:17:5: contenders.drop.guest: no guest 'vm1' (did you mean 'vm0'?)",
    ),
    "two memories": (
        changed(("vcpus: 2", "memory: 1 GiB")),
        "w.yaml:6:3: guests.vm0: needs exactly one of memory and memory_per_vcpu",
    ),
    "no memory": (
        changed(("    memory_per_vcpu: 1 GiB\n", "")),
        "w.yaml:6:3: guests.vm0: needs exactly one of memory and memory_per_vcpu",
    ),
    "memory and pages": (
        changed(("1 GiB", "1025 KiB")),
        "w.yaml:8:5: guests.vm0.memory_per_vcpu: 1025 KiB is not a multiple of page_size, 4 KiB",
    ),
    "memory and blocks": (
        changed(("1 GiB", "1 MiB\n    mapping: 2 MiB"), ("vcpus: 2", "vcpus: 3")),
        "w.yaml:8:5: guests.vm0.memory_per_vcpu: 3 MiB is not a multiple of mapping, 2 MiB",
    ),
    "memory and folios": (
        changed(("1 GiB", "36 KiB\n    folio: 16 KiB")),
        "w.yaml:8:5: guests.vm0.memory_per_vcpu: 72 KiB is not a multiple of folio, 16 KiB",
    ),
    "no such granule": (
        changed(("vcpus: 2", "page_size: 8 KiB")),
        f"{GUEST}.page_size: 8 KiB is not a granule: 4 KiB, 16 KiB, 64 KiB",
    ),
    "no such block": (
        changed(("vcpus: 2", "mapping: 4 MiB")),
        f"{GUEST}.mapping: 4 MiB is no leaf size of a 4 KiB granule: 4 KiB, 2 MiB, 1 GiB",
    ),
    "block of another granule": (
        changed(("vcpus: 2", "mapping: 2 MiB\n    page_size: 16 KiB")),
        f"{GUEST}.mapping: 2 MiB is no leaf size of a 16 KiB granule: 16 KiB, 32 MiB",
    ),
    "folio below a block": (
        changed(("vcpus: 2", "folio: 64 KiB\n    mapping: 2 MiB")),
        f"{GUEST}.folio: 64 KiB folios cannot be mapped by 2 MiB blocks (did you mean '2 MiB'?)",
    ),
    "odd folio": (
        changed(("vcpus: 2", "folio: 12 KiB")),
        f"{GUEST}.folio: 12 KiB is not a power-of-two multiple of page_size, 4 KiB",
    ),
    "folio above a PMD": (
        changed(("vcpus: 2", "folio: 4 MiB")),
        f"{GUEST}.folio: 4 MiB is above 2 MiB, the largest folio that is mapped by pages",
    ),
    "addresses": (
        changed(("vcpus: 2", "ipa_bits: 32"), ("1 GiB", "4 GiB")),
        "w.yaml:8:5: guests.vm0.memory_per_vcpu: 4 GiB from 1 GiB on do not fit into 32 address "
        "bits (4 GiB)",
    ),
    "base of the addresses": (
        changed(("vcpus: 2", "ipa_base: 512 MiB")),
        f"{GUEST}.ipa_base: 512 MiB is not a multiple of the largest block, 1 GiB",
    ),
    "endless": (
        changed(("duration: 1 s\n", ""), ("think:", "touches: null\n      think:")),
        "w.yaml:10:7: guests.vm0.access.touches: is endless: that needs a duration",
    ),
    "endless by default": (
        changed(("duration: 1 s\n", "")),
        "w.yaml:8:5: guests.vm0.access.touches: is endless: that needs a duration",
    ),
    "unreachable phase": (
        changed(
            (
                "pattern: zipf\n      think: 100 ns",
                "pattern: phases\n      phases: [{pattern: zipf}, {pattern: populate}]",
            )
        ),
        "w.yaml:11:16: guests.vm0.access.phases.0.touches: never ends, so the next phase is never",
    ),
    "too many threads": (
        changed(("duration: 1 s", "duration: 1 s\nhost: {cpus: 3}")),
        "w.yaml:8:5: guests.vm0.vcpus: 2 vCPUs + 1 ageing thread + 1 contender need 4 CPUs, "
        "the host has 3",
    ),
    "more CPUs than cores": (
        changed(("duration: 1 s", "duration: 1 s\nhost: {cpus: 65}")),
        "w.yaml:5:8: host.cpus: 65 CPUs are more than the 64 cores of graviton3-64c",
    ),
    "marks of RCU": (
        changed(("duration: 1 s", "duration: 1 s\nhost: {rcu: {qlowmark: 10001}}")),
        "w.yaml:5:14: host.rcu.qlowmark: 10001 is above qhimark, 10000",
    ),
    "lazy callbacks without a CPU that has them": (
        changed(("duration: 1 s", "duration: 1 s\nhost: {rcu: {lazy: true}}")),
        "w.yaml:5:14: host.rcu.lazy: needs an offloaded CPU: host.rcu.nocbs or host.nohz_full",
    ),
    "preemption without preemptible RCU": (
        changed(("duration: 1 s", "duration: 1 s\nhost: {rcu: {preemptible: false}}")),
        "w.yaml:5:14: host.rcu.preemptible: preemption full always has preemptible RCU "
        "(did you mean 'true'?)",
    ),
    "swap and pages": (
        changed(("duration: 1 s", "duration: 1 s\nhost: {swap: {kind: zram, size: 6 KiB}}")),
        "w.yaml:5:27: host.swap.size: 6 KiB is not a multiple of the guests' page_size, 4 KiB",
    ),
    "swap and latencies that no drive has": (
        changed(
            ("duration: 1 s", "duration: 1 s\nhost: {swap: {kind: nvme, read_p9999: 80 us}}"),
        ),
        "w.yaml:5:27: host.swap.read_p9999: 80 us is not 1 to 9.2 times the mean, 90 us",
    ),
    "swap and a mean that the machine's tail does not fit": (
        changed(
            ("duration: 1 s", "duration: 1 s\nhost: {swap: {kind: optane, write_latency: 1 ms}}"),
        ),
        "w.yaml:5:29: host.swap.write_latency: 30 us is not 1 to 9.2 times the mean, 1 ms",
    ),
    "swap of guests with pages of two sizes": (
        changed(
            ("duration: 1 s", "duration: 1 s\nhost: {swap: {kind: zram}}"),
            (
                "guests:\n",
                "guests:\n  other:\n    memory: 64 MiB\n    page_size: 64 KiB\n"
                "    access: {pattern: populate}\n",
            ),
        ),
        "w.yaml:5:8: host.swap: slots hold pages of one size, guests have pages of 4 KiB and 64",
    ),
    "a swap device of another kind's keys": (
        changed(("duration: 1 s", "duration: 1 s\nhost: {swap: {kind: nvme, ratio: 0.3}}")),
        "w.yaml:5:27: host.swap.ratio: ",
    ),
    "range and pages": (
        changed(("2 MiB", "6 KiB")),
        "w.yaml:18:5: contenders.drop.range: 6 KiB is not a multiple of the guest's page_size",
    ),
    "range and memory": (
        changed(("2 MiB", "3 GiB")),
        "w.yaml:18:5: contenders.drop.range: 3 GiB is more than the guest's memory, 2 GiB",
    ),
    "block that is no power of two": (
        changed(("madvise_dontneed", "free_page_reporting\n    block: 12 KiB"), *NO_MADVISE),
        "w.yaml:17:5: contenders.drop.block: 12 KiB is not a power of two",
    ),
    "balloon above the memory": (
        changed(("madvise_dontneed", "balloon"), ("range: 2 MiB", "target: 3 GiB")),
        "w.yaml:18:5: contenders.drop.target: 3 GiB is more than the guest's memory, 2 GiB",
    ),
    "pages of x86": (
        changed(
            ("graviton3-64c", "x86-icelake-64c"),
            ("kernel: linux-6.12\n", ""),
            ("vcpus: 2", "page_size: 16 KiB"),
        )
        + "kernel: linux-6.12\n",  # for arm64, but that comes later in the file
        "w.yaml:6:5: guests.vm0.page_size: pages of x86-icelake-64c (x86) are 4 KiB",
    ),
    "stop before start": (
        changed(("rate: 100 / s", "rate: 100 / s\n    start: 5 ms\n    stop: 5 ms")),
        "w.yaml:21:5: contenders.drop.stop: 5 ms is not after start",
    ),
    "start after the end": (
        changed(("interval: 1 ms", "start: 2 s")),
        "w.yaml:13:3: ageing.start: 2 s is too late: the run ends at 1 s",
    ),
    "teardown after the end": (
        changed(("vcpus: 2", "teardown: {order: close_vm, at: 1 s}")),
        "w.yaml:7:33: guests.vm0.teardown.at: 1 s is too late: the run ends at 1 s",
    ),
    # sweeps
    "empty sweep": (
        changed(("vcpus: 2", "vcpus: []")),
        f"{GUEST}.vcpus: is an empty list: a sweep needs at least one value",
    ),
    "value twice": (
        changed(("vcpus: 2", "vcpus: [1, 2, 1]")),
        "w.yaml:7:19: guests.vm0.vcpus.2: 1 is there twice",
    ),
    "sweep in a sweep": (
        changed(("vcpus: 2", "vcpus: [1, [2, 3]]")),
        "w.yaml:7:16: guests.vm0.vcpus.1: is a sweep inside a swept value",
    ),
    "sweep in a swept mapping": (
        changed(
            ("kernel: linux-6.12", "kernel: [{base: linux-6.12, set: {table_free: [inline]}}]")
        ),
        "w.yaml:3:35: kernel.0.set.table_free: is a sweep inside a swept value",
    ),
    "item of a sweep": (
        changed(("vcpus: 2", "vcpus:\n      - 1\n      - two\n      - 4")),
        "w.yaml:9:9: guests.vm0.vcpus: expects a whole number, not 'two'",
    ),
    "item of a swept mapping": (
        changed(("ageing:\n  interval: 1 ms", "ageing:\n  - null\n  - {intervall: 1 ms}")),
        "w.yaml:14:6: ageing.intervall: unknown key (did you mean 'interval'?)",
    ),
    "one point is impossible": (
        changed(("vcpus: 2", "vcpus: [1, 64]"), ("linux-6.12", "[linux-6.12, linux-7.1]")),
        "w.yaml:7:16: guests.vm0.vcpus: 64 vCPUs + 1 ageing thread + 1 contender need 66 CPUs, "
        "the host has 64; at guests.vm0.vcpus=64",
    ),
    "two axes clash": (
        changed(("1 GiB", "[1 GiB, 4 GiB]\n    ipa_bits: [40, 32]")),
        "guests.vm0.memory_per_vcpu: 8 GiB from 1 GiB on do not fit into 32 address bits (4 GiB); "
        "at guests.vm0.memory_per_vcpu=4 GiB, guests.vm0.ipa_bits=32",
    ),
    "too many points": (
        changed(
            ("vcpus: 2", f"vcpus: {list(range(1, 401))}"),
            ("name: base", f"name: base\nseed: {list(range(251))}"),
        ),
        "guests.vm0.vcpus: the sweep has 100400 points, more than 100000",
    ),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=WRONG.keys())
def test_wrong_files(file: Path, text: str, expected: str) -> None:
    assert expected in message(file, text)


def test_the_message_is_one_line_with_nothing_after_it(file: Path) -> None:
    text = changed(("vcpus: 2", "vcpu: 2"))
    expected = "w.yaml:7:5: guests.vm0.vcpu: unknown key (did you mean 'vcpus'?)"
    assert message(file, text) == expected


def test_the_first_problem_in_the_file_is_reported(file: Path) -> None:
    later = changed(("rate: 100 / s", "rate: x"))
    assert message(file, later).startswith("w.yaml:19:5:")
    both = changed(("think: 100 ns", "think: x"), text=later)
    assert message(file, both).startswith("w.yaml:11:7:")
    # An unknown name is found by other means than a wrong type, and takes part all the same.
    three = changed(("linux-6.12", "linux-6.21"), text=both)
    assert message(file, three).startswith("w.yaml:3:1:")
    # So does the last value of an axis.
    four = changed(("graviton3-64c", "[graviton3-64c, ampere-altra-80c, graviton]"), text=three)
    assert message(file, four).startswith("w.yaml:2:44: machine: unknown machine 'graviton'")


def test_errors_of_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text(BASE)
    with pytest.raises(InputError, match="no such file") as caught:
        load(tmp_path / "scenario.yml")
    assert caught.value.hint == str(tmp_path / "scenario.yaml")
    with pytest.raises(InputError, match=r"no such file$"):
        load(tmp_path / "nowhere" / "scenario.yaml")
    with pytest.raises(InputError, match="is a folder, not a scenario file"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: a\ndescription: \xe9t\xe9\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml:2: is not UTF-8 text: byte 0xe9"):
        load(tmp_path / "latin.yaml")


def test_aliases_of_aliases_do_not_unfold_for_ever(file: Path) -> None:
    tens = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "unfolds without end or to too many values" in message(
        file, "\n".join(["a0: &a0 [1]", *tens])
    )


def test_input_errors_reach_other_processes_whole() -> None:
    error = InputError("m", file="f", line=1, column=2, key="k", hint="h")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.__dict__) == (str(error), error.__dict__)
    assert str(error) == "f:1:2: k: m (did you mean 'h'?)"
    assert str(InputError("m")) == "m"
    assert str(InputError("a\nb", file="f")) == "f: a b"


def test_nearest() -> None:
    assert nearest("vcpu", ["memory", "vcpus"]) == "vcpus"
    assert nearest("VCPUS", ["memory", "vcpus"]) == "vcpus"
    assert nearest("zzz", ["memory", "vcpus"]) is None


# --- sweeps ----------------------------------------------------------------------------------


def test_sweeps_are_products_in_file_order_first_axis_slowest(file: Path) -> None:
    study = loaded(
        file,
        changed(
            ("linux-6.12", "[linux-7.1, linux-6.12]"),
            ("vcpus: 2", "vcpus: [4, 1]"),
            ("100 / s", "[5 / ms, 1 / s]"),
        ),
    )
    assert study.axes == ("kernel", "guests.vm0.vcpus", "contenders.drop.rate")
    assert [tuple(point.axes.values()) for point in study.points] == [
        (kernel, vcpus, rate)
        for kernel in ("linux-7.1", "linux-6.12")
        for vcpus in (4, 1)
        for rate in ("5 / ms", "1 / s")
    ]
    for point in study.points:
        kernel, vcpus, rate = point.axes.values()
        assert point.scenario.kernel == kernel
        assert point.scenario.guests["vm0"].vcpus == vcpus
        contender = point.scenario.contenders["drop"]
        assert isinstance(contender, MadviseDontneed)
        assert contender.rate == {"5 / ms": 5000.0, "1 / s": 1.0}[str(rate)]


def test_mappings_and_null_can_be_swept(file: Path) -> None:
    study = loaded(
        file,
        changed(
            ("linux-6.12", "[linux-6.12, {base: linux-7.1, set: {table_free: put_page_rcu}}]"),
            ("ageing:\n  interval: 1 ms", "ageing: [null, {interval: 1 ms}]"),
        ),
    )
    assert [point.axes["kernel"] for point in study.points[::2]] == [
        "linux-6.12",
        "{base: linux-7.1, set: {table_free: put_page_rcu}}",
    ]
    assert [point.axes["ageing"] for point in study.points[:2]] == [None, "{interval: 1 ms}"]
    assert study.points[0].scenario.ageing is None
    assert study.points[3].scenario.kernel == {
        "base": "linux-7.1",
        "set": {"table_free": "put_page_rcu"},
    }


def test_whole_guests_can_be_swept_and_are_told_apart_by_what_differs(file: Path) -> None:
    """So count and vcpus change together, where two axes would give every combination."""
    start = BASE.index("  vm0:\n")
    each = "memory: 4 MiB, access: {pattern: populate}"
    cuts = f"  vm0:\n    - {{count: 1, vcpus: 4, {each}}}\n    - {{count: 2, vcpus: 2, {each}}}\n"
    study = loaded(file, BASE[:start] + cuts)
    assert [point.axes["guests.vm0"] for point in study.points] == [
        "{count: 1, vcpus: 4}",
        "{count: 2, vcpus: 2}",
    ]
    guests = [point.scenario.guests["vm0"] for point in study.points]
    assert [(guest.count, guest.vcpus) for guest in guests] == [(1, 4), (2, 2)]


def test_a_list_by_type_is_no_axis_but_may_hold_one(file: Path) -> None:
    phases = (
        "pattern: phases\n      phases: [{pattern: uniform, touches: [1, 2]}, {pattern: populate}]"
    )
    study = loaded(file, changed(("pattern: zipf\n      think: 100 ns", phases)))
    assert study.axes == ("guests.vm0.access.phases.0.touches",)
    assert len(study.points) == 2


def test_patterns_can_be_swept(file: Path) -> None:
    study = loaded(file, changed(("pattern: zipf", "pattern: [zipf, uniform]")))
    accesses = [point.scenario.guests["vm0"].access for point in study.points]
    assert accesses == [Zipf(think=100), Uniform(think=100)]


def test_a_list_of_one_is_an_axis(file: Path) -> None:
    study = loaded(file, changed(("vcpus: 2", "vcpus: [2]")))
    assert (study.axes, len(study.points)) == (("guests.vm0.vcpus",), 1)


# --- --set and --seed ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "keys", "value"),
    [
        ("guests.vm0.vcpus=8", ("guests", "vm0", "vcpus"), 8),
        ("guests.vm0.vcpus = 8", ("guests", "vm0", "vcpus"), 8),
        ("duration=5 ms", ("duration",), "5 ms"),
        ("host.rcu.blimit=20", ("host", "rcu", "blimit"), 20),
        ("kernel.set.table_free=put_page_rcu", ("kernel", "set", "table_free"), "put_page_rcu"),
        ("kernel.set.table_free=put_page_rcu", ("kernel", "base"), "linux-6.12"),
        ("machine.set.cores=8", ("machine", "set", "cores"), 8),
        ("ageing=null", ("ageing",), None),
        ("guests.vm0.access={pattern: populate}", ("guests", "vm0", "access", "repeat"), 1),
        (
            "contenders.report={kind: free_page_reporting, guest: vm0}",
            ("contenders", "report", "block"),
            "2 MiB",
        ),
    ],
)
def test_set(file: Path, setting: str, keys: tuple[str, ...], value: Any) -> None:
    found: Any = resolved(only(loaded(file, BASE, setting)))
    for key in keys:
        found = found[key]
    assert found == value


def test_set_reaches_into_phases(file: Path) -> None:
    phases = "pattern: phases\n      phases: [{pattern: uniform, touches: 1}, {pattern: populate}]"
    text = changed(("pattern: zipf\n      think: 100 ns", phases))
    scenario = only(loaded(file, text, "guests.vm0.access.phases.0.touches=7"))
    access = scenario.guests["vm0"].access
    assert isinstance(access, Phases)
    assert access.phases[0] == Uniform(touches=7)


def test_a_set_list_sweeps_where_its_key_stands(file: Path) -> None:
    text = changed(("100 / s", "[1 / s, 2 / s]"))
    study = loaded(file, text, "guests.vm0.vcpus=[1, 2]", "seed=[7, 8]")
    assert study.axes == ("guests.vm0.vcpus", "contenders.drop.rate", "seed")
    assert loaded(file, text, "contenders.drop.rate=3 / s").axes == ()


def test_set_below_a_sweep_changes_every_value(file: Path) -> None:
    text = changed(("linux-6.12", "[linux-6.12, {base: linux-7.1, set: {ageing_lock: read}}]"))
    study = loaded(file, text, "kernel.set.table_free=put_page_rcu")
    assert [point.scenario.kernel for point in study.points] == [
        {"base": "linux-6.12", "set": {"table_free": "put_page_rcu"}},
        {"base": "linux-7.1", "set": {"ageing_lock": "read", "table_free": "put_page_rcu"}},
    ]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("guests.vm0.vcpu=8", "--set: guests.vm0.vcpu: unknown key (did you mean 'vcpus'?)"),
        ("guest.vm0.vcpus=8", "--set: guest: unknown key (did you mean 'guests'?)"),
        ("guests.vm1.vcpus=8", "--set: guests.vm1: is not in the file (did you mean 'vm0'?)"),
        ("guests.vm0.vcpus=x", "--set: guests.vm0.vcpus: expects a whole number, not 'x'"),
        ("guests.vm0.vcpus=64", "--set: guests.vm0.vcpus: 64 vCPUs + 1 ageing thread"),
        ("guests.vm0.vcpus", "--set: 'guests.vm0.vcpus' is not of the form KEY=VALUE"),
        ("=8", "--set: '=8' is not of the form KEY=VALUE"),
        ("guests..vcpus=8", "--set: 'guests..vcpus=8' is not of the form KEY=VALUE"),
        ("seed=[1", "--set: seed: not YAML: while parsing a flow sequence"),
        ("seed.x=1", "--set: seed: has no keys below it"),
        ("duration.x=1", "--set: duration: has no keys below it"),
        ("kernel.table_free=inline", "--set: kernel.table_free: unknown key, expected one of base"),
        (
            "kernel.set.table_free=inlin",
            "--set: kernel.set.table_free: unknown value of table_free 'inlin' "
            "(did you mean 'inline'?)",
        ),
        ("guests.vm0.access.phases.0.think=1 ns", "--set: guests.vm0.access.phases"),
        ("guests.vm0.access.exponent=11", "guests.vm0.access.exponent: must be at most 10, not 11"),
        ("guests.vm0.vcpus=[1, x]", "--set: guests.vm0.vcpus: expects a whole number, not 'x'"),
    ],
)
def test_wrong_settings_name_the_option_and_no_line(
    file: Path, setting: str, expected: str
) -> None:
    said = message(file, BASE, setting)
    assert said.startswith("--set: ")
    assert expected in said


def test_a_value_of_the_file_that_a_setting_made_wrong_names_the_setting(file: Path) -> None:
    access = "pattern: interactive\n      tabs: 4\n      tab_size: 1 MiB"
    text = changed(("pattern: zipf\n      think: 100 ns", access), ("memory_per_vcpu", "memory"))
    said = message(file, text, "seed=2", "guests.vm0.memory=2 MiB")
    assert said.startswith("w.yaml:11:7: guests.vm0.access.tabs: 4 x 1 MiB are more than")
    assert said.endswith("of memory, with --set guests.vm0.memory=2 MiB")


def test_a_problem_of_the_file_comes_before_one_of_a_setting(file: Path) -> None:
    assert message(file, changed(("100 / s", "x")), "guests.vm0.vcpus=x").startswith("w.yaml:19:5:")


def test_seed_overrides_the_file_and_its_sweep(file: Path) -> None:
    assert only(loaded(file, BASE, seed=42)).seed == 42
    swept = changed(("name: base", "name: base\nseed: [1, 2]"))
    assert only(loaded(file, swept, seed=42)).seed == 42
    with pytest.raises(InputError) as caught:
        loaded(file, BASE, seed=-1)
    assert str(caught.value) == "--seed: seed: must be at least 0, not -1"


# --- traces ----------------------------------------------------------------------------------

TRACED = changed(
    ("pattern: zipf\n      think: 100 ns", "pattern: trace\n      file: sub/t.parquet")
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "t.parquet"
    write_trace(path, assemble([0, 600, 3], [True, False, True], [1, 1, 1]))
    return path


def test_traces_are_found_beside_the_file_wherever_one_stands(
    file: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(TRACED)
    monkeypatch.chdir(tmp_path / "sub")
    access = only(load("../w.yaml")).guests["vm0"].access
    assert isinstance(access, Trace)
    assert Path(access.file).is_absolute()
    assert Path(access.file).samefile(trace)
    assert access.sha256 is not None
    assert len(access.sha256) == 64


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "sub/t.parquet",
            "sub/tt.parquet",
            "w.yaml:11:7: guests.vm0.access.file: no such trace file "
            "(did you mean 'sub/t.parquet'?)",
        ),
        ("sub/t.parquet", "w.yaml", "w.yaml:11:7: guests.vm0.access.file: not a simkvm trace"),
        (
            "1 GiB",
            "2 MiB",
            "w.yaml:11:7: guests.vm0.access.file: 2 x 4 MiB for the trace exceed the guest's 4 MiB",
        ),
        (
            "sub/t.parquet",
            "sub/t.parquet\n      sha256: " + "0f" * 32,
            "w.yaml:12:7: guests.vm0.access.sha256: the trace's digest is ",
        ),
        (
            "sub/t.parquet",
            "sub/t.parquet\n      sha256: 12ab",
            "w.yaml:12:7: guests.vm0.access.sha256: must be 64 hexadecimal digits",
        ),
        (
            "sub/t.parquet",
            "[sub/t.parquet, sub/u.parquet]",
            "w.yaml:11:29: guests.vm0.access.file: no such trace file (did you mean",
        ),
    ],
)
def test_wrong_traces(file: Path, trace: Path, old: str, new: str, expected: str) -> None:
    assert trace.exists()
    assert expected in message(file, changed((old, new), text=TRACED))


def test_truncated_traces_and_larger_pages(file: Path, trace: Path) -> None:
    whole = trace.read_bytes()
    trace.write_bytes(whole[:-10])
    assert "guests.vm0.access.file: trace truncated" in message(file, TRACED)
    write_trace(trace, assemble([0], [True], [1], page_size=16384))
    assert (
        "w.yaml:11:7: guests.vm0.access.file: the trace has pages of 16 KiB, larger than the "
        "guest's 4 KiB"
    ) in message(file, TRACED)


# --- identity --------------------------------------------------------------------------------


def test_identity_ignores_place_order_and_spelling(tmp_path: Path) -> None:
    reordered = """\
contenders: {drop: {rate: 0.1 / ms, range: 2M, guest: vm0, kind: madvise_dontneed, order: random}}
ageing: {interval: 1000 us}
guests:
  vm0: {access: {think: 0.1 us, pattern: zipf}, memory_per_vcpu: 1024 MiB, vcpus: 2}
duration: 1000 ms
kernel: linux-6.12
machine: {base: graviton3-64c}
name: base
"""
    (tmp_path / "a").mkdir()
    one = only(loaded(tmp_path / "one.yaml", BASE))
    other = only(loaded(tmp_path / "a" / "other.yaml", reordered))
    assert identity(one) == identity(other)
    assert len(identity(one)) == 64


def test_the_order_of_guests_means_nothing_to_the_simulation_either(file: Path) -> None:
    guest = "{memory: 1 GiB, access: {pattern: populate}}"
    head = "name: a\nmachine: graviton3-64c\nkernel: linux-6.12\nguests:\n"
    one = only(loaded(file, f"{head}  b: {guest}\n  a: {guest}\n"))
    other = only(loaded(file, f"{head}  a: {guest}\n  b: {guest}\n"))
    assert list(one.guests) == list(other.guests) == ["a", "b"]
    assert identity(one) == identity(other)


@pytest.mark.parametrize(
    "setting",
    [
        "guests.vm0.access.think=101 ns",
        "seed=2",
        "replication=1",
        "kernel=linux-7.1",
        "kernel.set.table_free=put_page_rcu",
        "machine.set.lock_handoff_ns=1.5",
        "host.hz=1000",
        "guests.vm0.folio=64 KiB",
        "ties=shuffle",
    ],
)
def test_identity_sees_every_change(file: Path, setting: str) -> None:
    before = identity(only(loaded(file, BASE)))
    assert identity(only(loaded(file, BASE, setting))) != before


def test_identity_holds_numbers_not_names_of_files(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = only(loaded(file, BASE))
    before = identity(scenario)
    real = load_module.load_machine

    def slower(reference: Any) -> Any:
        return real({"base": reference, "set": {"lock_handoff_ns": 1.5}})

    monkeypatch.setattr(load_module, "load_machine", slower)
    assert identity(scenario) != before
    monkeypatch.undo()
    monkeypatch.setattr(load_module, "MODEL_VERSION", load_module.MODEL_VERSION + 1)
    assert identity(scenario) != before


def test_a_trace_counts_by_content_and_base_name(tmp_path: Path) -> None:
    identities = {}
    for folder, page in (("a", 600), ("b", 600), ("c", 601)):
        path = tmp_path / folder / "sub" / "t.parquet"
        path.parent.mkdir(parents=True)
        write_trace(path, assemble([0, page], [True, False], [1, 1]))
        identities[folder] = identity(only(loaded(tmp_path / folder / "w.yaml", TRACED)))
    assert identities["a"] == identities["b"] != identities["c"]
    access = Trace(file=str(tmp_path / "a" / "sub" / "t.parquet"))  # as built in Python
    scenario = only(loaded(tmp_path / "a" / "w.yaml", TRACED))
    guest = scenario.guests["vm0"].model_copy(update={"access": access})
    assert identity(scenario.model_copy(update={"guests": {"vm0": guest}})) == identities["a"]


def test_resolved_is_a_scenario_again(file: Path) -> None:
    scenario = only(
        loaded(
            file,
            changed(
                ("pattern: zipf", "pattern: phases\n      phases: [{pattern: populate}]")
            ).replace("      think: 100 ns\n", ""),
            "contenders.drop.rate=0.3 / s",
            "kernel.set.table_free=put_page_rcu",
        )
    )
    content = json.loads(json.dumps(resolved(scenario)))
    assert content["guests"]["vm0"]["memory_per_vcpu"] == "1 GiB"
    assert Scenario.model_validate(content) == scenario
    file.write_text(json.dumps(content))
    assert only(load(file)) == scenario


# --- scenarios in Python ---------------------------------------------------------------------


def built(**changes: Any) -> Scenario:
    content = {
        "name": "built",
        "machine": "graviton3-64c",
        "kernel": "linux-6.12",
        "guests": {"vm0": Guest(memory=GIB, access=Populate())},
    }
    return Scenario(**{**content, **changes})


def test_scenarios_can_be_built_with_numbers_or_text() -> None:
    assert built(duration="1 ms") == built(duration=1_000_000)
    require_possible(built())


def test_scenarios_built_in_python_are_checked_alike() -> None:
    contender = MadviseDontneed(guest="vm1", range=4096, rate=1)
    with pytest.raises(InputError) as caught:
        require_possible(built(contenders={"c": contender}))
    assert str(caught.value) == "contenders.c.guest: no guest 'vm1' (did you mean 'vm0'?)"
    with pytest.raises(InputError, match="unknown machine"):
        require_possible(built(machine="none"))


def test_scenarios_are_frozen_all_the_way_down() -> None:
    scenario = built(kernel={"base": "linux-6.12", "set": {"table_free": "inline"}})
    with pytest.raises(ValidationError, match="frozen"):
        scenario.seed = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        scenario.guests["vm0"].vcpus = 2  # type: ignore[misc]
    for mapping in (scenario.guests, scenario.contenders, scenario.kernel, scenario.kernel["set"]):
        with pytest.raises(TypeError, match="frozen"):
            mapping["x"] = 1
        with pytest.raises(TypeError, match="frozen"):
            mapping.update(x=1)
        with pytest.raises(TypeError, match="frozen"):
            mapping.clear()
    assert hash(scenario) == hash(scenario.model_copy())
    copy = pickle.loads(pickle.dumps(scenario))
    assert copy == scenario
    with pytest.raises(TypeError, match="frozen"):
        copy.guests["x"] = copy.guests["vm0"]


# --- the schema for people and editors -------------------------------------------------------


def valid(document: Any) -> bool:
    return jsonschema.Draft202012Validator(json_schema()).is_valid(document)


def test_json_schema_accepts_files_and_sweeps(file: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    texts = [
        BASE,
        TRACED,
        changed(("vcpus: 2", "vcpus: [1, 2]"), ("1 GiB", "[1 GiB, 2 GiB]")),
        changed(("linux-6.12", "[linux-6.12, {base: linux-7.1, set: {table_free: [inline]}}]")),
        changed(("pattern: zipf", "pattern: [zipf, uniform]")),
        changed(("ageing:\n  interval: 1 ms", "ageing: [null, {}]")),
        changed(("duration: 1 s", "duration: 1 s\nhost: {swap: [null, {kind: [zram, nvme]}]}")),
    ]
    for text in texts:
        file.write_text(text)
        assert valid(read_document(file).root), text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vcpus: 2", "vcpu: 2"),
        ("vcpus: 2", "vcpus: two"),
        ("vcpus: 2", "vcpus: [1, two]"),
        ("vcpus: 2", "vcpus: []"),
        ("1 GiB", "1 GB"),
        ("1 GiB", "1024"),
        ("100 ns", "100"),
        ("100 / s", "100"),
        ("zipf", "zipff"),
        ("      pattern: zipf\n", ""),
        ("zipf", "uniform\n      exponent: 1"),
        ("machine: graviton3-64c\n", ""),
        ("duration: 1 s", "duration: 1 s\nhost: {swap: {kind: ksm}}"),
        ("duration: 1 s", "duration: 1 s\nhost: {swap: {kind: [zram, ksm]}}"),
        ("duration: 1 s", "duration: 1 s\nhost: {swap: {kind: zram, channels: 2}}"),
    ],
)
def test_json_schema_refuses_what_loading_refuses(file: Path, old: str, new: str) -> None:
    file.write_text(changed((old, new)))
    assert not valid(read_document(file).root)
    with pytest.raises(InputError):
        load(file)


def test_json_schema_accepts_every_shipped_workload() -> None:
    for path in sorted((Path(__file__).parents[2] / "workloads").rglob("*.yaml")):
        jsonschema.Draft202012Validator(json_schema()).validate(read_document(path).root)


def test_defaults_in_the_json_schema_are_valid_themselves() -> None:
    schema = json_schema()
    for name, definition in {"Scenario": schema, **schema["$defs"]}.items():
        for key, part in definition["properties"].items():
            if "default" in part:
                fits = jsonschema.Draft202012Validator({**part, "$defs": schema["$defs"]})
                assert fits.is_valid(part["default"]), (name, key)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("guests.vm0.vcpus", ["guests.NAME.vcpus", "selftests: -v", "Default: 1.", "at least 1"]),
        ("vcpus", ["guests.NAME.vcpus"]),
        ("host.hz", ["CONFIG_HZ", "100, 250, 300, 1000", "Default: 250.", "A list sweeps it."]),
        ("guests.vm0.page_size", ["granule", "size such as 64 MiB", "Default: 4 KiB."]),
        ("guests.vm0.access", ["pattern: zipf - ", "pattern: trace - ", "Required."]),
        (
            "guests.vm0.access.phases.3.exponent",
            ["guests.NAME.access.exponent", "Of pattern: zipf."],
        ),
        ("contenders.x.batch", ["PAGE_REPORTING_CAPACITY", "VIRTIO_BALLOON_ARRAY_PFNS_MAX"]),
        ("contenders.x.delay", ["PAGE_REPORTING_DELAY", "Default: 2 s."]),
        ("contenders.x", ["mapping by name", "kind: madvise_dontneed - "]),
        ("ageing", ["mapping or null", "interval - Pause", "Default: null."]),
        ("host.swap", ["kind: zram - ", "mapping or null", "Default: null."]),
        ("host.swap.kind", ["zram, nvme, optane. Required", "Which swap device"]),
        ("host.swap.read_latency", ["nvme_in_mean_ns", "Of kind: nvme, optane."]),
        ("contenders.x.kind", ["madvise_dontneed", "thp_split. Required"]),
        ("access.pattern", ["populate, uniform, zipf, hot_cold, phases, trace", "Required."]),
    ],
)
def test_explain(key: str, expected: list[str]) -> None:
    said = explain(key)
    for fragment in expected:
        assert fragment in said


def test_explain_knows_every_key_and_no_other() -> None:
    for key in key_names():
        first, about, *rest = explain(key).splitlines()
        assert first == key
        assert len(about.strip()) > 10, f"{key} has no description"
        assert rest
    with pytest.raises(InputError) as caught:
        explain("guests.vm0.vcpu")
    assert caught.value.hint == "guests.NAME.vcpus"


def test_importing_simkvm_imports_neither_the_schema_nor_arrays() -> None:
    code = (
        "import sys, simkvm, simkvm.units, simkvm.scenario.errors; "
        "print(sorted({'pydantic', 'ruamel.yaml', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loading_needs_no_arrays(file: Path) -> None:
    file.write_text(BASE)
    code = (
        "import sys; from simkvm.scenario.load import load; load(sys.argv[1]); "
        "print(sorted({'numpy', 'pandas', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_windows_are_refused_under_a_lock(tmp_path: Path) -> None:
    text = (
        "name: x\nmachine: ampere-altra-80c\n"
        "kernel: {base: linux-6.4-yuzhao-v2, set: {ageing_lock: read}}\n"
        "guests:\n  vm0: {memory: 4 MiB, access: {pattern: populate}}\n"
    )
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(
        InputError, match=r"x\.yaml:3:\d+: kernel\.set\.ageing_lock: ageing_call bitmap does"
    ):
        load(str(path))
