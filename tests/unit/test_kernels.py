"""Does each kernel variant have the policies of its kernel, and are wrong ones refused?"""

import pickle

import pytest

from simkvm.scenario import shipped
from simkvm.scenario.errors import InputError
from simkvm.scenario.kernel import (
    POLICIES,
    diff,
    kernel_names,
    load_kernel,
    parse_kernel,
    safety_reasons,
)

# Policies in columns, in the order of POLICIES. A change here is a change of what is simulated.
PINNED = {
    "linux-6.1": (
        "write inline call_rcu blind write clear_flush_young per_leaf build in_release "
        "single stage2 write read any free chunk inline on_fault none broadcast write "
        "write none srcu direct broadcast vmid"
    ),
    "linux-6.12": (
        "read inline call_rcu per_pte write look_around deferred runtime in_release "
        "single stage2 read read any free chunk subtree on_fault none broadcast write "
        "write chunked srcu direct local range"
    ),
    "linux-6.12-x86": (
        "read put_page_rcu call_rcu per_pte write look_around deferred runtime zap_rcu "
        "zap_roots tdp none none range keep entry per_table zap none ipi read write "
        "chunked mmu_lock direct local vmid"
    ),
    "linux-6.12-x86-shadow": (
        "write inline call_rcu per_pte write look_around deferred runtime zap_rcu "
        "zap_roots shadow none none range keep entry inline zap none ipi write write "
        "chunked mmu_lock direct local vmid"
    ),
    "linux-6.15-x86": (
        "read put_page_rcu call_rcu per_pte none look_around deferred runtime zap_rcu "
        "zap_roots tdp none none range keep entry per_table recover none ipi read write "
        "chunked mmu_lock direct local vmid"
    ),
    "linux-6.15-x86-shadow": (
        "write inline call_rcu per_pte rmap_bit look_around deferred runtime zap_rcu "
        "zap_roots shadow none none range keep entry inline recover none ipi write write "
        "chunked mmu_lock direct local vmid"
    ),
    "linux-6.17-chunked-destroy": (
        "read inline call_rcu per_pte write look_around deferred runtime in_release "
        "chunked_early stage2 read read any free chunk subtree on_fault none broadcast "
        "write write chunked srcu direct local range"
    ),
    "linux-6.3": (
        "read inline call_rcu blind write clear_flush_young per_leaf build in_release "
        "single stage2 read read any free chunk subtree_leak on_fault none broadcast "
        "write write none srcu direct broadcast vmid"
    ),
    "linux-6.4": (
        "read inline call_rcu blind write clear_flush_young per_leaf build in_release "
        "single stage2 read read any free chunk subtree on_fault none broadcast write "
        "write none srcu direct broadcast vmid"
    ),
    "linux-6.4-upton": (
        "read free_removed_table call_rcu bitmap none look_around per_leaf build "
        "after_unregister single stage2 read read any free chunk subtree on_fault none "
        "broadcast write write none srcu direct broadcast vmid"
    ),
    "linux-6.4-upton-count-test": (
        "read free_removed_table_count_test call_rcu bitmap none look_around per_leaf "
        "build after_unregister single stage2 read read any free chunk subtree on_fault "
        "none broadcast write write none srcu direct broadcast vmid"
    ),
    "linux-6.4-yuzhao-v1": (
        "read put_page_rcu call_rcu bitmap none look_around per_leaf build "
        "after_unregister single stage2 read read any free chunk subtree on_fault none "
        "broadcast write write none srcu direct broadcast vmid"
    ),
    "linux-6.4-yuzhao-v1-baseline": (
        "read inline call_rcu per_pte write clear_flush_young per_leaf build in_release "
        "single stage2 read read any free chunk subtree on_fault per_call broadcast write "
        "write none srcu direct broadcast vmid"
    ),
    "linux-6.4-yuzhao-v2": (
        "read put_page_rcu call_rcu bitmap none look_around per_leaf build "
        "after_unregister single stage2 read read any free chunk subtree on_fault none "
        "broadcast write write none srcu direct broadcast vmid"
    ),
    "linux-7.1": (
        "read inline call_rcu per_folio write look_around deferred runtime in_release "
        "chunked stage2 read read any free chunk subtree on_fault none broadcast write "
        "write chunked srcu two_step local range"
    ),
    "linux-7.1-lockless": (
        "read put_page_rcu call_rcu per_folio none look_around deferred runtime "
        "after_unregister chunked stage2 read read any free chunk subtree on_fault none "
        "broadcast write write chunked srcu two_step local range"
    ),
    "linux-7.1-read-locked": (
        "read inline call_rcu per_folio read look_around deferred runtime in_release "
        "chunked stage2 read read any free chunk subtree on_fault none broadcast write "
        "write chunked srcu two_step local range"
    ),
}
RELEASED = {
    *("linux-6.1", "linux-6.3", "linux-6.4", "linux-6.12", "linux-7.1"),
    *("linux-6.12-x86", "linux-6.12-x86-shadow", "linux-6.15-x86", "linux-6.15-x86-shadow"),
}


