"""The tables of a point: which columns they have, of which types, and how they lie on the disk.

Readers of a store need no simkvm: every table is an ordinary Parquet file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

COLUMNS: dict[str, tuple[str, ...]] = {
    "locks": (
        *("guest", "lock", "site", "mode", "acquisitions", "contended"),
        *("wait_mean_ns", "wait_p50_ns", "wait_p99_ns", "wait_max_ns", "wait_total_ns"),
        *("hold_mean_ns", "hold_p50_ns", "hold_p99_ns", "hold_max_ns", "hold_total_ns"),
        *("queue_mean", "queue_max"),
    ),
    "histograms": ("guest", "lock", "site", "mode", "quantity", "low_ns", "high_ns", "count"),
    "timeline": (
        *("t_ns", "deferred_tables", "deferred_bytes"),
        *("reported_table_bytes", "table_bytes"),
    ),
    "grace_periods": ("number", "start_ns", "end_ns", "fqs_scans"),
    "passes": ("guest", "start_ns", "end_ns", "scanned", "young", "calls", "idle"),
    "series": ("guest", "t_ns", "touches", "faults", "retries"),
    "phases": ("name", "iteration", "begin_ns", "end_ns", "line"),
}
"""The tables of a point and the columns that each has even when it is empty."""

_TEXT = {"guest", "lock", "site", "mode", "quantity", "name", "line"}
_FRACTION = re.compile(r"_mean(_ns)?$|_ratio$|_per_s$|_per_(table|unmapped_gib)$")


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """One of a point's tables; empty if the point was written before there was such a table."""
    import pyarrow.parquet as pq

    if not (folder / f"{name}.parquet").exists():
        return arrow_table(name, {}).to_pandas()  # type: ignore[no-any-return]
    frame: pd.DataFrame = pq.read_table(folder / f"{name}.parquet").to_pandas()
    return frame


def arrow_table(name: str, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """A table of a record with the types it is stored in: text, int64, or float64.

    Types come from the values where there are any, so that a column never loses digits, and from
    the name where there are none; a column of means is float64 even when all of them are whole.
    """
    import pyarrow as pa

    if not any(len(values) for values in columns.values()):
        columns = dict.fromkeys([*COLUMNS[name], *columns], ())
    arrays = {
        column: pa.array(values, type=getattr(pa, _kind(column, values))())
        for column, values in columns.items()
    }
    return pa.table(arrays)


def _kind(column: str, values: Sequence[Any]) -> str:
    kinds = {type(value) for value in values}
    if any(issubclass(kind, str) for kind in kinds) or (column in _TEXT and not kinds):
        return "string"
    if any(issubclass(kind, float) for kind in kinds) or _FRACTION.search(column):
        return "float64"
    return "int64"


def write_table(path: Path, table: pa.Table) -> None:
    """Zstandard over differences: whole numbers here rise, or stay within a few digits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    text = [field.name for field in table.schema if pa.types.is_string(field.type)]
    with path.open("wb") as file:
        pq.write_table(
            table,
            file,
            compression="zstd",
            use_dictionary=text or False,
            column_encoding=dict.fromkeys(whole, "DELTA_BINARY_PACKED"),
        )
        file.flush()
        os.fsync(file.fileno())
