"""The report's section on retrieval: queries, what was found for them, and why not all
of it is used."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from cm3leon_jax.evaluation.page import (
    is_number,
    picture,
    read_lines,
    read_object,
    show,
    table,
)
from cm3leon_jax.retrieval.examples import FOLDER, WAYS
from cm3leon_jax.retrieval.strategy import CHOSEN, REASONS


def section(bank: Path) -> str:
    """Counts by reason, the threshold of near-duplicates, and the examples of a bank;
    empty where nothing of that is there."""
    parts = [_threshold(bank), _counts(read_object(bank / "skipped.json"))]
    cards = "".join(
        _card(line, bank / FOLDER) for line in read_lines(bank / FOLDER / "index.jsonl")
    )
    if cards:
        parts.append(
            "<h3>Training documents and what was found for them</h3><p class=note>By a "
            "document's text (without the words dropped from the query) and by its "
            "picture, best first, each with its score. Pale ones are passed over, for "
            f"the reason given.</p><div class=cards>{cards}</div>"
        )
    return "".join(parts)


def _threshold(bank: Path) -> str:
    found = read_object(bank / "calibration.json")
    if not is_number(found.get("skip_above")):
        return ""
    shares = [
        f"{100 * found[key]:.1f} % of {show(found.get(f'{pairs}_pairs'))} {name}"
        for key, pairs, name in (
            ("duplicates", "duplicate", "pairs of duplicates"),
            ("same_entity", "same_entity", "other pairs of the same thing"),
        )
        if is_number(found.get(key))
    ]
    drops = f", which drops {' and '.join(shares)}" if shares else ""
    if found.get("met") is False:
        drops += ": <b>no threshold drops 99 % of the former and 1 % of the latter</b>"
    return (
        f"<p class=note>Near-duplicates have a score above {show(found['skip_above'])}"
        f"{drops} (validation documents).</p>"
    )


def _counts(counts: Mapping[str, Any]) -> str:
    """What became of all that was looked at, a column for each split."""
    splits = {k: v for k, v in counts.items() if isinstance(v, dict)}
    names = dict.fromkeys(name for split in splits.values() for name in split)
    rows = [
        (escape(name), *(show(split.get(name, 0)) for split in splits.values()))
        for name in names
    ]
    return table(rows, ("what was found", *map(escape, splits))) if rows else ""


def _card(line: Mapping[str, Any], folder: Path) -> str:
    """A query, then its hits by every way of asking, with scores and reasons."""
    query, found = line.get("query"), line.get("found")
    if not isinstance(query, dict) or not isinstance(found, list):
        return ""
    found = [hit for hit in found if isinstance(hit, dict)]
    hits = "".join(_hit(h, folder) for way in WAYS for h in found if h.get("by") == way)
    return (
        "<article class=card><div class='pictures found'>"
        f"{_figure(query, folder, '<b>query</b>')}{hits}</div>"
        f"<div class=words><p>{show(query.get('text', ''))}</p></div></article>"
    )


def _hit(hit: Mapping[str, Any], folder: Path) -> str:
    reason = str(hit.get("reason", ""))
    used = reason == REASONS[CHOSEN]
    score = show(hit["score"]) if is_number(hit.get("score")) else ""
    label = f"by {escape(str(hit['by']))} {score}"
    label += "" if used else f" · {escape(reason)}"
    return _figure(hit, folder, label, "" if used else " class=passed")


def _figure(
    document: Mapping[str, Any], folder: Path, label: str, kind: str = ""
) -> str:
    """A document's picture over a label (ready HTML); its text shows on pointing."""
    text, file = str(document.get("text", "")), document.get("picture")
    drawn = picture(folder, file, text) if isinstance(file, str) else escape(text)
    return (
        f'<figure{kind} title="{escape(text)}">{drawn}<figcaption>{label}</figcaption>'
        "</figure>"
    )
