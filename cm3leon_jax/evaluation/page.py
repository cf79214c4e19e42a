"""What the report is put together from: forgiving readers, and blocks of HTML.

Every function that makes HTML escapes what it is given, unless it says otherwise.
"""

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

_STYLE = Path(__file__).with_name("report.css")
FAILURES = "_failures"  # ends the name of a group of samples that all went wrong
MIME = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # not there, or not text
        return ""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is none to be read."""
    try:
        value = json.loads(read_text(path))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line. A line cut short by a killed run is passed over."""
    found = []
    for line in read_text(path).splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [value for value in found if isinstance(value, dict)]


def stage_hash(folder: Path) -> str | None:
    """What the stage in a folder was made from; None where no stage has left a mark."""
    done, begun = (read_object(folder / name) for name in ("DONE.json", "inputs.json"))
    found = done.get("inputs_hash", begun.get("hash"))
    return found if isinstance(found, str) else None


def is_number(value: object) -> TypeGuard[float]:
    """A finite number (`True` is not one)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def show(value: object) -> str:
    """Any JSON value as short escaped text."""
    if isinstance(value, float):
        digits = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return f"{value:g}" if 0 < abs(value) < 1e-3 else digits
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list) and not any(isinstance(x, dict | list) for x in value):
        return ", ".join(map(show, value))
    return escape(value if isinstance(value, str) else json.dumps(value))


def duration(seconds: object) -> str:
    if not is_number(seconds):
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def title(name: str) -> str:
    """`text_to_image` as `Text → image`."""
    return escape(name.replace("_to_", " → ").replace("_", " ").capitalize())


def frame(
    name: str, body: str, *, head: str, lead: str = "", kicker: str = "cm3leon_jax"
) -> str:
    """A file without network, in the style of the report: ready HTML but for `name`."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)}</title><style>{_STYLE.read_text('utf-8')}</style>"
        f"</head><body><header><p class=kicker>{kicker}</p><h1>{head}</h1>{lead}"
        f"</header><main>{body}</main></body></html>\n"
    )


def cell(score: Any) -> str:
    """A score; its interval where the mouse rests. Empty for what is none."""
    if not isinstance(score, Mapping) or not is_number(score.get("value")):
        return ""
    low, high, n = (score.get(key) for key in ("low", "high", "n"))
    ends = f"{low:.3f} to {high:.3f}, " if is_number(low) and is_number(high) else ""
    out = f", {score['left_out']} left out" if score.get("left_out") else ""
    return f'<span title="{ends}n = {n}{out}">{score["value"]:.3f}</span>'


def table(rows: Iterable[tuple[str, ...]], head: Sequence[str] = ()) -> str:
    """Rows of ready HTML; the first cell of each names the row."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    top = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f"<div class=scroll><table>{top}<tbody>{body}</tbody></table></div>"


def picture(folder: Path, file: str, label: str) -> str:
    """An embedded picture; small ones enlarged by a whole factor, without blur."""
    path = folder / file
    kind = MIME.get(path.suffix.lower())
    inside = path.resolve().is_relative_to(folder.resolve())
    if kind is None or not inside or not path.is_file():
        return f'<div class=missing title="{escape(file)}">missing</div>'
    data = path.read_bytes()
    width = int.from_bytes(data[16:20], "big") if kind == "png" else 0
    style = ""
    if 0 < width <= 128:
        style = f' class=pixels style="width:{width * max(1, round(128 / width))}px"'
    encoded = base64.b64encode(data).decode("ascii")
    return (
        f'<img{style} alt="{escape(label)}" src="data:image/{kind};base64,{encoded}">'
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
