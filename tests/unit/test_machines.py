"""Are the shipped machines complete and consistent, and are wrong ones refused with a place?"""

import math
import pickle

import pytest

from simkvm.scenario import shipped
from simkvm.scenario.errors import InputError
from simkvm.scenario.machine import (
    BASES,
    UNITS,
    Machine,
    check_same_parameters,
    load_machine,
    machine_names,
    parse_machine,
    shipped_machines,
)

ALTRA = "ampere-altra-80c"
GRAVITON = "graviton3-64c"
ICELAKE = "x86-icelake-64c"
NAMES = (ALTRA, GRAVITON, ICELAKE)

NOT_ON_ARM = {
    "dram_remote_ns",
    "c2c_remote_ns",
    "remote_flush_base_ns",
    "remote_flush_per_cpu_ns",
}
NOT_ON_X86 = {
    "tlbi_s1_page_dsb_ns",
    "tlbi_s2_page_ns",
    "tlbi_extra_op_ns",
    "tlbi_vmid_all_ns",
    "tlbi_global_service_ns",
    "unmap_s2_4k_flush_ns",
}


def content(name: str = ALTRA) -> str:
    return shipped.text("machines", name)


def changed(old: str, new: str, name: str = ALTRA) -> str:
    text = content(name)
    assert old in text
    return text.replace(old, new, 1)


