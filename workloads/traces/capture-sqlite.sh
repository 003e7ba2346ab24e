#!/usr/bin/env bash
# A database session in memory: load 30,000 sales, index them, run four analytical queries.
# Usage: capture-sqlite.sh [OUT.parquet]. Takes a quarter of an hour, needs sqlite3 and valgrind.
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/sqlite.parquet}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat >"$work/session.sql" <<'SQL'
PRAGMA cache_size = -65536;
PRAGMA temp_store = MEMORY;
CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT, city INTEGER, segment INTEGER);
CREATE TABLE sale (id INTEGER PRIMARY KEY, customer INTEGER, product INTEGER, day INTEGER,
                   quantity INTEGER, cents INTEGER, note BLOB);
BEGIN;
WITH n(i) AS (SELECT value FROM generate_series(1, 4000))
INSERT INTO customer SELECT i, 'customer-' || (i * 7919 % 4001), i * 31 % 97, i % 5 FROM n;
WITH n(i) AS (SELECT value FROM generate_series(1, 30000))
INSERT INTO sale SELECT
  i, 1 + i * 48271 % 4000, i * 69621 % 1009, i / 100, 1 + i * 16807 % 9, 100 + i * 39373 % 90001,
  substr(CAST('The parcel was left with the neighbour at number four, who signed for it and asked '
    || 'that the next one be brought after five in the afternoon; the customer has been told by '
    || 'letter, and the driver has noted the gate code, the dog and the broken bell, so that nobody '
    || 'need ring twice or wait in the rain for an answer, as happened in March and again in June '
    || 'when the first two parcels went back to the depot unopened.' AS BLOB),
    1 + i * 271 % 100, 280 + i * 271 % 100)
FROM n;
COMMIT;
CREATE INDEX sale_customer ON sale (customer, day);
SELECT c.segment, count(*), sum(s.quantity * s.cents)
  FROM sale s JOIN customer c ON c.id = s.customer WHERE s.day < 100 GROUP BY c.segment;
SELECT product, sum(quantity) AS sold FROM sale GROUP BY product ORDER BY sold DESC LIMIT 10;
SELECT c.city, avg(s.cents) FROM customer c JOIN sale s ON s.customer = c.id
  WHERE s.day BETWEEN 90 AND 120 GROUP BY c.city ORDER BY 2 DESC LIMIT 5;
SELECT id, cents, length(note) FROM sale ORDER BY cents DESC, id LIMIT 20;
SQL

cd "$work"
env -i LC_ALL=C PATH=/usr/bin:/bin \
  valgrind --tool=lackey --trace-mem=yes --log-fd=9 \
  sqlite3 -batch -init /dev/null :memory: 9>&1 >/dev/null <session.sql |
  "${SIMKVM:-simkvm}" import lackey - --window 128 --out "$out"
