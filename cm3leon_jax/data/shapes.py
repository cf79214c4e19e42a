"""The shapes world: procedural scenes whose every fact is known.

A scene holds 1 to `max_objects` objects (shape x colour x size), each in its own cell
of a `layout` x `layout` grid, on a flat background. It is a pure function of
(config, split, seed). A split owns scenes by the hash of their contents, so a test
scene is an arrangement of objects that training has never seen, and the pairs in
`HELD_OUT` (colour, shape) occur in no scene unless they are asked for.

`evaluation/oracle.py` reads pictures and captions back into objects; it shares the
names and the geometry constants below with this file, but none of its drawing code.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from cm3leon_jax.data.documents import Document, Image, Text

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 205, 40),
    "purple": (140, 50, 180),
    "orange": (245, 130, 30),
    "cyan": (50, 195, 215),
    "pink": (240, 120, 190),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (15, 15, 15),
    "grey": (150, 150, 150),
    "cream": (250, 235, 200),
}
RADIUS = {"small": 0.26, "large": 0.42}  # half the object's extent, in cell sides
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
CELL_NAMES = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: (
        *("top left", "top center", "top right"),
        *("middle left", "center", "middle right"),
        *("bottom left", "bottom center", "bottom right"),
    ),
}
HELD_OUT = frozenset(
    {("red", "triangle"), ("blue", "circle"), ("yellow", "cross"), ("cyan", "star")}
)
SPLITS = {"train": range(0, 90), "validation": range(90, 95), "test": range(95, 100)}
_ATTEMPTS = 5_000
_SUPERSAMPLING = 4
_STAR_INNER_RADIUS = 0.45  # of the outer radius
_CROSS_ARM = 0.36  # half the width of an arm, of the radius

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Which part of the world is in use. `image_size` is in pixels."""

    image_size: int = 64
    layout: int = 3
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    max_objects: int = 3

    def __post_init__(self):
        for name, allowed in (
            ("shapes", SHAPES),
            ("colours", COLOURS),
            ("backgrounds", BACKGROUNDS),
        ):
            unknown = set(getattr(self, name)) - set(allowed)
            if unknown or not getattr(self, name):
                raise ValueError(
                    f"shapes.{name}={getattr(self, name)}: choose from {list(allowed)}"
                )
        if self.layout not in CELL_NAMES:
            raise ValueError(f"shapes.layout={self.layout}: choose 2 or 3")
        if not 1 <= self.max_objects <= self.layout**2:
            raise ValueError(
                f"shapes.max_objects={self.max_objects}: "
                f"a layout of {self.layout}x{self.layout} holds 1 to {self.layout**2}"
            )
        if self.image_size < 16 * self.layout:
            raise ValueError(
                f"shapes.image_size={self.image_size}: a cell needs at least 16 "
                f"pixels, so at least {16 * self.layout}"
            )


@dataclasses.dataclass(frozen=True, order=True)
class Object:
    """One object; `cell` counts the layout's cells in raster order."""

    cell: int
    size: str
    colour: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """`objects` are sorted by cell; no cell holds two."""

    objects: tuple[Object, ...]
    background: str

    def to_json(self) -> dict:
        return {
            "background": self.background,
            "objects": [dataclasses.asdict(o) for o in self.objects],
        }

    @classmethod
    def from_json(cls, value: dict) -> "Scene":
        return cls(tuple(Object(**o) for o in value["objects"]), value["background"])


def scene(
    config: ShapesConfig, split: str, seed: int, *, held_out: bool = False
) -> Scene:
    """Draws the scene of `seed` in `split`; a pure function of its arguments.

    With `held_out`, at least one object is a pair of `HELD_OUT`, else none is.
    """
    rng = np.random.default_rng([seed, SPLITS[split].start, held_out])
    return draw(config, split, rng, held_out=held_out)


def draw(
    config: ShapesConfig,
    split: str | None,
    rng: np.random.Generator,
    *,
    held_out: bool = False,
    count: int | None = None,
) -> Scene:
    """The next scene of `split` (None: of any) that `rng` comes to, with `count`
    objects (None: as many as it comes to); `held_out` as in `scene`."""
    pairs = list(itertools.product(config.colours, config.shapes))
    seen = [pair for pair in pairs if pair not in HELD_OUT]
    unseen = [pair for pair in pairs if pair in HELD_OUT]
    if held_out and not unseen:
        raise ValueError("this world has no held-out pair of colour and shape")
    while True:
        some = rng.integers(1, config.max_objects + 1) if count is None else count
        cells = sorted(rng.choice(config.layout**2, size=some, replace=False))
        objects = []
        for i, cell in enumerate(cells):
            choices = unseen if held_out and i == 0 else seen
            colour, shape = choices[rng.integers(len(choices))]
            size = tuple(RADIUS)[rng.integers(len(RADIUS))]
            objects.append(Object(int(cell), size, colour, shape))
        background = config.backgrounds[rng.integers(len(config.backgrounds))]
        if split is None or owns(split, objects):
            return Scene(tuple(objects), background)


