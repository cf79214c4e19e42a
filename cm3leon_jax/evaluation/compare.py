"""Results of one protocol side by side, with what of the differences is chance.

Every result is compared with the first. Where both have kept the draws of their
bootstrap (`eval/NAME.npz`), and those are of the same examples, the difference is taken
draw by draw: a paired bootstrap. Elsewhere the two are taken for independent and
normal, and their spread is read from their intervals.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon_jax.config import read_json, write_whole
from cm3leon_jax.evaluation.frechet import PARTS
from cm3leon_jax.evaluation.kept import digest
from cm3leon_jax.evaluation.page import flat, frame, table

SURE = 0.05
_NEEDED = {"protocol", "protocol_hash", "config", "config_hash", "scores"}
# What results must agree in; the second a system lacks, or an older result.
SAME = {"protocol_hash": "protocols", "data_hash": "data", "encoder": "encoders"}
_IF_SAID = {"examples": "examples", "bank": "memory banks", "sampling": "samplers"}
_SIGMAS = 2 * 1.959964  # that a 95 % interval is wide
# Scores of which less is better, by the first word of the measure.
LOWER = ("fid", "rfid", "frechet", "nats", "perplexity", "hallucinat", "empty")


@dataclass(frozen=True)
class Difference:
    """Of a score to that of the first result, with its 95 % interval.

    `p` is two-sided, None where a score has no interval; `paired` says how it was
    found; `better` None where it may be chance.
    """

    value: float
    low: float
    high: float
    p: float | None
    paired: bool
    better: bool | None


def read(path: str | Path) -> dict[str, Any]:
    """A result file, its bootstrap's draws under "draws": none that are of another.

    ValueError for a file that is none.
    """
    path = Path(path)
    result = read_json(path, "evaluate again")
    if missing := _NEEDED - set(result if isinstance(result, dict) else ()):
        raise ValueError(f"{path} is no result of evaluate.py: no {min(missing)}")
    draws = {}
    if (kept := path.with_suffix(".npz")).is_file():
        try:
            with kept.open("rb") as file, np.load(file) as arrays:
                draws = {key: arrays[key] for key in arrays.files}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{kept} is damaged ({error}): delete it") from error
    # Older draws do not say of what they are.
    of, rows = draws.pop("of", None), json.loads(str(draws.pop("rows", "{}")))
    if of is not None and of != digest(result):
        draws = {}
    return result | {"draws": draws, "rows": rows, "name": str(path)}


def read_all(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Results, named by their work directories from where those part."""
    results = [read(path) for path in paths]
    places = [Path(path).resolve().parent.parent for path in paths]
    root = os.path.commonpath([place.parent for place in places])
    for result, place in zip(results, places, strict=True):
        said = (place.relative_to(root), *map(result.get, ("checkpoint", "precision")))
        result["name"] = " ".join(str(x) for x in said if x)
    return results


def check(results: Sequence[Mapping[str, Any]], allowed: Sequence[str] = ()) -> None:
    """ValueError unless all are of one protocol and the same data, and agree in the
    rest as far as they say it, but for what is `allowed` to differ."""
    if len(results) < 2:
        raise ValueError("one result has nothing to be compared with: give two or more")
    if len({result["name"] for result in results}) < len(results):
        raise ValueError("a checkpoint is given twice: compare it with others")
    first = results[0]
    for other in results[1:]:
        for key, what in (SAME | _IF_SAID).items():
            unsaid = key in _IF_SAID and None in (first.get(key), other.get(key))
            tuned = key == "sampling" and first["config"] == other["config"]
            tuned &= {*map(_stage, (first, other))} == {"pretrain", "sft"}
            if key in allowed or unsaid or tuned:
                continue
            for name, (a, b) in _differences(key, first, other).items():
                raise ValueError(
                    f"results of different {what} cannot be compared: "
                    f"{first['name']} has {name} {a} ({first.get('protocol')}), "
                    f"{other['name']} has {b} ({other.get('protocol')}); "
                    "measure both by one protocol on the same documents"
                )


def _stage(result: Mapping[str, Any]) -> str:
    return result.get("checkpoint", "").partition("@")[0]


