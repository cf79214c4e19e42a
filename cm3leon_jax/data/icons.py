"""The `icons` world: real artwork in colour, names as captions.

Some 30,000 drawings of a dozen artists: the colour sets of `@iconify/json` (see
`icon_sets.py`), rendered with resvg, captioned with their names, their artists' styles
and the search words of emojibase (see `icon_names.py`). The same subject drawn by
several artists is in one split, which is drawn by the subject's name.

Near-duplicates inside a set are skipped and counted: of each subject's skin tones one
is kept beside the toneless drawing, of a drawing made for several sizes the largest,
of drawings equal to the byte the first; other names of a drawing (aliases) become
names in its captions.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.data.documents import Document, Image, Skipped, Text
from cm3leon_jax.data.icon_names import (
    Emoji,
    EmojiNames,
    caption,
    digest,
    parse,
    readable_names,
    split_of,
)
from cm3leon_jax.data.icon_sets import SETS, TRAINING_LICENCES, fetch, load_json

SPLITS = ("train", "validation", "test")
# Captions name every background but white, which six of ten icons stand on.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light blue": (173, 216, 240),
    "light yellow": (250, 238, 170),
    "light grey": (200, 200, 200),
    "dark grey": (64, 64, 64),
}
_WHITE_IN_TEN = 6
# A pixel shows if a channel differs from the background's by more than this; a drawing
# shows if half of what it covers does, and this share of the picture.
_VISIBLE_STEP, _VISIBLE_SHARE = 72, 0.015
# iconify's defaults where neither the icon nor its set says otherwise
_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


@dataclass(frozen=True, kw_only=True)
class IconsConfig:
    """image_size: side of the square pictures in pixels, 8 to 1,024.
    cache: directory for the fetched artwork (210 MB), `~` is the user's home.
    sets: iconify prefixes, a subset of `icon_sets.SETS`.
    """

    image_size: int
    cache: str = "~/.cache/cm3leon_jax/icons"
    sets: tuple[str, ...] = tuple(SETS)

    def __post_init__(self):
        if not 8 <= self.image_size <= 1024:
            raise ValueError(
                f"icons.image_size={self.image_size}: choose 8 to 1024 pixels"
            )
        if not self.cache:
            raise ValueError("icons.cache is empty: name a directory")
        unknown = [prefix for prefix in self.sets if prefix not in SETS]
        if unknown or not self.sets or len(set(self.sets)) < len(self.sets):
            raise ValueError(
                f"icons.sets={self.sets}: choose one or more, each once, of "
                f"{', '.join(SETS)}"
            )


@dataclass(frozen=True, kw_only=True)
class _Icon:
    """An entry of a set's file; `id` is "prefix:name"."""

    id: str
    name: str
    prefix: str
    body: str
    box: tuple[float, float, float, float]  # left, top, width, height
    turn: tuple[bool, bool, int]  # horizontal flip, vertical flip, quarter turns
    info: dict[str, Any] = field(repr=False)
    aliases: tuple[str, ...] = ()
    hidden: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """A drawing that may be used, before it is rendered.

    names: readable ones, the best first. emoji: what it draws, None if that is none.
    subject: the same whoever draws it; the split is drawn by it. style: the phrase
    for its artist's style.
    """

    names: tuple[str, ...]
    emoji: Emoji | None
    subject: str
    style: str
    icon: _Icon = field(repr=False)

    @property
    def id(self) -> str:
        """ "set:name" of iconify."""
        return self.icon.id

    @property
    def facts(self) -> dict[str, str]:
        """Where it comes from, under which licence; JSON-able."""
        info = self.icon.info
        licence, author = info["license"], info.get("author", {})
        return {
            "licence": licence["spdx"],
            "licence_url": licence.get("url", ""),
            "source": info.get("name", self.icon.prefix),
            "set": self.icon.prefix,
            "author": author.get("name", ""),
            "url": author.get("url", ""),
            "name": self.names[0],
            "subject": self.subject,
            "style": self.style,
        }

    def rgba(self, size: int) -> np.ndarray:
        """Rendered, uint8 [size, size, 4]; see `render`.

        Raises ValueError for a drawing that does not render.
        """
        left, top, width, height = self.icon.box
        try:
            rgba = render(self.icon.body, width, height, size, left=left, top=top)
        except Exception as error:  # whatever one drawing does, the others go on
            reason = " ".join(str(error).split())[:80]
            raise ValueError(f"does not render: {reason}") from None
        flip_x, flip_y, quarters = self.icon.turn
        rgba = rgba[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
        return np.rot90(rgba, -quarters)  # iconify turns clockwise


def documents(config: IconsConfig, split: str) -> Iterator[Document | Skipped]:
    """The split's pairs `caption <break> picture`, or why an icon can't be used.

    The order is the same every time and mixes the sets, so that the first n documents
    are a fair sample. Nothing is rendered before it is asked for. Fetches the artwork
    first if the cache is empty (see `icon_sets.fetch` for its errors).

    metadata: licence (SPDX), licence_url, source (set), set (iconify prefix), author,
    url, name, subject, style, background.

    Raises ModuleNotFoundError without the extra `icons`, ValueError for another split.
    """
    for drawing in drawings(config, split):
        if isinstance(drawing, Skipped):
            yield drawing
        else:
            yield _document(drawing, config.image_size)


def drawings(config: IconsConfig, split: str) -> Iterator[Drawing | Skipped]:
    """The split's drawings in the order of `documents`, or why one can't be used.

    Raises what `documents` raises.
    """
    if split not in SPLITS:
        raise ValueError(f"icons: split {split!r} is none of {', '.join(SPLITS)}")
    _resvg()
    directory = fetch(config.cache)
    emoji_names = EmojiNames(directory)
    icons = [icon for prefix in config.sets for icon in _read(directory, prefix)]
    spare = _near_duplicates(icons)
    for icon in sorted(icons, key=lambda icon: digest("order", icon.id)):
        subject = emoji_names.subject(icon.name, icon.prefix)
        if split_of(subject) != split:
            continue
        icon_set, emoji = SETS[icon.prefix], None
        if icon_set.kind != "icon":
            emoji = emoji_names.find(icon.name, icon.prefix)
        names = readable_names(icon.name, icon.prefix, icon.aliases, emoji)
        reason = _unwanted(icon) or spare.get(icon.id)
        if reason or not names:
            yield Skipped(icon.id, reason or "no readable name")
            continue
        style = icon_set.style.format(parse(icon.name, icon.prefix).ending)
        yield Drawing(names=names, emoji=emoji, subject=subject, style=style, icon=icon)


def render(
    body: str,
    width: float,
    height: float,
    size: int,
    *,
    left: float = 0,
    top: float = 0,
) -> np.ndarray:
    """The SVG elements `body` of a box of width × height -> RGBA uint8 [size, size, 4].

    Drawn as large as fits, centred, on transparent ground; alpha is the exact mask and
    not premultiplied. Text is not drawn: fonts differ between machines. References to
    files are not followed. Raises ValueError for what is no SVG.
    """
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{size}" height="{size}">'
        f"{body}</svg>"
    )
    png = _resvg().svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    with Pillow.open(io.BytesIO(bytes(png))) as picture:
        return np.array(picture.convert("RGBA"))


