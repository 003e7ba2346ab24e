"""Groups of guests: who they are, what they share, and what is done to them in turn."""

from __future__ import annotations

from typing import Any

import pytest
import worlds
from lab import scenario, world

from simkvm.scenario.errors import InputError
from simkvm.scenario.groups import every_guest, meant, member_names
from simkvm.scenario.load import require_possible
from simkvm.units import MIB

MS = 1_000_000
SMALL = {"memory": MIB, "access": {"pattern": "populate"}}


def many(count: int, **keys: Any) -> dict[str, Any]:
    return {"vm": {**SMALL, "count": count, **keys}}


# -- names ------------------------------------------------------------------------------------


def test_one_keeps_its_name_and_many_are_numbered_so_that_they_sort() -> None:
    assert member_names("vm", 1) == ["vm"]
    assert member_names("vm", 3) == ["vm0", "vm1", "vm2"]
    twelve = member_names("vm", 12)
    assert (twelve[0], twelve[-1]) == ("vm00", "vm11")
    assert twelve == sorted(twelve)


def test_a_group_is_meant_by_its_name_and_one_of_it_by_its_own() -> None:
    spec = scenario(guests={**many(12), "db": SMALL})
    assert list(every_guest(spec))[:2] == ["db", "vm00"]
    assert meant(spec, "vm") == member_names("vm", 12)
    assert meant(spec, "vm07") == ["vm07"]
    assert meant(spec, "db") == ["db"]
    assert meant(spec, "vm7") == []