def _differences(
    key: str, first: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Of sections, in what both have: settings come to be."""
    a, b = (dict(flat({key: result.get(key)})) for result in (first, other))
    return {x: (a[x], b[x]) for x in a if x in b and a[x] != b[x]}


def difference(
    key: str, first: Mapping[str, Any], other: Mapping[str, Any]
) -> Difference | None:
    """Of one score; None where one of the two lacks it."""
    a, b = first["scores"].get(key), other["scores"].get(key)
    if a is None or b is None:
        return None
    gap = b["value"] - a["value"]
    both = [x["draws"][key] for x in (first, other) if key in x["draws"]]
    # Of what they are; older ones say of how many things only.
    rows = [
        x.get("rows", {}).get(key, (score["n"], score.get("clusters")))
        for x, score in ((first, a), (other, b))
    ]
    paired = len(both) == 2 and rows[0] == rows[1]
    if paired:
        gaps = both[1].astype(np.float64) - both[0]
        low, high = np.quantile(gaps, (0.025, 0.975))
        # The share of draws on the other side, with those exactly between.
        tail = min((gaps <= 0).mean(), (gaps >= 0).mean())
        # No test of n things finds less than that they all differ in one direction.
        least = 0.5 ** min(x.get("clusters", x["n"]) for x in (a, b))
        p = min(1.0, 2 * max(float(tail), 1 / len(gaps), least))
    else:
        spread = math.hypot(_deviation(a), _deviation(b))
        half = spread * _SIGMAS / 2
        low, high = gap - half, gap + half
        known = min(_deviation(a), _deviation(b)) > 0  # a width of 0 says nothing
        p = math.erfc(abs(gap) / spread / math.sqrt(2)) if known else None
    better = None
    if p is not None and p < SURE and gap:
        better = (gap > 0) != lower_is_better(key)
    return Difference(gap, float(low), float(high), p, paired, better)


def _deviation(score: Mapping[str, float]) -> float:
    """Of a value: by the spread over subsets, as its interval may be cut off at 0."""
    wide = (score["high"] - score["low"]) / _SIGMAS
    return score["spread"] / math.sqrt(PARTS) if "spread" in score else wide


def lower_is_better(key: str) -> bool:
    task, _, measure = key.partition("/")
    if task in ("likelihood", "perplexity"):
        return measure != "match"
    return measure.startswith(LOWER)


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The table, and below it how to read it."""
    head, rows = _cells(results)
    lines = [head, ["---"] * len(head), *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_about(results)}\n\n{body}\n\n{_legend(results)}\n"


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The same as one HTML file without network."""
    head, rows = _cells(results)
    cells = [tuple(map(escape, row)) for row in rows]
    name, legend = str(results[0]["protocol"]), escape(_legend(results))
    lead = f"<p class=lead>{escape(_about(results))}</p>"
    made = table(cells, [*map(escape, head)])
    body = f"<section>{made}<p class=note>{legend}</p></section>"
    return frame(f"{name} · compared", body, head=escape(name), lead=lead)


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every difference as plain JSON, by score and name of the result."""
    return {
        key: {
            other["name"]: vars(found)
            for other in results[1:]
            if (found := difference(key, results[0], other)) is not None
        }
        for key in _keys(results)
    }


def write(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """By the ending of the file: .md, .html or .json."""
    if path.suffix not in (".md", ".html", ".json"):
        raise ValueError(f"{path}: a comparison is written as .md, .html or .json")
    form = {".md": markdown, ".html": page}.get(path.suffix)
    text = form(results) if form else json.dumps(summary(results), indent=1)
    write_whole(path, text)


def _keys(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for result in results for key in result["scores"]))


def _cells(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["score", *(str(result["name"]) for result in results), "n"]
    rows = []
    for key in _keys(results):
        row, count = [key + " ↓" * lower_is_better(key)], ""
        for number, result in enumerate(results):
            score = result["scores"].get(key)
            if score is None:
                row.append("")
                continue
            count = f"{score['n']:,}"
            text = f"{score['value']:.4g} ({score['low']:.4g} … {score['high']:.4g})"
            found = difference(key, results[0], result) if number else None
            row.append(text if found is None else f"{text} {_verdict(found)}")
        rows.append([*row, count])
    return head, rows


def _verdict(found: Difference) -> str:
    sign = {None: "≈", True: "better", False: "worse"}[found.better]
    if found.p is None:
        return f"{found.value:+.3g}, no interval"
    p = f"p < {SURE / 25:g}" if found.p <= SURE / 25 else f"p = {found.p:.2g}"
    return f"{sign}, {found.value:+.3g}, {p}{'' if found.paired else ' (unpaired)'}"


def _about(results: Sequence[Mapping[str, Any]]) -> str:
    first = results[0]
    return (
        f"Protocol {first['protocol']} ({first['protocol_hash']}), "
        f"{first.get('documents')} examples of data {first.get('data_hash')}, "
        f"seed {first.get('seed')}; configs "
        + ", ".join(f"{r['name']}: {r['config']} ({r['config_hash']})" for r in results)
    )


def _legend(results: Sequence[Mapping[str, Any]]) -> str:
    first = results[0]
    others = [
        f" {other['name']} has {name} {b}, not {a}."
        for other in results[1:]
        for name, (a, b) in _differences("sampling", first, other).items()
    ]
    return (
        f"Values with 95 % intervals. Better or worse than {first['name']} where "
        f"p < {SURE} (two-sided; of {len(_keys(results))} scores some are by chance), "
        "≈ where not; by a paired bootstrap unless it says unpaired." + "".join(others)
    )
