"""`report.html`: everything a work directory can show, in one file without network.

Read are `config.json`, every folder's `DONE.json` and `metrics.jsonl`, the result files
`eval/NAME.json`, what a memory bank says of itself, and the pictures that
`samples/NAME/TASK/index.jsonl` lists (or, of no result, `samples/GROUP/index.jsonl`),
one JSON object a line: `{"prompt" (or "caption", "question", …): text, "pictures":
{label: file}, "ok": true | false | null, "note": text}`. Stages that were not run are
left out, and so are unreadable pieces: a report of half a run is worth having.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cm3leon_jax.config import config_hash, write_whole
from cm3leon_jax.evaluation import decoding_report, neighbours, task_report
from cm3leon_jax.evaluation.chart import Series, chart
from cm3leon_jax.evaluation.page import (
    FAILURES,
    duration,
    flat,
    frame,
    is_number,
    picture,
    read_lines,
    read_object,
    show,
    stage_hash,
    table,
    title,
)

# In the order of running; folders without DONE.json are shown as unfinished.
STAGES = (
    *("documents", "text_tokenizer", "image_tokenizer", "tokens"),
    *("dual_encoder", "bank", "pretrain", "tasks", "task_tokens", "sft"),
)
TRAININGS = {
    "pretrain": "Pretraining",
    "sft": "Tuning on tasks",
    "image_tokenizer": "Image tokenizer",
    "dual_encoder": "Dual encoder",
}
# In one chart, when a training has them: overall, and by kind of token.
LOSSES = ("loss", "loss/text", "loss/image")
# Groups of samples in the order of reading, each with what its pictures are.
GROUPS = {
    "reconstruction": "Held-out pictures through the image tokenizer and back: nothing "
    "that the decoder writes can be sharper than this.",
    "text_to_image": "Pictures drawn for held-out prompts.",
    "unseen_pairs": "Colours of shapes that training has never shown together.",
    "caption": "Held-out pictures and what the model says they show.",
    "infill": "The hidden region was blanked before the picture was encoded, so the "
    "model has not seen what it replaces.",
    **task_report.GROUPS,
}
MAX_CARDS = 48  # per group; a report should stay below some ten megabytes


def write(workdir: str | Path) -> Path:
    """Writes `WORKDIR/report.html` from what lies there now and returns its path.

    Raises FileNotFoundError when there is no such directory.
    """
    root = Path(workdir)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such work directory to report on")
    config = read_object(root / "config.json")
    results = _results(root)
    done = {p.parent.name: read_object(p) for p in sorted(root.glob("*/DONE.json"))}
    sections = [
        ("results", "Results", _shown(root / "samples", results)),
        ("tasks", "Tasks", task_report.section(root, [r for _, r in results])),
        ("decoding", "Ways of decoding", decoding_report.section(root / "decoding")),
        ("samples", "Other samples", _samples(root / "samples")),
        ("retrieval", "Retrieval", neighbours.section(root / "bank")),
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
    lead = (
        "<p class=lead>One decoder over text and image tokens, trained with the CM3 "
        "infilling objective.</p>"
        f"{_facts(config, results, done)}{_tiles(results)}<nav>{links}</nav>"
    )
    kicker, name = "cm3leon_jax report", root.resolve().name
    head = escape(name)
    text = frame(f"{name} · cm3leon_jax", body, kicker=kicker, head=head, lead=lead)
    path = root / "report.html"
    write_whole(path, text)  # a reader may have the page open
    return path


def _results(root: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name, result) of every result file, newest first; `stale` says why if it is."""
    found = []
    for path in (root / "eval").glob("*.json"):
        result = read_object(path)
        if not isinstance(scores := result.get("scores"), dict):
            continue
        result["scores"] = {k: v for k, v in scores.items() if isinstance(v, dict)}
        result["stale"] = _stale(root, result)
        found.append((path.stem, result))
    found.sort(key=lambda item: (str(item[1].get("measured", "")), item[0]))
    return found[::-1]


