#!/bin/bash
# Durations of KVM's stage-2 functions, each traced on its own: function_graph text for
# `simkvm calibrate`. As root, on the host, with CONFIG_FUNCTION_GRAPH_TRACER and
# CONFIG_DYNAMIC_FTRACE (distributions' kernels have both).
#
#   measure-stage2-ftrace.sh [-o DIR] [-b KIB] [-f FUNCTION]... PHASE COMMAND...
#
# PHASE says what the host does while COMMAND runs (see README.md); COMMAND runs once for each
# function. It writes DIR/PHASE-FUNCTION.trace.gz, with PHASE marked in the trace.
set -eu

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
}

out=.
buffer_kib=16384
functions=()
while getopts o:b:f:h option; do
    case $option in
        o) out=$OPTARG ;;
        b) buffer_kib=$OPTARG ;;
        f) functions+=("$OPTARG") ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 2 ] || usage
phase=$1
shift

# What is of use in each phase; x86 has other names for some, and a function that the running kernel
# has inlined is left out. The last line stands for the tracer itself: they do next to nothing.
case $phase in
    fault_*) wanted=(kvm_handle_guest_abort kvm_pgtable_stage2_map handle_ept_violation
        npf_interception kvm_tdp_mmu_map find_vma) ;;
    age_page) wanted=(kvm_age_gfn kvm_mmu_notifier_clear_young __mmu_notifier_clear_young) ;;
    unmap_page | unmap_table) wanted=(kvm_unmap_gfn_range kvm_mmu_notifier_invalidate_range_end
        __kvm_tlb_flush_vmid_ipa __kvm_tlb_flush_vmid call_rcu free_frozen_pages
        free_unref_page) ;;
    *)
        echo "$0: no phase $phase; they are fault_present, fault_alloc, fault_huge," \
            "fault_permission, fault_access, age_page, unmap_page, unmap_table" >&2
        exit 2
        ;;
esac
tracer=(kvm_s2_put_page __srcu_read_lock __srcu_read_unlock)
[ ${#functions[@]} -gt 0 ] || functions=("${wanted[@]}" "${tracer[@]}")

tracing=${TRACEFS:-/sys/kernel/tracing}
[ -d "$tracing/events" ] || tracing=/sys/kernel/debug/tracing
if [ ! -w "$tracing/current_tracer" ]; then
    echo "$0: cannot write $tracing/current_tracer: run it as root, with tracefs mounted" >&2
    exit 1
fi
if [ "$(cat "$tracing/current_tracer")" != nop ]; then
    echo "$0: somebody else traces ($(cat "$tracing/current_tracer")); stop that first" >&2
    exit 1
fi

kept_kib=$(sed 's/ .*//' "$tracing/buffer_size_kb")
kept_clock=$(sed 's/.*\[\(.*\)\].*/\1/' "$tracing/trace_clock")
restore() {
    echo 0 > "$tracing/tracing_on"
    echo nop > "$tracing/current_tracer"
    : > "$tracing/set_ftrace_filter"
    echo > "$tracing/trace"
    echo "$kept_kib" > "$tracing/buffer_size_kb"
    echo "$kept_clock" > "$tracing/trace_clock"
    echo 1 > "$tracing/tracing_on"
}
trap restore EXIT
mkdir -p "$out"
echo "$buffer_kib" > "$tracing/buffer_size_kb" # a CPU

for function in "${functions[@]}"; do
    if ! grep -qE "^$function( |\$)" "$tracing/available_filter_functions"; then
        continue
    fi
    echo 0 > "$tracing/tracing_on"
    echo nop > "$tracing/current_tracer"
    echo > "$tracing/trace"
    echo mono > "$tracing/trace_clock"
    echo "$function" > "$tracing/set_ftrace_filter"
    echo function_graph > "$tracing/current_tracer"
    for option in funcgraph-abstime funcgraph-proc; do
        echo 1 > "$tracing/options/$option"
    done
    echo 0 > "$tracing/options/funcgraph-irqs"
    echo 1 > "$tracing/tracing_on"
    echo "simkvm begin $phase" > "$tracing/trace_marker"
    "$@" || echo "$0: $1 ended with status $?" >&2
    echo "simkvm end" > "$tracing/trace_marker"
    echo 0 > "$tracing/tracing_on"
    lost=$(cat "$tracing"/per_cpu/cpu*/stats | awk '/^overrun/ { n += $2 } END { print n + 0 }')
    [ "$lost" = 0 ] || echo "$0: $function: $lost events overwritten, enlarge the buffer: -b" >&2
    gzip -9 < "$tracing/trace" > "$out/$phase-$function.trace.gz"
    echo "$out/$phase-$function.trace.gz"
done
