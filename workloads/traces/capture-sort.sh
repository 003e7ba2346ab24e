#!/usr/bin/env bash
# GNU sort of 100,000 lines in memory: read 41 MB, sort pointers to the lines, write them out.
# Usage: capture-sort.sh [OUT.parquet]. Takes about five minutes, needs awk, sort and valgrind.
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/sort.parquet}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"
awk 'BEGIN {
  for (i = 0; i < 40; i++) text = text "lorem ipsum dolor "
  for (x = 1; n++ < 100000; ) {
    x = x * 16807 % 2147483647
    printf "%010d %s\n", x, substr(text, 1, 300 + x % 200)
  }
}' >lines.txt
env -i LC_ALL=C PATH=/usr/bin:/bin \
  valgrind --tool=lackey --trace-mem=yes --log-fd=9 \
  sort --parallel=1 -S 128M -o sorted.txt lines.txt 9>&1 >/dev/null |
  "${SIMKVM:-simkvm}" import lackey - --window 64 --out "$out"
