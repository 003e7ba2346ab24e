"""Files of measurements in, a machine profile out: what ``simkvm calibrate`` does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from simkvm.measure.calibrate import Calibration, calibrate, overhead_of
from simkvm.measure.read import read_all
from simkvm.scenario.errors import InputError
from simkvm.scenario.machine import load_machine, shipped_machines
from simkvm.scenario.profile import SUFFIX, to_toml


def calibrated(
    files: Iterable[str],
    machine: str,
    *,
    overhead: str | None = None,
    kernel: str = "",
    out: str | None = None,
) -> Calibration:
    """The calibration of ``machine`` by ``files``, called as ``out`` is. Writes nothing.

    Raises InputError for whatever is wrong with files, machine, overhead or the name of ``out``.
    """
    if out is not None:
        _check_target(out)
    base = load_machine(machine)
    rows = read_all(files)
    name = f"{base.name}-measured" if out is None else _name(out)
    return calibrate(rows, base, name=name, overhead=overhead_of(overhead, rows), kernel=kernel)


def written(calibration: Calibration, path: str) -> None:
    """Write the profile to ``path``, whole or not at all."""
    head = (
        f"{calibration.machine.name}: {calibration.base}, with constants measured on a real host\n"
        "(basis M; value is the median, low the 10th, high the 90th percentile).\n"
        "Made by simkvm calibrate; every other number is that of the base, with its source."
    )
    target = Path(path)
    aside = target.with_name(target.name + ".part")
    try:
        aside.write_text(to_toml(calibration.machine, head), encoding="utf-8")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _check_target(out: str) -> None:
    path = Path(out)
    if path.suffix != SUFFIX:
        raise InputError(f"a profile is a {SUFFIX} file", file=out)
    if not path.parent.is_dir():
        raise InputError("no such folder", file=str(path.parent))
    if _name(out) in shipped_machines():
        raise InputError("a shipped machine has this name, give it another", file=out)


def _name(out: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", Path(out).stem).strip("-").lower() or "measured"
