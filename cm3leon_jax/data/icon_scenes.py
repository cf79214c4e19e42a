"""Scenes of real artwork: cut-outs of icons on plain grounds, all facts known.

A scene holds one to four cut-outs, each in its own quarter of the picture, small or
large, on one of the grounds of `icons.BACKGROUNDS`. Most are drawings of one artist.
Alpha gives exact masks and boxes; classes are groups of the emoji that are drawn. All
artwork of a split's scenes is of names that the split owns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from cm3leon_jax.data.icon_sets import SETS
from cm3leon_jax.data.icons import (
    BACKGROUNDS,
    Drawing,
    IconsConfig,
    drawings,
    lay,
    place,
)

Rng = np.random.Generator
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the last ones outside

# Class -> emojibase's subgroups, which count through the groups of Unicode.
_SUBGROUPS: dict[str, tuple[int, ...]] = {
    "face": tuple(range(0, 14)),
    "body part": tuple(range(16, 23)),  # hands, for the most part
    "person": tuple(range(23, 32)),
    "animal": tuple(range(34, 40)),
    "plant": (40, 41),
    "food": tuple(range(42, 48)),
    "place": tuple(range(49, 54)),
    "vehicle": (54, 55, 56),
    "sky": (59,),  # and weather
    "activity": tuple(range(60, 65)),  # sports, games, festivals, arts
    "object": (48, 57, 58, *range(65, 83)),
    "symbol": (14, 15, *range(83, 97)),  # hearts too
    "flag": (97, 98, 99),
}
CLASSES: tuple[str, ...] = ("background", *_SUBGROUPS)
_LABELS = {
    subgroup: label
    for label, subgroups in enumerate(_SUBGROUPS.values(), start=1)
    for subgroup in subgroups
}

CELLS = ("top left", "top right", "bottom left", "bottom right")
SIZES = {"small": 0.6, "large": 0.95}  # the longer side, in sides of a cell
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (245, 205, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 180),
    "pink": (240, 120, 190),
    "grey": (140, 140, 140),
}
_LONGEST_NAME = 4  # words; what a scene shows must be short to say
_FEWEST_MATES = 8  # an artist with fewer subjects in the split shares scenes
_TRIES = 30
_CACHED_BYTES = 2**27  # of rendered drawings
_RECOLOURED = 24  # mean difference of a channel that is seen as another colour


def label_of(drawing: Drawing) -> int:
    """The class of what is drawn, 0 where it has none."""
    return _LABELS.get(drawing.emoji.subgroup, 0) if drawing.emoji else 0


@dataclass(frozen=True, kw_only=True)
class Item:
    """A cut-out in a scene. cell: of `CELLS`. at: where in its cell, x and y in [0, 1).
    colour: of `COLOURS`, if it was coloured in.
    """

    drawing: Drawing
    cell: int
    size: str
    at: tuple[float, float]
    colour: str | None = None

    @property
    def name(self) -> str:
        return self.drawing.names[0]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Items in the order of their cells; no cell holds two."""

    items: tuple[Item, ...]
    background: str

    def without(self, cell: int) -> Scene:
        return replace(self, items=tuple(i for i in self.items if i.cell != cell))

    def with_item(self, item: Item) -> Scene:
        """That item instead of what is in its cell."""
        items = (*self.without(item.cell).items, item)
        return replace(self, items=tuple(sorted(items, key=lambda item: item.cell)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Composite:
    """picture: uint8 [Y, X, 3]. mask: labels of `CLASSES`, int32 [Y, X]; a pixel
    belongs to what covers half of it. boxes: tight around each item's mask."""

    picture: np.ndarray
    mask: np.ndarray
    boxes: tuple[Box, ...]


class Artwork:
    """The drawings of a split, by what they have in common, and what they look like.

    singles: all drawings. items: those for scenes: of a class, with a short name.
    by_subject, by_style, by_maker, by_kind, by_subgroup, by_class: lists of singles.
    mates: lists of items by style. Raises what `icons.drawings` raises.
    """

    def __init__(self, config: IconsConfig, split: str):
        self.size = config.image_size
        found = [d for d in drawings(config, split) if isinstance(d, Drawing)]
        self.singles: tuple[Drawing, ...] = tuple(found)
        self.items = tuple(drawing for drawing in found if _fits_scenes(drawing))
        self.by_subject = _grouped(found, lambda d: d.subject)
        self.by_style = _grouped(found, lambda d: d.style)
        self.by_maker = _grouped(found, maker)
        self.by_kind = _grouped(found, kind)
        with_class = [drawing for drawing in found if label_of(drawing)]
        self.by_class = _grouped(with_class, label_of)
        self.by_subgroup = _grouped(with_class, subgroup)
        self.twins = tuple(d for d in found if len(self.others(d)) > 0)
        self._mates = _grouped(self.items, lambda d: d.style)
        kept = _CACHED_BYTES // (4 * self.size**2)
        self._rgba = lru_cache(maxsize=max(64, kept))(self._rendered)

    def others(self, drawing: Drawing) -> list[Drawing]:
        """The same subject by other artists."""
        same = self.by_subject[drawing.subject]
        return [d for d in same if d.icon.prefix != drawing.icon.prefix]

    def mates(self, drawing: Drawing) -> Sequence[Drawing]:
        """What may stand beside it in a scene: drawings in its style if there are
        several, else any."""
        mates = self._mates[drawing.style]
        enough = len({d.subject for d in mates}) >= _FEWEST_MATES
        return mates if enough else self.items

    def single(self, drawing: Drawing, rng: Rng) -> tuple[np.ndarray, str] | None:
        """A picture of one drawing on a ground that is drawn, and the ground's name;
        None where it can't be drawn."""
        key = str(rng.integers(2**62))  # drawn in any case: what follows is the same
        rgba = self._rgba(drawing)
        return None if rgba is None else place(rgba, key)

    def shows(self, item: Item, background: str) -> bool:
        """Whether the item can be told from the ground at its size."""
        stamp = self._stamp(item)
        if stamp is None:
            return False
        rgba, _ = stamp
        covers = rgba[..., 3] >= 128
        return bool(covers.any()) and lay(rgba, BACKGROUNDS[background]) is not None

    def compose(self, scene: Scene) -> Composite:
        """Lays the items on the ground; all of them can be drawn (see `shows`)."""
        picture = np.empty((self.size, self.size, 3), np.float32)
        picture[:] = BACKGROUNDS[scene.background]
        mask = np.zeros((self.size, self.size), np.int32)
        boxes = []
        for item in scene.items:
            stamp = self._stamp(item)
            if stamp is None:
                raise ValueError(f"icons: {item.drawing.id} can't be drawn")
            rgba, (left, top) = stamp
            height, width = rgba.shape[:2]
            window = np.s_[top : top + height, left : left + width]
            alpha = rgba[..., 3:].astype(np.float32) / 255
            picture[window] += (rgba[..., :3] - picture[window]) * alpha
            covers = rgba[..., 3] >= 128
            mask[window][covers] = label_of(item.drawing)
            boxes.append(_bounds(covers, left, top))
        picture = np.rint(picture).astype(np.uint8)
        return Composite(picture=picture, mask=mask, boxes=tuple(boxes))

    def cell_box(self, cell: int) -> Box:
        """The quarter of the picture that is a cell."""
        side = self.size // 2
        x, y = cell % 2 * side, cell // 2 * side
        return x, y, x + side, y + side

    def recoloured(self, item: Item, rng: Rng, background: str) -> Item | None:
        """The item in a colour that changes it and shows; None if no colour does."""
        before = self._stamp(item)
        for name in rng.permutation(list(COLOURS)):
            coloured = replace(item, colour=str(name))
            after = self._stamp(coloured)
            if before and after and self.shows(coloured, background):
                covers = before[0][..., 3] >= 128
                change = np.abs(after[0].astype(int) - before[0])[covers][:, :3]
                if change.mean() >= _RECOLOURED:
                    return coloured
        return None

    def _rendered(self, drawing: Drawing) -> np.ndarray | None:
        try:
            return drawing.rgba(self.size)
        except ValueError:
            return None

    def _stamp(self, item: Item) -> tuple[np.ndarray, tuple[int, int]] | None:
        """RGBA of the scaled cut-out, and its left and top in the picture."""
        rgba = self._rgba(item.drawing)
        covered = None if rgba is None else rgba[..., 3] >= 128
        if rgba is None or covered is None or not covered.any():
            return None
        x0, y0, x1, y1 = _bounds(covered, 0, 0)
        picture = Pillow.fromarray(np.ascontiguousarray(rgba[y0:y1, x0:x1]))
        left, top, right, _ = self.cell_box(item.cell)
        side = right - left
        scale = SIZES[item.size] * side / max(picture.size)
        width, height = (max(1, round(n * scale)) for n in picture.size)
        picture = picture.resize((width, height), Pillow.Resampling.LANCZOS)
        if item.colour:
            picture = _coloured(picture, COLOURS[item.colour])
        left += int(item.at[0] * (side - width + 1))
        top += int(item.at[1] * (side - height + 1))
        return np.asarray(picture), (left, top)


def draw(
    artwork: Artwork,
    rng: Rng,
    lead: Drawing,
    *,
    count: int,
    cells: Sequence[int] | None = None,
    copies: int = 0,
) -> Scene | None:
    """A scene of `count` items, all of different subjects but `copies` more of `lead`.

    cells: of the items, `lead` first; drawn where None. None if `lead` does not show,
    or nothing else does.
    """
    scene = Scene(items=(), background=str(rng.choice(list(BACKGROUNDS))))
    places = rng.permutation(len(CELLS)) if cells is None else cells
    for number, cell in enumerate(places[:count]):
        if number <= copies:
            item = _item(rng, lead, int(cell))
            if not artwork.shows(item, scene.background):
                return None
        else:
            item = fresh(artwork, rng, scene, artwork.mates(lead), int(cell))
            if item is None:
                return None
        scene = scene.with_item(item)
    return scene


def fresh(
    artwork: Artwork, rng: Rng, scene: Scene, pool: Sequence[Drawing], cell: int
) -> Item | None:
    """An item for a cell whose subject the scene has not, None if none is found."""
    subjects = {item.drawing.subject for item in scene.items}
    names = {item.name for item in scene.items}
    for _ in range(_TRIES):
        item = _item(rng, pool[int(rng.integers(len(pool)))], cell)
        if item.drawing.subject not in subjects and item.name not in names:
            if artwork.shows(item, scene.background):
                return item
    return None


def to_json(scene: Scene, composite: Composite) -> dict[str, Any]:
    """The scene's facts."""
    objects = []
    for item, box in zip(scene.items, composite.boxes, strict=True):
        objects.append(
            {
                "id": item.drawing.id,
                "name": item.name,
                "class": CLASSES[label_of(item.drawing)],
                "cell": item.cell,
                "size": item.size,
                "colour": item.colour,
                "box": list(box),
            }
        )
    return {"background": scene.background, "objects": objects}


def maker(drawing: Drawing) -> str:
    """Who made its set; the maker of one set may have made others."""
    return drawing.facts["author"] or drawing.icon.prefix


def kind(drawing: Drawing) -> str:
    """ "emoji", "flag" or "icon"."""
    return SETS[drawing.icon.prefix].kind


def subgroup(drawing: Drawing) -> int:
    """Unicode's subgroup of what is drawn, as "animal-mammal"; -1 if it has none."""
    return drawing.emoji.subgroup if drawing.emoji else -1


def _grouped(found: Iterable[Drawing], key) -> defaultdict[Any, list[Drawing]]:
    groups = defaultdict(list)
    for drawing in found:
        groups[key(drawing)].append(drawing)
    return groups


def _fits_scenes(drawing: Drawing) -> bool:
    # A comma would make two things of one in a list of names.
    name = drawing.names[0]
    short = len(name.split()) <= _LONGEST_NAME and "," not in name
    return bool(label_of(drawing)) and short


def _item(rng: Rng, drawing: Drawing, cell: int) -> Item:
    x, y = rng.random(2)
    size = str(rng.choice(list(SIZES)))
    return Item(drawing=drawing, cell=cell, size=size, at=(float(x), float(y)))


def _bounds(covers_YX: np.ndarray, left: int, top: int) -> Box:
    rows, columns = (np.flatnonzero(covers_YX.any(axis)) for axis in (1, 0))
    return (
        left + int(columns[0]),
        top + int(rows[0]),
        left + int(columns[-1]) + 1,
        top + int(rows[-1]) + 1,
    )


def _coloured(picture: Pillow.Image, colour: tuple[int, int, int]) -> Pillow.Image:
    """Shades of one colour: what was of middling lightness gets it, black and white
    stay."""
    grey, alpha = picture.convert("RGB").convert("L"), picture.getchannel("A")
    shown = np.asarray(grey)[np.asarray(alpha) >= 128]
    middle = int(np.clip(np.median(shown) if shown.size else 128, 64, 192))
    shades = ImageOps.colorize(grey, "black", "white", mid=colour, midpoint=middle)  # pyright: ignore[reportArgumentType]
    shades.putalpha(alpha)
    return shades
