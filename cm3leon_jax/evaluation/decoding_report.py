"""The report's section on ways of decoding: a curve for each over the number of
candidates, what they cost, and which is best for how many."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from cm3leon_jax.evaluation.chart import Series, chart
from cm3leon_jax.evaluation.page import read_object, show, table

Ways = Mapping[str, Mapping[str, Any]]


def section(folder: Path) -> str:
    """HTML of every study in WORKDIR/decoding; empty where there is none."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        found = read_object(path)
        if ways := found.get("ways"):
            parts.append(f"<h3>{escape(path.stem)}</h3>{_study(found, ways)}")
    return "".join(parts)


def at(way: Mapping[str, Any], n: int) -> tuple[float | None, float | None]:
    """Diversity of n candidates, and seconds that a prompt takes, where it was timed.
    Older studies have both of the most candidates only."""
    point = way["curve"][str(n)]
    if "diversity" in point:
        return point["diversity"], point.get("seconds")
    return way["diversity"], n * way["seconds_per_candidate"]


def best(ways: Ways) -> dict[int, list[str]]:
    """By number of candidates, the ways that may be the best: that with the highest F1
    first, then those whose 95 % interval reaches up to its value, cheapest first."""
    numbers = sorted({int(n) for way in ways.values() for n in way["curve"]})
    made = {}
    for n in numbers:
        scores = {
            name: way["curve"][str(n)]["chosen"]
            for name, way in ways.items()
            if str(n) in way["curve"]
        }
        first = max(scores, key=lambda name: scores[name]["value"])
        others = [
            name
            for name, score in scores.items()
            if name != first and score["high"] >= scores[first]["value"]
        ]
        others.sort(key=lambda name: at(ways[name], n)[1] or 0.0)
        made[n] = [first, *others]
    return made


def _study(found: Mapping[str, Any], ways: Ways) -> str:
    lines = [
        Series(
            name,
            [(int(n), point["chosen"]["value"]) for n, point in way["curve"].items()],
            dashed=any(s["contrastive"] for s in way["samplers"]),
            colour=number,
        )
        for number, (name, way) in enumerate(ways.items())
    ]
    numbers = sorted({int(n) for way in ways.values() for n in way["curve"]})
    rows = [
        (
            escape(name),
            str(way["streams"]),
            *(
                " · ".join(show(part) for part in at(way, n) if part is not None)
                if str(n) in way["curve"]
                else ""
                for n in numbers
            ),
        )
        for name, way in ways.items()
    ]
    choice = [
        (
            str(n),
            escape(names[0]),
            show(ways[names[0]]["curve"][str(n)]["chosen"]["value"]),
            escape(", ".join(names[1:])) or "none",
        )
        for n, names in best(ways).items()
    ]
    head = ("candidates", "highest F1", "", "within its reach, cheapest first")
    return (
        f"<p>F1 over exact objects of the candidate that ranks first, of "
        f"{show(found.get('prompts', 0))} prompts. Dashed: with contrast. "
        "Below: how far candidates are apart · seconds a prompt.</p>"
        f"<figure class=chart>{chart(lines, 860, 320, 'candidates')}</figure>"
        f"{table(rows, ('way', 'streams', *map(str, numbers)))}"
        f"{table(choice, head)}"
    )