def rejected(text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        parse_machine(text, "bad.toml")
    assert caught.value.file == "bad.toml"
    return caught.value


def refused(ref: object) -> InputError:
    with pytest.raises(InputError) as caught:
        load_machine(ref)  # type: ignore[arg-type]
    return caught.value


def setting(**changes: object) -> dict[str, object]:
    return {"base": ALTRA, "set": changes}


class TestShipped:
    def test_the_machines_and_their_shape(self) -> None:
        assert machine_names() == list(NAMES)
        shapes = {
            name: (m.arch, m.cores, m.nodes, m.ghz, m.hw_af, m.tlbirange, m.fwb)
            for name in NAMES
            for m in [load_machine(name)]
        }
        assert shapes == {
            ALTRA: ("arm64", 80, 1, 3.0, True, False, False),
            GRAVITON: ("arm64", 64, 1, 2.6, True, True, True),
            ICELAKE: ("x86", 64, 2, 2.9, True, False, False),
        }

    @pytest.mark.parametrize("name", NAMES)
    def test_every_number_has_a_range_a_unit_a_basis_and_a_source(self, name: str) -> None:
        machine = load_machine(name)
        assert len(machine.parameters) > 80
        for key, parameter in machine.parameters.items():
            assert parameter.name == key
            assert 0 <= parameter.low <= parameter.value <= parameter.high < math.inf, key
            assert parameter.basis in BASES, key
            assert any(key.endswith(s) and parameter.unit == u for s, u in UNITS.items()), key
            assert len(parameter.source) > 10, key

    @pytest.mark.parametrize("name", NAMES)
    def test_the_source_fits_the_basis(self, name: str) -> None:
        for parameter in load_machine(name).parameters.values():
            read, source = parameter.basis == "V", parameter.source
            assert not read or source.startswith("http"), parameter.name
            estimated = source.startswith(("estimate", "derived: "))
            assert parameter.basis != "E" or estimated, parameter.name
            assert parameter.basis != "D" or source.startswith("derived"), parameter.name

    def test_only_the_stated_parameters_differ_between_machines(self) -> None:
        altra, graviton, icelake = (load_machine(name) for name in NAMES)
        assert set(altra.not_applicable) == set(graviton.not_applicable) == NOT_ON_ARM
        assert set(icelake.not_applicable) == NOT_ON_X86
        assert set(altra.parameters) == set(graviton.parameters)
        assert set(altra.parameters) - NOT_ON_X86 == set(icelake.parameters) - NOT_ON_ARM

    @pytest.mark.parametrize(
        ("key", "values"),
        [
            ("l1_ns", (1.34, 1.5, 1.4)),
            ("dram_local_ns", (108, 115, 92)),
            ("dram_bw_total_bytes_per_s", (165e9, 260e9, 320e9)),
            ("atomic_contended_service_ns", (50, 45, 77)),
            ("lock_handoff_ns", (100, 90, 100)),
            ("hw_af_update_ns", (30, 25, 60)),
            ("exit_roundtrip_ns", (306, 300, 600)),
            ("s2_fault2m_total_ns", (85_000, 60_000, 200_000)),
            ("zero_2m_ns", (45_000, 40_000, 177_000)),
            ("dcache_clean_4k_ns", (80, 0, 0)),
            ("unmap_s2_4k_noflush_ns", (520, 450, 120)),
            ("pte_scan_young_ns", (62, 56, 56)),
            ("context_switch_ns", (1600, 1400, 1400)),
            ("nvme_in_mean_ns", (90_000, 90_000, 90_000)),
        ],
    )
    def test_values_in_their_units(self, key: str, values: tuple[float, ...]) -> None:
        assert tuple(load_machine(name)[key] for name in NAMES) == values

    @pytest.mark.parametrize("name", NAMES)
    def test_derived_numbers_follow_from_those_they_name(self, name: str) -> None:
        m = load_machine(name)
        lock_traffic = m["lock_handoff_ns"] + 2 * m["atomic_contended_service_ns"]
        assert m["fault_hold_ns"] == m["mmu_lock_write_fault_service_ns"] - lock_traffic
        if m.arch == "x86":
            assert m["age_walk_ns"] == pytest.approx(3 * m["l2_ns"] + m["l1_ns"])
        assert m["stage2_cmpxchg_ns"] == m["atomic_uncontended_ns"]
        assert m["stage2_leaf_visit_ns"] == m["pte_scan_old_ns"]
        descend = m.parameters["stage2_descend_ns"]
        memory = (m["l2_ns"], m["llc_ns"], m["dram_local_ns"])
        assert (descend.low, descend.value, descend.high) == memory

    @pytest.mark.parametrize(("name", "per_cycle"), [(ALTRA, 2.5), (GRAVITON, 3)])
    def test_a_call_about_youth_follows_from_its_608_instructions(
        self, name: str, per_cycle: float
    ) -> None:
        """416 are the walk under the lock, 192 the rest, of which SRCU's barriers are no part."""
        m = load_machine(name)
        walk_ns, rest_ns = (count / per_cycle / m.ghz for count in (416, 608 - 416))
        assert m["age_walk_ns"] == pytest.approx(walk_ns, abs=1)
        assert m["notifier_call_ns"] + m["memslot_lookup_ns"] == pytest.approx(rest_ns, abs=1)

    @pytest.mark.parametrize("name", NAMES)
    def test_range_bookkeeping_is_some_120_instructions(self, name: str) -> None:
        machine = load_machine(name)
        assert machine["range_bookkeeping_ns"] == pytest.approx(120 / machine.ghz, abs=5)

    def test_transfers_of_a_line_follow_from_what_readers_of_mmap_lock_were_bound_by(self) -> None:
        """Three visits to the line for a fault on a page that is there, six for one that is not."""
        assert load_machine(ICELAKE)["atomic_contended_service_ns"] == pytest.approx(230 / 3, abs=1)
        altra = load_machine(ALTRA).parameters["atomic_contended_service_ns"]
        assert altra.low == pytest.approx(123 / 3, abs=1)
        assert 133 / 3 < altra.value < 343 / 6 < altra.high
        graviton = load_machine(GRAVITON)["atomic_contended_service_ns"]
        ratio = load_machine(GRAVITON)["c2c_same_ns"] / load_machine(ALTRA)["c2c_same_ns"]
        assert graviton == pytest.approx(altra.value * ratio, abs=5)

    def test_the_table_has_a_row_for_each_parameter(self) -> None:
        machine = load_machine(ALTRA)
        rows = {row["name"]: row for row in machine.table()}
        assert set(rows) == set(machine.parameters)
        row = rows["lock_handoff_ns"]
        assert list(row) == ["name", "value", "low", "high", "unit", "basis", "source", "note"]
        assert (row["value"], row["low"], row["high"]) == (100, 60, 200)

    def test_a_machine_travels_to_a_worker(self) -> None:
        machine = load_machine(setting(lock_handoff_ns=60))
        assert pickle.loads(pickle.dumps(machine)) == machine


class TestMissing:
    def test_a_parameter_without_meaning_here_gives_the_reason(self) -> None:
        with pytest.raises(InputError) as caught:
            load_machine(ICELAKE)["tlbi_vmid_all_ns"]
        message = caught.value.message
        assert "tlbi_vmid_all_ns" in message
        assert ICELAKE in message
        assert "remote_flush_base_ns" in message

    def test_an_unknown_parameter_names_machine_and_nearest(self) -> None:
        with pytest.raises(InputError) as caught:
            load_machine(ALTRA)["lock_handof_ns"]
        assert ALTRA in caught.value.message
        assert caught.value.hint == "lock_handoff_ns"

    def test_in_tells_what_a_machine_has(self) -> None:
        assert "dram_remote_ns" in load_machine(ICELAKE)
        assert "dram_remote_ns" not in load_machine(ALTRA)


class TestOverrides:
    def test_a_number_and_a_duration(self) -> None:
        machine = load_machine(setting(lock_handoff_ns="1.5 us", l2_ns=6.5))
        assert machine["lock_handoff_ns"] == 1500
        assert machine["l2_ns"] == 6.5
        assert machine.overrides == {"lock_handoff_ns": 1500, "l2_ns": 6.5}

    def test_outside_the_range_is_allowed_and_marked(self) -> None:
        parameter = load_machine(setting(lock_handoff_ns=5000)).parameters["lock_handoff_ns"]
        assert (parameter.value, parameter.low, parameter.high) == (5000, 60, 200)
        assert parameter.basis == "E"
        assert "set by the scenario" in parameter.source
        assert "100" in parameter.source

    def test_a_cost_can_be_switched_off(self) -> None:
        assert load_machine(setting(lock_handoff_ns=0))["lock_handoff_ns"] == 0

    def test_shape_and_flags(self) -> None:
        machine = load_machine(setting(cores=8, ghz=2, tlbirange=True, fwb=True, hw_af=False))
        assert (machine.cores, machine.ghz) == (8, 2.0)
        assert (machine.tlbirange, machine.fwb, machine.hw_af) == (True, True, False)
        assert machine.overrides == {
            "cores": 8,
            "ghz": 2.0,
            "tlbirange": True,
            "fwb": True,
            "hw_af": False,
        }

    def test_nothing_set_is_the_machine_itself(self) -> None:
        plain = load_machine(ALTRA)
        assert load_machine({"base": ALTRA}) == load_machine({"base": ALTRA, "set": {}}) == plain
        assert plain.overrides == {}

    def test_one_load_does_not_change_the_next(self) -> None:
        first = load_machine(setting(lock_handoff_ns=1))
        first.parameters.clear()
        load_machine(ALTRA).parameters.pop("l2_ns")
        assert load_machine(ALTRA)["lock_handoff_ns"] == 100
        assert load_machine(ALTRA)["l2_ns"] == 5.0

    def test_unknown_names_have_the_nearest(self) -> None:
        assert refused("graviton3-64").hint == GRAVITON
        assert refused("graviton3-64").key == "machine"
        assert refused({"base": "graviton3-64"}).key == "machine.base"
        error = refused(setting(lock_handof_ns=60))
        assert (error.key, error.hint) == ("machine.set.lock_handof_ns", "lock_handoff_ns")
        assert refused(setting(tlbi_range=True)).hint == "tlbirange"
        assert refused({"base": ALTRA, "sets": {}}).hint == "set"

    def test_a_name_like_no_other_lists_the_names(self) -> None:
        error = refused("zx81")
        assert error.hint is None
        assert all(name in error.message for name in NAMES)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("lock_handoff_ns", -1),
            ("lock_handoff_ns", math.nan),
            ("lock_handoff_ns", math.inf),
            ("lock_handoff_ns", 10**400),
            ("lock_handoff_ns", True),
            ("lock_handoff_ns", None),
            ("lock_handoff_ns", [60]),
            ("lock_handoff_ns", "60"),
            ("lock_handoff_ns", "60 parsecs"),
            ("lock_handoff_ns", "0.5 ns"),
            ("dram_bw_total_bytes_per_s", 0),
            ("dram_bw_total_bytes_per_s", "60 ns"),
            ("dram_saturated_ratio", 0),
            ("tlb_l2_entries", 12.5),
            ("tlb_l2_entries", 0),
            ("dram_remote_ns", 200),
            ("cores", 0),
            ("cores", 2.5),
            ("cores", True),
            ("ghz", 0),
            ("ghz", "fast"),
            ("hw_af", 1),
            ("tlbirange", "yes"),
            ("name", "mine"),
            ("nodes", 0),
            ("nodes", 1.5),
            ("nodes", 81),
        ],
    )
    def test_impossible_values_are_refused_with_their_key(self, name: str, value: object) -> None:
        assert refused(setting(**{name: value})).key == f"machine.set.{name}"

    def test_a_second_node_brings_the_costs_between_nodes(self) -> None:
        changes = {"c2c_remote_ns": 350, "cores": 160, "nodes": 2.0}  # files sort them like this
        machine = load_machine({"base": ALTRA, "set": changes})
        assert (machine.cores, machine.nodes, machine["c2c_remote_ns"]) == (160, 2, 350)
        assert machine.parameters["c2c_remote_ns"].basis == "E"
        assert "one socket" in machine.parameters["c2c_remote_ns"].source
        assert "c2c_remote_ns" not in machine.not_applicable
        assert "dram_remote_ns" in machine.not_applicable
        assert "c2c_remote_ns" in load_machine(ALTRA).not_applicable, "the shipped one is as it was"

    def test_a_cost_between_nodes_is_refused_where_there_is_one(self) -> None:
        assert "one socket" in refused(setting(c2c_remote_ns=350)).message

    def test_arm64_features_are_refused_on_x86(self) -> None:
        error = refused({"base": ICELAKE, "set": {"tlbirange": True}})
        assert error.key == "machine.set.tlbirange"
        assert "arm64" in error.message

    @pytest.mark.parametrize("ref", [3, None, ["x"], {"set": {}}, {"base": ALTRA, "set": [1]}])
    def test_wrong_shapes_are_refused(self, ref: object) -> None:
        assert str(refused(ref).key).startswith("machine")


