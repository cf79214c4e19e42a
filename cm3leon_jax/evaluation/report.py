"""`report.html`: everything a work directory can show, in one file without network.

Read are `config.json`, each stage's `DONE.json`, the two `metrics.jsonl`, the result
files `eval/*.json` and the pictures that `samples/GROUP/index.jsonl` lists, one JSON
object a line: `{"prompt" (or "caption", "question", …): text, "pictures": {label:
file}, "ok": true | false | null, "note": text}`. Stages that were not run are left
out, and so are unreadable pieces: a report of half a run is worth having.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cm3leon_jax.config import config_hash
from cm3leon_jax.evaluation.chart import Series, chart
from cm3leon_jax.evaluation.page import (
    duration,
    flat,
    is_number,
    picture,
    read_lines,
    read_object,
    show,
    table,
    title,
)

# In the order of running; folders without DONE.json are shown as unfinished.
STAGES = (
    *("documents", "text_tokenizer", "image_tokenizer", "dual_encoder", "tokens"),
    *("bank", "pretrain", "sft"),
)
TRAININGS = {
    "pretrain": "Pretraining",
    "sft": "Instruction tuning",
    "image_tokenizer": "Image tokenizer",
    "dual_encoder": "Dual encoder",
}
# Groups of samples in the order of reading, each with what its pictures are.
GROUPS = {
    "reconstruction": "Held-out pictures through the image tokenizer and back: nothing "
    "that the decoder writes can be sharper than this.",
    "text_to_image": "Pictures drawn for held-out prompts.",
    "caption": "Held-out pictures and what the model says they show.",
    "infill": "The hidden region was blanked before the picture was encoded, so the "
    "model has not seen what it replaces.",
}
MAX_CARDS = 48  # per group; a report should stay below some ten megabytes
STYLE = Path(__file__).with_name("report.css")


def write(workdir: str | Path) -> Path:
    """Writes `WORKDIR/report.html` from what lies there now and returns its path.

    Raises FileNotFoundError when there is no such directory.
    """
    root = Path(workdir)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such work directory to report on")
    config = read_object(root / "config.json")
    results = []
    for path in sorted((root / "eval").glob("*.json")):
        result = read_object(path)
        if isinstance(scores := result.get("scores"), dict):
            scores = {k: v for k, v in scores.items() if isinstance(v, dict)}
            results.append((path.stem, result | {"scores": scores}))
    done = {p.parent.name: read_object(p) for p in sorted(root.glob("*/DONE.json"))}
    sections = [
        ("samples", "Samples", _samples(root / "samples")),
        ("scores", "Scores", "".join(_scores(*result) for result in results)),
        ("curves", "Training curves", _curves(root)),
        ("stages", "How it was made", _stages(root, done)),
        ("config", "Configuration", _config(config)),
    ]
    present = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in present)
    body = "".join(
        f'<section id="{key}"><h2>{title}</h2>{content}</section>'
        for key, title, content in present
    )
    name = escape(root.resolve().name)
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name} · cm3leon_jax</title><style>{STYLE.read_text('utf-8')}</style>"
        "</head><body>"
        f"<header><p class=kicker>cm3leon_jax report</p><h1>{name}</h1>"
        "<p class=lead>One decoder over text and image tokens, trained with the CM3 "
        "infilling objective.</p>"
        f"{_facts(config, results, done)}{_tiles(results)}<nav>{links}</nav></header>"
        f"<main>{body}</main></body></html>\n"
    )
    path = root / "report.html"
    # Whole or not at all: a reader may have the page open while it is made again.
    partial = root / "report.html.partial"
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)


def _facts(
    config: Mapping[str, Any],
    results: Sequence[tuple[str, Mapping[str, Any]]],
    done: Mapping[str, Mapping[str, Any]],
) -> str:
    """What was run, on what, for how long."""
    sources = [*(result for _, result in results), *done.values()]
    hardware = sorted({show(s["hardware"]) for s in sources if s.get("hardware")})
    times = [d["seconds"] for d in done.values() if is_number(d.get("seconds"))]
    facts = {
        "configuration": show(config["name"]) if "name" in config else "",
        "configuration hash": config_hash(config) if config else "",
        "hardware": "; ".join(hardware),
        "time of all stages": duration(sum(times)) if times else "",
        "software": ", ".join(f"{name} {version(name)}" for name in ("jax", "flax")),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    items = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items() if v)
    return f"<dl>{items}</dl>"


def _score(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _tiles(results: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The first score of every task, large. Of several result files the last counts."""
    first: dict[str, tuple[str, Mapping[str, Any], str]] = {}
    for _, result in results:
        tasks = set()
        for key, score in result["scores"].items():
            task = key.split("/")[0]
            if task not in tasks and is_number(score.get("value")):
                tasks.add(task)
                first[task] = (key, score, str(result.get("checkpoint", "")))
    tiles = "".join(
        f'<a class=tile href="#scores"><b>{_score(score["value"])}</b>'
        f"<span>{title(task)}</span><small>{escape(key.partition('/')[2])}"
        f"{f' · {escape(checkpoint)}' if checkpoint else ''}</small></a>"
        for task, (key, score, checkpoint) in first.items()
    )
    return f"<div class=tiles>{tiles}</div>" if tiles else ""