def owns(split: str, objects: Sequence[Object]) -> bool:
    """Whether this arrangement of objects, sorted by cell, belongs to `split`."""
    digest = hashlib.sha256(repr(list(objects)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 in SPLITS[split]


def allowed(config: ShapesConfig, split: str, objects: Sequence[Object]) -> bool:
    """Whether `scene` could have drawn these objects (sorted by cell) for `split`."""
    return (
        1 <= len(objects) <= config.max_objects
        and not HELD_OUT & {(o.colour, o.shape) for o in objects}
        and owns(split, objects)
    )


def search(attempt: Callable[[], Found | None], what: str) -> Found:
    """The first of many random attempts that gives something; ValueError if none."""
    for _ in range(_ATTEMPTS):
        found = attempt()
        if found is not None:
            return found
    raise ValueError(
        f"shapes: no {what} in {_ATTEMPTS:,} attempts: this world is too small for it, "
        "allow more shapes, colours or objects"
    )


def render(config: ShapesConfig, scene: Scene) -> np.ndarray:
    """Draws the scene anti-aliased: uint8 [Y, X, 3]."""
    fills = [COLOURS[o.colour] for o in scene.objects]
    return _paint(config, scene.objects, fills, BACKGROUNDS[scene.background])


def coverage(config: ShapesConfig, scene: Scene) -> np.ndarray:
    """The share of every pixel that each object covers: float32 [objects, Y, X]."""
    white, black = (255, 255, 255), (0, 0, 0)
    inks = [_paint(config, [o], [white], black)[..., 0] for o in scene.objects]
    return np.stack(inks).astype(np.float32) / 255


def _paint(
    config: ShapesConfig, objects: Sequence[Object], fills: Sequence, ground: tuple
) -> np.ndarray:
    side = config.image_size * _SUPERSAMPLING
    picture = PILImage.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(picture)
    cell = side / config.layout
    for o, fill in zip(objects, fills, strict=True):
        x = (o.cell % config.layout + 0.5) * cell
        y = (o.cell // config.layout + 0.5) * cell
        _draw(pen, o.shape, x, y, RADIUS[o.size] * cell, fill)
    size = (config.image_size, config.image_size)
    return np.asarray(picture.resize(size, PILImage.Resampling.BOX))


def _draw(pen: ImageDraw.ImageDraw, shape: str, x, y, r, colour) -> None:
    """Draws one shape of half extent r around (x, y), in supersampled pixels."""
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=colour)
    elif shape == "square":
        s = 0.86 * r
        pen.rectangle((x - s, y - s, x + s - 1, y + s - 1), fill=colour)
    elif shape == "cross":
        a = _CROSS_ARM * r
        pen.rectangle((x - r, y - a, x + r - 1, y + a - 1), fill=colour)
        pen.rectangle((x - a, y - r, x + a - 1, y + r - 1), fill=colour)
    else:
        pen.polygon([(x + r * u, y + r * v) for u, v in outline(shape)], fill=colour)


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of the polygonal shapes in units of the half extent, y downwards."""
    if shape == "triangle":
        return [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)]
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, _STAR_INNER_RADIUS, 1.0)
    return [
        (float(r * np.cos(a)), float(r * np.sin(a)))
        for a, r in zip(angles, radii, strict=True)
    ]


def caption(config: ShapesConfig, scene: Scene, seed: int) -> str:
    """Says the whole scene in one of several wordings, drawn from `seed`."""
    rng = np.random.default_rng([seed, 1])
    names = CELL_NAMES[config.layout]
    phrases = []
    form = rng.integers(3)
    for o in rng.permutation(np.array(scene.objects, dtype=object)):
        size = SIZE_WORDS[o.size][rng.integers(len(SIZE_WORDS[o.size]))]
        thing = f"{size} {o.colour} {o.shape}"
        if form == 2:
            phrases.append(f"{names[o.cell]}: {thing}")
        else:
            phrases.append(f"a {thing} at the {names[o.cell]}")
    if form == 2:
        return f"{', '.join(phrases)}, background: {scene.background}"
    if form == 1:
        return f"a {scene.background} picture with {' and '.join(phrases)}"
    return f"{' and '.join(phrases)} on a {scene.background} background"


def document(config: ShapesConfig, split: str, seed: int, **options) -> Document:
    """The pair `text <break> image` of one scene, with its facts as metadata."""
    drawn = scene(config, split, seed, **options)
    return Document(
        segments=(
            Text(caption(config, drawn, seed)),
            Image(array=render(config, drawn)),
        ),
        id=f"shapes/{split}/{seed:09d}",
        metadata={"scene": drawn.to_json(), "licence": "CC0-1.0", "source": "shapes"},
    )


def documents(config: ShapesConfig, split: str) -> Iterator[Document]:
    """Endless: the caller decides how many it takes."""
    return (document(config, split, seed) for seed in itertools.count())