def _resvg():
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "icons are drawn with resvg_py, which is not installed: "
            'pip install "cm3leon-jax[icons]"'
        ) from None
    return resvg_py


def _read(directory: Path, prefix: str) -> Iterator[_Icon]:
    """A set's drawings in the file's order; a turned alias is a drawing of its own."""
    data = load_json(directory, prefix)
    try:
        icons, aliases, info = data["icons"], data.get("aliases", {}), data["info"]
        other_names = defaultdict(list)
        turned = []
        for alias, entry in aliases.items():
            if any(key in entry for key in ("hFlip", "vFlip", "rotate")):
                parent = icons[entry["parent"]]
                turned.append((alias, {**parent, **entry}))
            else:
                other_names[entry["parent"]].append(alias)
        for name, entry in [*icons.items(), *turned]:
            left, top, width, height = (
                float(entry.get(key, data.get(key, default)))
                for key, default in _BOX.items()
            )
            yield _Icon(
                id=f"{prefix}:{name}",
                name=name,
                prefix=prefix,
                body=entry["body"],
                box=(left, top, width, height),
                turn=(
                    bool(entry.get("hFlip")),
                    bool(entry.get("vFlip")),
                    int(entry.get("rotate", 0)) % 4,
                ),
                info=info,
                aliases=tuple(other_names[name]),
                hidden=bool(entry.get("hidden")),
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"icons: {directory / prefix}.json is no iconify set ({error!r}): delete "
            f"{directory} and fetch it again"
        ) from error


