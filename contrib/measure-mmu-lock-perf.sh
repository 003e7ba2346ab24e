#!/bin/bash
# Who waits for rwlocks, such as kvm->mmu_lock, and how long: perf lock contention, by call site.
# As root, on the host, with perf 5.19 or later and the lock:contention_* tracepoints (Linux 5.19).
#
#   measure-mmu-lock-perf.sh [-o FILE] COMMAND...
#
# Everything on the host is recorded while COMMAND runs (`sleep 10` if a guest runs anyway).
set -eu

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
}

out=mmu-lock.contention
while getopts o:h option; do
    case $option in
        o) out=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || usage

if [ ! -d /sys/kernel/tracing/events/lock ] && [ ! -d /sys/kernel/debug/tracing/events/lock ]; then
    echo "$0: no lock tracepoints in tracefs: run it as root, on Linux 5.19 or later" >&2
    exit 1
fi

# With BPF (-b) nothing is written for each event, so this is the way that disturbs least. It needs
# perf 6.2 or later, built with BPF skeletons; -x came with 6.6.
if perf lock contention -a -b -Y rwlock -x , --output "$out" -- "$@" 2> "$out.err"; then
    rm -f "$out.err"
else
    rm -f "$out.err"
    data=$(mktemp)
    trap 'rm -f "$data"' EXIT
    perf lock record -a -o "$data" -- "$@"
    perf lock contention -i "$data" > "$out" 2>&1
fi
echo "$out"