def _stale(root: Path, result: Mapping[str, Any]) -> str:
    """Why a result does not speak of what lies in the work directory now, or ``."""
    checkpoint = result.get("checkpoint")
    if not isinstance(checkpoint, str):
        return ""
    folder, _, step = checkpoint.partition("@")
    now, then = stage_hash(root / folder), result.get("inputs_hash")
    if then is not None and now != then:
        return f"{folder} was made anew since"
    steps = read_object(root / folder / "DONE.json").get("steps")
    if not step and steps is not None and result.get("step", steps) != steps:
        return f"{folder} has been trained to step {steps} since"
    return ""


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
    """The first score of every task, large, of the newest result that is not stale."""
    first: dict[str, tuple[str, Mapping[str, Any], str]] = {}
    for _, result in results:
        other = result["stale"] or "precision" in result
        for key, score in () if other else result["scores"].items():
            if is_number(score.get("value")):
                checkpoint = str(result.get("checkpoint", ""))
                first.setdefault(key.split("/")[0], (key, score, checkpoint))
    tiles = "".join(
        f'<a class=tile href="#results"><b>{_score(score["value"])}</b>'
        f"<span>{title(task)}</span><small>{escape(key.partition('/')[2])}"
        f"{f' · {escape(checkpoint)}' if checkpoint else ''}</small></a>"
        for task in dict.fromkeys([*filter(first.__contains__, GROUPS), *first])
        for key, score, checkpoint in [first[task]]
    )
    return f"<div class=tiles>{tiles}</div>" if tiles else ""


def _shown(samples: Path, results: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Every result with its own samples; open are those that count."""
    parts, seen = [], set()
    for name, result in results:
        protocol = result.get("protocol", name)
        counts = not (result["stale"] or "precision" in result or protocol in seen)
        seen |= {protocol} if counts else set()
        said = (show(result[x]) for x in ("checkpoint", "precision") if x in result)
        of = " ".join((" of", *said))
        stale = result["stale"]
        badge = f" <span class=stale>stale: {escape(stale)}</span>" if stale else ""
        parts.append(
            f"<details class=result{' open' * counts}><summary><b>{show(protocol)}</b>"
            f"{of}{badge}</summary>{_scores(name, result)}{_samples(samples / name)}"
            "</details>"
        )
    return "".join(parts)


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
        n, clusters = score.get("n"), score.get("clusters")
        count = show(n) if n else ""
        if clusters:
            count += f" <em>in {show(clusters)} distinct</em>"
        rows.append((escape(key), _score(value), bar, interval, count))
    keys = ("step", "documents", "seed", "config_hash", "protocol_hash", "measured")
    parts = [f"{k.replace('_', ' ')} {show(result[k])}" for k in keys if k in result]
    parts += [duration(result["seconds"])] if "seconds" in result else []
    head = ("measure", "value", "0 … 1", "95 % interval", "n")
    return f"<p class=note>{escape(name)} · {' · '.join(parts)}</p>{table(rows, head)}"


def _curves(root: Path) -> str:
    found = {p.parent.name: p for p in sorted(root.glob("*/metrics.jsonl"))}
    known = [stage for stage in TRAININGS if stage in found]
    return "".join(
        _training(TRAININGS.get(stage, stage.replace("_", " ").capitalize()), rows)
        for stage in dict.fromkeys([*known, *found])
        if (rows := read_lines(found[stage]))
    )


def _training(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The losses in one large chart, every other scalar in a small one.

    Keys that differ only in a leading `validation/` share a chart. Perplexities beside
    losses of text are left out: they say the same.
    """
    panels: dict[str, list[Series]] = {}
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    for key in keys:
        points = [
            (float(row["step"]), float(row[key]))
            for row in rows
            if is_number(row.get("step")) and is_number(row.get(key))
        ]
        base = key.removeprefix("validation/")
        repeated = base.startswith("perplexity") and "loss/text" in keys
        if points and not repeated:
            panels.setdefault(base, []).append(Series(key, points, base != key))
    large = [k for k in LOSSES if k in panels]
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
    if name.endswith(FAILURES):
        about = "Others that went wrong."
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
    ok = line.get("ok")
    verdict = ("right" if ok else "wrong") if isinstance(ok, bool) else ""
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
