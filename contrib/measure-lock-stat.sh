#!/bin/bash
# Waits and holds of every lock class: /proc/lock_stat over a command. As root, on a host whose
# kernel has CONFIG_LOCK_STAT: a kernel for debugging, on which every lock operation is dearer.
#
#   measure-lock-stat.sh [-o FILE] COMMAND...
#
# kvm->mmu_lock is the class &kvm->mmu_lock, or &(kvm)->mmu_lock; -R and -W are its modes.
set -eu

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
}

out=lock_stat
while getopts o:h option; do
    case $option in
        o) out=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || usage

if [ ! -w /proc/lock_stat ]; then
    echo "$0: cannot write /proc/lock_stat: run it as root, with CONFIG_LOCK_STAT" >&2
    exit 1
fi
echo 0 > /proc/lock_stat # forget what was
echo 1 > /proc/sys/kernel/lock_stat
trap 'echo 0 > /proc/sys/kernel/lock_stat' EXIT
"$@" || echo "$0: $1 ended with status $?" >&2
echo 0 > /proc/sys/kernel/lock_stat
cat /proc/lock_stat > "$out"
echo "$out"
