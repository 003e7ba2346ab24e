"""Do the rules hold in whole worlds, after every event, whatever is combined with whatever?"""

from __future__ import annotations

from hypothesis import Phase, given, settings
from worlds import after_every_event, journal, world

from invariants import drawn, rules
from simkvm.scenario.schema import Scenario


@settings(max_examples=150, phases=[Phase.generate])
@given(drawn.scenarios(teardown=False))
def test_every_rule_holds_after_every_event(spec: Scenario) -> None:
    with journal() as notes:
        made = world(spec)
        (kvm,) = made.kvms

        def check() -> None:
            rules.counts_are_entries(kvm.stage2)
            rules.tree_hangs_together(kvm.stage2)
            rules.nothing_maps_what_the_host_took(kvm)
            rules.open_ranges_stay_empty(kvm, notes)
            rules.tables_are_conserved(kvm, made.rcu)
            rules.host_counts_its_entries(kvm)
            rules.notifier_counts(kvm, notes)
            rules.generations_hold(kvm)

        after_every_event(made, check)
        record = made.run()
    rows = notes.rows()
    rules.writers_exclude_all(rows)
    rules.the_line_is_fifo(rows)
    rules.waiting_writers_shut_the_door(rows)
    rules.ranges_take_the_lock_twice(kvm, rows)
    rules.ageing_locks_as_its_kernel_says(kvm, rows)
    rules.every_table_lives_once(notes)
    rules.children_go_first(notes, kvm.entries)
    periods = made.recorder.grace_periods
    rules.grace_periods_follow_one_another(periods)
    rules.frees_wait_for_a_grace_period(notes, periods)
    assert rules.offences(notes) == {}
    assert record.violations == []