class TestBadFiles:
    def test_a_syntax_error_has_a_line(self) -> None:
        error = rejected("name = 'x'\ntitle = \n")
        assert error.line == 2
        assert error.column is not None

    @pytest.mark.parametrize(
        ("old", "new", "key"),
        [
            ("value = 100\n", "value = 300\n", "parameters.lock_handoff_ns.value"),
            ("value = 100\n", "value = nan\n", "parameters.lock_handoff_ns.value"),
            ("value = 100\n", "value = '100'\n", "parameters.lock_handoff_ns.value"),
            ("value = 100\n", "value = true\n", "parameters.lock_handoff_ns.value"),
            ("value = 100\n", "", "parameters.lock_handoff_ns.value"),
            ("low = 1.3\n", "low = -1\n", "parameters.l1_ns.low"),
            ("high = 1.6\n", "high = inf\n", "parameters.l1_ns.value"),
            ('basis = "V"', 'basis = "X"', "parameters.l1_ns.basis"),
            ('unit = "ns"', 'unit = "us"', "parameters.l1_ns.unit"),
            ("[parameters.l1_ns]", "[parameters.l1_us]", "parameters.l1_us.unit"),
            ('unit = "ns"', 'unit = "ns"\ncolour = "red"', "parameters.l1_ns.colour"),
            ('arch = "arm64"', 'arch = "riscv"', "arch"),
            ("cores = 80", "cores = 0", "cores"),
            ("cores = 80", "cores = 80.0", "cores"),
            ("nodes = 1", "nodes = 81", "nodes"),
            ("fwb = false", "", "fwb"),
            ("ghz = 3.0", "ghz = 3.0\nwatts = 210", "watts"),
            ('hw_af = "V', 'hw_aff = "V', "sources.hw_af"),
        ],
    )
    def test_a_wrong_key_is_named(self, old: str, new: str, key: str) -> None:
        assert rejected(changed(old, new)).key == key

    def test_an_empty_source_is_refused(self) -> None:
        lines = content().splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("source ="))
        lines[first] = 'source = " "'
        assert rejected("\n".join(lines)).key == "parameters.l1_ns.source"


