"""Which assumptions carry the most weight: the headline figures, taken apart by constants."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from simkvm.answers.headline import HEADLINES
from simkvm.answers.page import assumptions, bases, ending, fill, put, table
from simkvm.answers.runs import Runs
from simkvm.study.sensitivity import Sensitivity

NOTICEABLE = 0.01
"""A swing of less than this share of the figure is not counted."""


class Assumptions:
    """The page that `docs/limits.md` points to."""

    path = "sensitivity.md"

    def write(self, runs: Runs, folder: Path) -> str:
        """The page; its figures go beside it."""
        from simkvm.show.figure_tornado import tornado

        sections, analyses = [], []
        for number, headline in enumerate(HEADLINES, start=1):
            analysis = headline.analyse(runs)
            analyses.append(analysis)
            name = f"sensitivity-{number}.png"
            put(tornado(analysis), folder / name)
            sections.append(
                f"## {headline.about}\n\n{assumptions(analysis, analysis.tornados[0])}\n\n"
                f"![{headline.metric}]({name})"
            )
        return fill(
            "sensitivity",
            weights=_weights(analyses),
            sections="\n\n".join(sections),
            bases=bases(),
            ending=ending(runs, "simkvm answers sensitivity"),
        )


def _weights(analyses: list[Sensitivity]) -> str:
    counted: Counter[str] = Counter()
    worst: dict[str, float] = {}
    basis: dict[str, str] = {}
    for analysis in analyses:
        for effect in analysis.tornados[0].telling:
            if effect.share >= NOTICEABLE:
                name = effect.parameter.name
                counted[name] += 1
                worst[name] = max(worst.get(name, 0.0), effect.share)
                basis[name] = effect.parameter.basis
    order = sorted(counted, key=lambda name: (-counted[name], -worst[name], name))
    rows = [
        [f"`{name}`", basis[name], str(counted[name]), f"{100 * worst[name]:.0f} %"]
        for name in order
    ]
    headers = ("constant", "basis", "figures that it moves by 1 % or more", "most")
    return (
        f"{len(rows)} constants move at least one of {len(analyses)} headline figures by 1 % or "
        "more, beyond chance (from the lowest to the highest, as a share of the figure).\n\n"
        f"{table(headers, rows)}"
    )