def refusal(**keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        require_possible(scenario(**keys))
    return str(caught.value)


def test_what_is_wrong_with_groups_is_said_with_its_key() -> None:
    assert "vm1 is also the name of a guest of vm" in refusal(guests={**many(2), "vm1": SMALL})
    drop = {"kind": "madvise_dontneed", "guest": "vm1", "range": 4096, "rate": 1.0}
    assert "did you mean 'vm01'" in refusal(guests=many(12), contenders={"c": drop})
    crowd = refusal(guests=many(65))
    assert "guests.vm.count" in crowd
    assert "65 vCPUs need 65 CPUs, the host has 64" in crowd
    slots = refusal(guests=many(1, memslots=3))
    assert "guests.vm.memslots" in slots
    assert "1 MiB cannot be cut into 3 slots" in slots
    two_nodes = {"base": "ampere-altra-80c", "set": {"nodes": 2}}
    assert "need a c2c_remote_ns" in refusal(guests=many(1), machine=two_nodes)


# -- each by itself -----------------------------------------------------------------------------


def test_guests_of_a_group_share_nothing_but_the_host() -> None:
    made = world(guests=many(3, vcpus=2))
    assert [kvm.name for kvm in made.kvms] == ["vm0", "vm1", "vm2"]
    for thing in ("mmu_lock", "stage2", "memslots", "host", "notifier", "oracle"):
        assert len({id(getattr(kvm, thing)) for kvm in made.kvms}) == 3
    assert [vcpu.cpu.id for kvm in made.kvms for vcpu in kvm.vcpus] == [*range(6)]


def test_a_guest_draws_by_its_own_name() -> None:
    """So one more guest shifts nobody's accesses, and a guest is what it is without a group."""
    zipf = {"access": {"pattern": "zipf", "think": 500}}
    keys: dict[str, Any] = {"duration": MS, "kernel": "linux-6.12"}
    ten = worlds.world(guests=many(10, **zipf), **keys)
    two = worlds.world(guests=many(2, **zipf), **keys)
    alone = worlds.world(guests={"vm1": {**SMALL, **zipf}}, **keys)
    touched = [
        next(made.kvms[number].vcpus[0]._chunks).pages.tolist()
        for made, number in ((ten, 1), (two, 1), (alone, 0))
    ]
    assert touched[0] == touched[1] == touched[2]


# -- memcgs -------------------------------------------------------------------------------------


def aged(passes: int, **keys: Any) -> worlds.World:
    made = world(
        guests=many(3, access={"pattern": "uniform", "think": 10_000}, **keys),
        ageing={"passes": passes, "interval": MS},
        duration=20 * MS,
    )
    made.run()
    return made


def test_each_guest_has_a_memcg_of_its_own_unless_it_names_one() -> None:
    assert len({kvm.host.lru.lruvec for kvm in world(guests=many(3)).kvms}) == 3
    assert len({kvm.host.lru.lruvec for kvm in world(guests=many(3, memcg="pods")).kvms}) == 1


@pytest.mark.parametrize("memcg", [None, "pods"])
def test_a_command_walks_every_mm_and_opens_one_generation_a_memcg(memcg: str | None) -> None:
    """``iterate_mm_list``, then ``inc_max_seq`` once by whoever walked the last mm."""
    made = aged(2, memcg=memcg)
    assert made.ageing is not None
    assert [p.guest for p in made.ageing.passes] == ["vm0", "vm1", "vm2"] * 2
    assert {kvm.host.lru.max_seq for kvm in made.kvms} == {3 + 2}
    assert {kvm.host.lru.min_seq for kvm in made.kvms} == {2}


def test_emptying_the_oldest_generation_moves_the_folios_of_every_guest_of_the_memcg() -> None:
    made = world(guests=many(3, memcg="pods"))
    lruvec = made.kvms[0].host.lru.lruvec
    for number, kvm in enumerate(made.kvms):
        for leaf in range(10 * (number + 1)):
            kvm.host.install(leaf, True)
    assert lruvec.sizes == [0, 0, 0, 60]
    assert [lruvec.inc_max_seq() for _ in range(4)] == [0, 0, 0, 60]
    assert [kvm.host.lru.total for kvm in made.kvms] == [10, 20, 30]
    assert [kvm.host.lru.max_seq for kvm in made.kvms] == [7, 7, 7]


def test_a_memcg_goes_on_ageing_when_the_last_guest_on_its_list_is_gone() -> None:
    made = world(
        guests={
            "a": {**SMALL, "memcg": "pods", "access": {"pattern": "uniform", "think": 500}},
            "b": {
                **SMALL,
                "memcg": "pods",
                "teardown": {"order": "close_vm", "at": MS},
            },
        },
        ageing={"passes": 4, "interval": MS, "start": 2 * MS},
        duration=20 * MS,
    )
    made.run()
    assert made.ageing is not None
    assert [p.guest for p in made.ageing.passes] == ["a"] * 4
    assert made.kvms[0].host.lru.max_seq == 3 + 4


# -- contenders in turn ---------------------------------------------------------------------------


def calls(count: int, until: int = 10 * MS, **keys: Any) -> list[tuple[int, str, int]]:
    """(time, guest, first leaf) of each call of a contender on a group, and who made them."""
    drop = {"kind": "madvise_dontneed", "guest": "vm", "range": 65536, "rate": 1000.0, **keys}
    idle = {"pattern": "uniform", "think": MS}
    made = world(guests=many(count, access=idle), contenders={"c": drop}, duration=until)
    heard: list[tuple[int, str, int]] = []
    for kvm in made.kvms:
        notifier = kvm.notifier

        def listen(
            task: Any,
            t: int,
            first: int,
            *more: Any,
            kvm: Any = kvm,
            on: Any = notifier.invalidate,
            **keys: Any,
        ) -> Any:
            heard.append((t, kvm.name, first))
            return on(task, t, first, *more, **keys)

        notifier.invalidate = listen  # type: ignore[method-assign, assignment]
    made.run()
    assert len({id(contender.task) for contender in made.contenders}) == 1
    return heard


def test_a_contender_on_a_group_serves_its_guests_in_turn_at_the_rate_of_one() -> None:
    heard = calls(4, order="sequential", start=MS)
    assert [guest for _, guest, _ in heard] == ["vm0", "vm1", "vm2", "vm3"] * 2 + ["vm0"]
    assert [t // MS for t, _, _ in heard] == [*range(1, 10)], "1000 / s, however many guests"
    assert [first for _, _, first in heard] == [0] * 4 + [16] * 4 + [32]


def test_one_that_falls_behind_goes_on_with_the_guest_that_has_waited_longest() -> None:
    heard = calls(3, rate=1e6, until=MS)
    assert [guest for _, guest, _ in heard[:9]] == ["vm0", "vm1", "vm2"] * 3
    alone = calls(1, rate=1e6, until=MS)
    assert len(heard) < 1.5 * len(alone), "three guests, but one thread: a call at a time"


def test_one_guest_of_a_group_can_be_worked_on_alone() -> None:
    assert {guest for _, guest, _ in calls(4, guest="vm2")} == {"vm2"}