def _unwanted(icon: _Icon) -> str | None:
    licence = icon.info.get("license", {}).get("spdx", "")
    if licence not in TRAINING_LICENCES:
        return f"licence {licence or 'unknown'} is not for training"
    if icon.hidden:
        return "withdrawn by its set"
    if "logo" in icon.name.split("-"):
        return "a brand's mark"
    if "<text" in icon.body:
        return "has text, which needs fonts"
    return None


def _near_duplicates(icons: list[_Icon]) -> dict[str, str]:
    """Icon id -> why it is left out beside another drawing of the same set."""
    families = defaultdict(list)
    bodies: dict[tuple, str] = {}
    spare = {}
    for icon in icons:
        if _unwanted(icon):
            continue
        drawing = (icon.prefix, icon.body, icon.turn)
        first = bodies.setdefault(drawing, icon.id)
        if first != icon.id:
            spare[icon.id] = "the same drawing under another name"
            continue
        parsed = parse(icon.name, icon.prefix)
        families[icon.prefix, parsed.family, parsed.ending].append((icon, parsed))
    for members in families.values():
        best = min(parsed.size for _, parsed in members)
        toned = [icon for icon, parsed in members if parsed.tones]
        keep = min(toned, key=lambda icon: digest("tone", icon.id)) if toned else None
        for icon, parsed in members:
            if parsed.size > best:
                spare[icon.id] = "the same drawing for another size"
            elif parsed.tones and icon is not keep:
                spare[icon.id] = "another skin tone"
    return spare


def _document(drawing: Drawing, size: int) -> Document | Skipped:
    try:
        placed = place(drawing.rgba(size), drawing.id)
    except ValueError as error:
        return Skipped(drawing.id, str(error))
    if placed is None:
        return Skipped(drawing.id, "hardly visible")
    picture, background = placed
    tags = drawing.emoji.tags if drawing.emoji else ()
    text = caption(drawing.id, drawing.names, tags, drawing.style, background)
    return Document(
        (Text(text), Image(picture)),
        id=drawing.id,
        metadata={**drawing.facts, "background": background},
    )


def place(rgba_YXC: np.ndarray, identity: str) -> tuple[np.ndarray, str] | None:
    """Lay a drawing on the background drawn by its identity -> (RGB, its name).

    Where most of it would not show (white on white) the next background serves:
    anything opaque shows on white or on dark grey. None if it shows on none.
    """
    names = list(BACKGROUNDS)
    start = 0
    if digest("white", identity) % 10 >= _WHITE_IN_TEN:
        start = 1 + digest("background", identity) % (len(names) - 1)
    for name in names[start:] + names[:start]:
        picture = lay(rgba_YXC, BACKGROUNDS[name])
        if picture is not None:
            return picture, name
    return None


def lay(rgba_YXC: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray | None:
    """A drawing on a ground of one colour -> uint8 [Y, X, 3]; None if it hardly shows.

    It shows if half of what it covers can be told from the ground.
    """
    alpha = rgba_YXC[..., 3:].astype(np.float32) / 255
    ground = np.asarray(colour, np.float32)
    mixed = ground + (rgba_YXC[..., :3].astype(np.float32) - ground) * alpha
    shows = np.abs(mixed - ground).max(-1) > _VISIBLE_STEP
    covered = (alpha[..., 0] > 0.5).sum()
    if shows.mean() < _VISIBLE_SHARE or shows.sum() < covered / 2:
        return None
    return np.rint(mixed).astype(np.uint8)