class TestSameParameters:
    def machines(self, altra: str) -> dict[str, Machine]:
        texts = {"a.toml": altra, "g.toml": content(GRAVITON), "x.toml": content(ICELAKE)}
        return {file: parse_machine(text, file) for file, text in texts.items()}

    def refusal(self, altra: str) -> InputError:
        with pytest.raises(InputError) as caught:
            check_same_parameters(self.machines(altra))
        return caught.value

    def test_a_parameter_that_one_machine_lacks(self) -> None:
        head, tail = content().split("[parameters.l2_ns]")
        without = head + tail[tail.index("[parameters.") :]
        error = self.refusal(without)
        assert (error.file, error.key) == ("a.toml", "parameters.l2_ns")

    def test_a_parameter_that_only_one_machine_has(self) -> None:
        tail = content().split("[parameters.l2_ns]")[1]
        extra = "\n[parameters.l9_ns]" + tail[: tail.index("[parameters.")]
        error = self.refusal(content() + extra)
        assert (error.file, error.key) == ("g.toml", "parameters.l9_ns")

    @pytest.mark.parametrize(
        ("old", "new", "key"),
        [
            ("[parameters.l2_ns]", "[parameters.l9_ns]", "parameters.l2_ns"),
            (f'name = "{ALTRA}"', 'name = "altra"', "name"),
        ],
    )
    def test_shipped_files_are_checked_together_as_they_load(
        self, monkeypatch: pytest.MonkeyPatch, old: str, new: str, key: str
    ) -> None:
        texts = {ALTRA: changed(old, new), GRAVITON: content(GRAVITON), ICELAKE: content(ICELAKE)}
        monkeypatch.setattr(shipped, "text", lambda _folder, name: texts[name])
        with pytest.raises(InputError) as caught:
            shipped_machines.__wrapped__()
        assert (caught.value.file, caught.value.key) == (f"machines/{ALTRA}.toml", key)

    def test_a_reason_for_a_parameter_that_is_there(self) -> None:
        error = self.refusal(changed("[not_applicable]", '[not_applicable]\nl2_ns = "no cache"'))
        assert (error.file, error.key) == ("a.toml", "not_applicable.l2_ns")

    def test_a_reason_for_a_parameter_that_nobody_has(self) -> None:
        error = self.refusal(changed("[not_applicable]", '[not_applicable]\nl9_ns = "no cache"'))
        assert (error.file, error.key) == ("a.toml", "not_applicable.l9_ns")


def test_cores_of_a_scenario_file_come_as_floats() -> None:
    machine = load_machine({"base": "ampere-altra-80c", "set": {"cores": 32.0}})
    assert machine.cores == 32
    assert isinstance(machine.cores, int)
    with pytest.raises(InputError):
        load_machine({"base": "ampere-altra-80c", "set": {"cores": 32.5}})