def refused(ref: object) -> InputError:
    with pytest.raises(InputError) as caught:
        load_kernel(ref)  # type: ignore[arg-type]
    return caught.value


def setting(**changes: object) -> dict[str, object]:
    return {"base": "linux-6.12", "set": changes}


class TestShipped:
    def test_the_variants(self) -> None:
        assert kernel_names() == sorted(PINNED)

    @pytest.mark.parametrize("name", PINNED)
    def test_policies(self, name: str) -> None:
        kernel = load_kernel(name)
        assert dict(zip(POLICIES, PINNED[name].split(), strict=True)) == {
            policy: kernel[policy] for policy in POLICIES
        }
        assert kernel.arch == ("x86" if "x86" in name else "arm64")
        assert kernel.overrides == {}

    @pytest.mark.parametrize("name", PINNED)
    def test_every_policy_cites_a_file_and_version_or_a_message(self, name: str) -> None:
        for policy in load_kernel(name).policies.values():
            versioned = ".c, " in policy.source or ".h, " in policy.source
            assert (versioned and ", v" in policy.source) or "@" in policy.source

    def test_kernels_that_nobody_released_are_marked_and_say_what_they_are(self) -> None:
        for name in PINNED:
            kernel = load_kernel(name)
            assert kernel.counterfactual == (name not in RELEASED)
            assert kernel.note

    def test_the_table_has_a_row_for_each_policy(self) -> None:
        rows = load_kernel("linux-6.12").table()
        assert [row["policy"] for row in rows] == list(POLICIES)
        assert rows[1]["value"] == "inline"
        assert all(row["meaning"] and row["source"] for row in rows)

    def test_a_variant_travels_to_a_worker(self) -> None:
        kernel = load_kernel(setting(ageing_lock="none"))
        assert pickle.loads(pickle.dumps(kernel)) == kernel


class TestDiff:
    def rows(self, a: str, b: str) -> dict[str, tuple[str, str]]:
        return {r["policy"]: (r["a"], r["b"]) for r in diff(load_kernel(a), load_kernel(b))}

    def test_the_two_free_policies_of_2023_differ_in_one_line(self) -> None:
        assert self.rows("linux-6.4-yuzhao-v2", "linux-6.4-upton") == {
            "table_free": ("put_page_rcu", "free_removed_table")
        }

    def test_lockless_needs_three_changes(self) -> None:
        assert self.rows("linux-7.1", "linux-7.1-lockless") == {
            "table_free": ("inline", "put_page_rcu"),
            "ageing_lock": ("write", "none"),
            "root_free": ("in_release", "after_unregister"),
        }

    def test_a_variant_does_not_differ_from_itself(self) -> None:
        assert self.rows("linux-7.1", "linux-7.1") == {}


class TestSafety:
    def test_no_shipped_variant_is_known_to_be_unsafe(self) -> None:
        assert [name for name in PINNED if safety_reasons(load_kernel(name))] == []

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"ageing_lock": "none"}, ["table_free inline", "root_free in_release"]),
            (
                {"ageing_lock": "none", "root_free": "after_unregister"},
                ["table_free inline"],
            ),
            (
                {"ageing_lock": "none", "table_free": "free_removed_table"},
                ["root_free in_release"],
            ),
            (
                {
                    "ageing_lock": "none",
                    "table_free": "put_page_rcu",
                    "root_free": "after_unregister",
                },
                [],
            ),
            ({"ageing_lock": "read"}, []),
        ],
    )
    def test_lock_free_ageing_needs_both_frees_to_wait(
        self, changes: dict[str, str], named: list[str]
    ) -> None:
        reasons = safety_reasons(load_kernel(setting(**changes)))
        assert len(reasons) == len(named)
        for reason, policy in zip(reasons, named, strict=True):
            assert policy in reason


