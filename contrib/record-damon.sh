#!/bin/bash
# How hot which memory of a process is: a DAMON recording for `simkvm import damon`. As root, with
# CONFIG_DAMON, CONFIG_DAMON_VADDR and CONFIG_DAMON_SYSFS, and damo (the DAMON user-space tool).
#
#   record-damon.sh [-o FILE] [-s SECONDS] [-i SAMPLE_US] [-a AGGR_US] PID
#
# PID is a program, or a VMM with a guest in it. FILE is damo's compressed JSON, which
# `simkvm import damon` reads as it is.
set -eu

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
}

out=damon.data
seconds=30
sample_us=5000
aggr_us=100000
while getopts o:s:i:a:h option; do
    case $option in
        o) out=$OPTARG ;;
        s) seconds=$OPTARG ;;
        i) sample_us=$OPTARG ;;
        a) aggr_us=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -eq 1 ] || usage

if ! command -v damo > /dev/null; then
    echo "$0: no damo: install it first (package damo)" >&2
    exit 1
fi
# damo ends its recording, and writes it, when it is interrupted.
timeout --signal=INT "$seconds" damo record --sample "$sample_us" --aggr "$aggr_us" \
    --out "$out" "$1" || [ -s "$out" ]
echo "$out"