def _scores(name: str, result: Mapping[str, Any]) -> str:
    """One result file: each score with its 95 % interval, drawn when it lies in 0…1."""
    rows = []
    for key, score in result["scores"].items():
        value, low, high = (score.get(k) for k in ("value", "low", "high"))
        if not is_number(value):
            rows.append((escape(key), "none", "", "", ""))
            continue
        interval, bar = "", ""
        if is_number(low) and is_number(high):
            interval = f"{_score(low)} … {_score(high)}"
            if 0 <= low <= value <= high <= 1:
                bar = (
                    f'<div class=bar><i style="width:{value:.2%}"></i>'
                    f'<b style="left:{low:.2%};width:{high - low:.2%}"></b></div>'
                )
        n = score.get("n")
        rows.append((escape(key), _score(value), bar, interval, show(n) if n else ""))
    keys = ("protocol", "checkpoint", "step", "seed", "config_hash", "protocol_hash")
    parts = [f"{k.replace('_', ' ')} {show(result[k])}" for k in keys if k in result]
    parts += [duration(result["seconds"])] if "seconds" in result else []
    head = ("measure", "value", "0 … 1", "95 % interval", "n")
    return (
        f"<h3>{escape(name)}</h3><p class=note>{' · '.join(parts)}</p>"
        f"{table(rows, head)}"
    )


def _curves(root: Path) -> str:
    return "".join(
        _training(title, rows)
        for stage, title in TRAININGS.items()
        if (rows := read_lines(root / stage / "metrics.jsonl"))
    )