class TestOverrides:
    def test_a_policy_is_replaced_and_recorded(self) -> None:
        kernel = load_kernel(setting(ageing_lock="none"))
        assert kernel["ageing_lock"] == "none"
        assert kernel["table_free"] == "inline"
        assert kernel.overrides == {"ageing_lock": "none"}
        assert kernel.counterfactual
        assert "linux-6.12 has write" in kernel.policies["ageing_lock"].source

    def test_setting_what_is_there_changes_nothing_but_the_record(self) -> None:
        kernel = load_kernel(setting(ageing_lock="write"))
        assert not kernel.counterfactual
        assert diff(kernel, load_kernel("linux-6.12")) == []

    def test_one_load_does_not_change_the_next(self) -> None:
        load_kernel("linux-6.12").policies.clear()
        assert load_kernel("linux-6.12")["table_free"] == "inline"

    def test_unknown_names_have_the_nearest(self) -> None:
        error = refused("linux-6.12z")
        assert (error.key, error.hint) == ("kernel", "linux-6.12")
        error = refused(setting(ageing_lok="none"))
        assert (error.key, error.hint) == ("kernel.set.ageing_lok", "ageing_lock")
        error = refused(setting(table_free="put_page_rcy"))
        assert (error.key, error.hint) == ("kernel.set.table_free", "put_page_rcu")
        assert refused({"base": "linux-6.12", "sets": {}}).hint == "set"

    def test_a_yaml_null_where_none_was_meant(self) -> None:
        error = refused(setting(ageing_lock=None))
        assert (error.key, error.hint) == ("kernel.set.ageing_lock", "none")

    def test_a_value_like_no_other_lists_the_values(self) -> None:
        error = refused(setting(ageing_lock="xyz"))
        assert error.hint is None
        assert all(value in str(error) for value in POLICIES["ageing_lock"])

    @pytest.mark.parametrize("ref", [6.12, None, ["linux-6.12"], {"base": 6.12}, {"set": {}}])
    def test_wrong_shapes_are_refused(self, ref: object) -> None:
        assert str(refused(ref).key).startswith("kernel")

    def test_an_unknown_policy_is_refused_when_asked_for(self) -> None:
        with pytest.raises(InputError) as caught:
            load_kernel("linux-6.12")["table_fre"]
        assert "linux-6.12" in caught.value.message
        assert caught.value.hint == "table_free"


class TestBadFiles:
    @pytest.mark.parametrize(
        ("old", "new", "key"),
        [
            ('value = "inline"', 'value = "outline"', "policies.table_free.value"),
            ('value = "inline"', "value = 1", "policies.table_free.value"),
            ("[policies.table_free]", "[policies.table_fre]", "policies.table_free"),
            ('value = "inline"', 'value = "inline"\nwhy = "x"', "policies.table_free.why"),
            ('arch = "arm64"', 'arch = "arm"', "arch"),
            ("counterfactual = false", 'counterfactual = "no"', "counterfactual"),
            (
                "[policies.root_free]",
                "[policies.leaf_free]\n[policies.root_free]",
                "policies.leaf_free",
            ),
            ("title =", "subtitle =", "title"),
        ],
    )
    def test_a_wrong_key_is_named(self, old: str, new: str, key: str) -> None:
        text = shipped.text("kernels", "linux-6.12")
        assert old in text
        with pytest.raises(InputError) as caught:
            parse_kernel(text.replace(old, new, 1), "bad.toml")
        assert (caught.value.file, caught.value.key) == ("bad.toml", key)

    def test_a_syntax_error_has_a_line(self) -> None:
        with pytest.raises(InputError) as caught:
            parse_kernel("name = 'x'\n[policies\n", "bad.toml")
        assert caught.value.line == 2
