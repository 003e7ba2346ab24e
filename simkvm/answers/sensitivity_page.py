"""Which assumptions carry the most weight: the headline figures, taken apart by constants."""

from __future__ import annotations

from pathlib import Path

from simkvm.answers.headline import HEADLINES
from simkvm.answers.page import assumptions, bases, ending, fill, put, table
from simkvm.answers.runs import Runs
from simkvm.study.effect import Effect
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
            put(tornado(analysis, about=headline.title), folder / name)
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
    found: dict[str, list[Effect]] = {}
    for analysis in analyses:
        for effect in analysis.tornados[0].moving:
            if effect.share >= NOTICEABLE:
                found.setdefault(effect.parameter.name, []).append(effect)
    order = sorted(found, key=lambda name: (-_beyond_chance(found[name]), -_most(found[name])))
    rows = [
        [
            f"`{name}`",
            found[name][0].parameter.basis,
            str(len(found[name])),
            str(_beyond_chance(found[name]) or "0 (within chance)"),
            f"{100 * _most(found[name]):.0f} %",
        ]
        for name in order
    ]
    headers = ("constant", "basis", "moves by 1 % or more", "beyond chance", "most")
    return (
        f"{len(rows)} constants move at least one of {len(analyses)} headline figures by 1 % or "
        "more, from the lowest to the highest, as a share of the figure. Some of that may be "
        "chance, where a nanosecond shifts who comes first; *most* is of the figures that it moves "
        "beyond chance, if there is one.\n\n"
        f"{table(headers, rows)}"
    )


def _beyond_chance(effects: list[Effect]) -> int:
    return sum(effect.beyond_chance for effect in effects)


def _most(effects: list[Effect]) -> float:
    told = [effect for effect in effects if effect.beyond_chance]
    return max(effect.share for effect in told or effects)