def _training(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The losses in one large chart, every other scalar in a small one.

    Keys that differ only in a leading `validation` share a chart.
    """
    panels: dict[str, list[Series]] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key != "step"):
        points = [
            (float(row["step"]), float(row[key]))
            for row in rows
            if is_number(row.get("step")) and is_number(row.get(key))
        ]
        base = key.removeprefix("validation").lstrip("/_") or key
        if points:
            panels.setdefault(base, []).append(Series(key, points, base != key))
    large = [k for k in ("loss", "loss_text", "loss_image") if k in panels]
    large = large or [k for k in panels if "loss" in k]
    main = [
        replace(series, colour=colour)
        for colour, key in enumerate(large)
        for series in panels[key]
    ]
    charts = "".join(
        f"<figure class=small>{chart(series, 300, 130)}</figure>"
        for key, series in panels.items()
        if key not in large
    )
    parts = [f"<h3>{escape(title)}</h3>"]
    if main:
        parts.append(f"<figure class=chart>{chart(main, 860, 320)}</figure>")
    if charts:
        parts.append(f"<div class=charts>{charts}</div>")
    return "".join(parts)


def _samples(folder: Path) -> str:
    groups = {p.parent.name: p for p in sorted(folder.glob("*/index.jsonl"))}
    known = [g for prefix in GROUPS for g in groups if g.startswith(prefix)]
    return "".join(
        _group(name, read_lines(groups[name]), groups[name].parent)
        for name in dict.fromkeys([*known, *groups])
    )


def _group(name: str, lines: Sequence[Mapping[str, Any]], folder: Path) -> str:
    if not lines:
        return ""
    about = next((GROUPS[g] for g in GROUPS if name.startswith(g)), "")
    judged = [line["ok"] for line in lines if isinstance(line.get("ok"), bool)]
    notes = [about]
    if judged:
        notes.append(f"{sum(judged)} of {len(judged)} judged right.")
    if len(lines) > MAX_CARDS:
        notes.append(f"The first {MAX_CARDS} of {len(lines)}.")
    choice = '<label class=only><input type="checkbox"> only what went wrong</label>'
    cards = "".join(_card(line, folder) for line in lines[:MAX_CARDS])
    return (
        f"<div class=group><h3>{title(name)}</h3><p class=note>"
        f"{' '.join(filter(None, notes))}</p>{choice if False in judged else ''}"
        f"<div class=cards>{cards}</div></div>"
    )


def _card(line: Mapping[str, Any], folder: Path) -> str:
    """One example: its pictures, then every text of its line."""
    verdict = {True: "right", False: "wrong"}.get(line.get("ok"), "")  # type: ignore
    listed = line.get("pictures")
    listed = listed if isinstance(listed, dict) else {}
    pictures = "".join(
        f"<figure>{picture(folder, str(file), str(label))}"
        # A picture alone is plain from the group's title, and so is a text alone.
        f"{f'<figcaption>{escape(label)}</figcaption>' if len(listed) > 1 else ''}"
        "</figure>"
        for label, file in listed.items()
    )
    texts = {
        key: value
        for key, value in line.items()
        if key not in ("pictures", "ok", "note") and value not in (None, "")
    }
    words = "".join(
        f"<p>{f'<em>{escape(key)}</em> ' if len(texts) > 1 else ''}{show(value)}</p>"
        for key, value in texts.items()
    )
    note = f"<p class=note>{show(line['note'])}</p>" if line.get("note") else ""
    badge = f"<span class=badge>{verdict}</span>" if verdict else ""
    return (
        f'<article class="card {verdict}"><div class=pictures>{pictures}</div>'
        f"<div class=words>{badge}{words}{note}</div></article>"
    )


def _stages(root: Path, done: Mapping[str, Mapping[str, Any]]) -> str:
    """Seconds, counts and inputs of every stage that left its mark."""
    known = [s for s in STAGES if s in done or (root / s).is_dir()]
    times = {s: d["seconds"] for s, d in done.items() if is_number(d.get("seconds"))}
    longest = max(times.values(), default=0) or 1
    rows = []
    for stage in dict.fromkeys([*known, *done]):
        if stage not in done:
            rows.append((stage, "", "", "begun, not finished"))
            continue
        share = times.get(stage, 0) / longest
        facts = [
            f"<em>{escape(key)}</em> {show(value)}"
            for key, value in flat(done[stage])
            if key not in ("seconds", "hardware")
        ]
        bar = f'<div class=bar><i style="width:{share:.2%}"></i></div>'
        took = duration(times.get(stage))
        rows.append((stage, took, bar if took else "", " · ".join(facts)))
    return table(rows, ("stage", "time", "", "counts and inputs")) if rows else ""


def _config(config: Mapping[str, Any]) -> str:
    """Every setting; sections folded, so that the page stays short."""
    if not config:
        return ""
    plain = {k: v for k, v in config.items() if not isinstance(v, dict)}
    rows = [(escape(key), show(value)) for key, value in plain.items()]
    folded = "".join(
        f"<details><summary>{escape(key)}</summary>"
        f"{table((escape(k), show(v)) for k, v in flat(value))}</details>"
        for key, value in config.items()
        if isinstance(value, dict)
    )
    return (table(rows) if rows else "") + folded
