"""What else can be shown of a scene of `shapes.py`: masks, boxes, depth, scribbles.

Pixels are an object's where it covers at least half of them. Boxes are
(x0, y0, x1, y1) in whole pixels, x1 and y1 just outside the object.
"""

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter

from cm3leon_jax.data import shapes
from cm3leon_jax.data.shapes import RADIUS, SHAPES, Object, Scene, ShapesConfig

CLASSES = ("background", *SHAPES)  # labels of masks: what shape, whatever its colour
Box = tuple[int, int, int, int]
_HALF = 0.48  # coverage comes in sixteenths, rounded
_SUPERSAMPLING = 4
_TWICE = 0.3  # of the scribbled outlines are drawn again over the first line
_STRAY = 0.14  # how far scribbled lines are off, of the object's half extent
_TURN = 9.0  # and how far they are turned, in degrees


def _owned(config: ShapesConfig, scene: Scene) -> np.ndarray:
    """Bool [objects, Y, X]."""
    return shapes.coverage(config, scene) >= _HALF


def mask(config: ShapesConfig, scene: Scene) -> np.ndarray:
    """Labels of `CLASSES`: int32 [Y, X]."""
    labels = np.zeros((config.image_size, config.image_size), np.int32)
    for o, pixels in zip(scene.objects, _owned(config, scene), strict=True):
        labels[pixels] = CLASSES.index(o.shape)
    return labels


def boxes(config: ShapesConfig, scene: Scene) -> list[Box]:
    """The smallest box around each object, in their order."""
    found = []
    for pixels in _owned(config, scene):
        y, x = np.nonzero(pixels)
        found.append((int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1))
    return found


def depth(config: ShapesConfig, scene: Scene) -> np.ndarray:
    """How near things are, as grey levels, near is bright: uint8 [Y, X, 3].

    All objects are taken to be equally big, so what looks half as big is twice as far.
    A level is proportional to 1 / distance, as in the maps of MiDaS: 255 for large
    objects, 158 for small ones, 0 for the background, which is infinitely far.
    """
    levels = np.zeros((config.image_size, config.image_size), np.uint8)
    nearest = max(RADIUS.values())
    for o, pixels in zip(scene.objects, _owned(config, scene), strict=True):
        levels[pixels] = round(255 * RADIUS[o.size] / nearest)
    return np.repeat(levels[..., None], 3, axis=2)


def scribble(
    config: ShapesConfig, scene: Scene, rng: np.random.Generator
) -> np.ndarray:
    """The outlines by an unsteady hand, white on black, uint8 [Y, X, 3].

    Each is drawn once or twice; turned, shifted, stretched and bent at random, with
    lines of one to two pixels that need not meet where they began.
    """
    side = config.image_size * _SUPERSAMPLING
    picture = PILImage.new("L", (side, side))
    pen = ImageDraw.Draw(picture)
    for o in scene.objects:
        for _ in range(1 + (rng.random() < _TWICE)):
            path = _unsteady(config, o, rng) * _SUPERSAMPLING
            width = round(rng.uniform(1.0, 1.7) * _SUPERSAMPLING)
            pen.line([tuple(p) for p in path], 255, width, joint="curve")
    size = (config.image_size, config.image_size)
    soft = picture.filter(ImageFilter.BoxBlur(1)).resize(size, PILImage.Resampling.BOX)
    lines = (np.asarray(soft) >= 96).astype(np.uint8) * 255
    return np.repeat(lines[..., None], 3, axis=2)


def _unsteady(config: ShapesConfig, o: Object, rng: np.random.Generator) -> np.ndarray:
    """A distorted outline, float [points, 2] of (x, y) in pixels."""
    corners = np.array(_corners(o.shape))
    ends = np.concatenate([corners[1:], corners[:1]])
    share = np.linspace(0, 1, 8, endpoint=False)[:, None, None]
    points = (corners * (1 - share) + ends * share).swapaxes(0, 1).reshape(-1, 2)
    points = np.roll(points, -rng.integers(len(points)), axis=0)
    # Slow waves along the line: a hand strays, it does not tremble.
    around = np.linspace(0, 2 * np.pi, len(points))[:, None]
    for wave in (1, 2, 3):
        phase = rng.uniform(0, 2 * np.pi, 2)
        height = rng.uniform(-_STRAY, _STRAY, 2) / wave
        points = points + height * np.sin(wave * around + phase)
    angle = np.deg2rad(rng.uniform(-_TURN, _TURN))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = (
        points @ turn * rng.uniform(0.9, 1.1, 2) + rng.uniform(-_STRAY, _STRAY, 2) / 2
    )
    gap = rng.integers(0, 1 + len(points) // 12)
    points = np.concatenate([points, points[:1]])[: len(points) + 1 - gap]
    cell = config.image_size / config.layout
    centre = (np.array([o.cell % config.layout, o.cell // config.layout]) + 0.5) * cell
    return centre + points * RADIUS[o.size] * cell


def _corners(shape: str) -> list[tuple[float, float]]:
    """Of every shape, in units of the half extent, y downwards."""
    if shape == "circle":
        turns = np.arange(16) * np.pi / 8
        return [(float(np.cos(t)), float(np.sin(t))) for t in turns]
    if shape == "square":
        s = 0.86
        return [(-s, -s), (s, -s), (s, s), (-s, s)]
    if shape == "cross":
        arm, end = shapes._CROSS_ARM, 1.0
        quarter = [(arm, -arm), (end, -arm), (end, arm)]
        corners = list(quarter)
        for _ in range(3):
            quarter = [(-y, x) for x, y in quarter]
            corners += quarter
        return corners
    return shapes.outline(shape)


def cell_box(config: ShapesConfig, cell: int) -> Box:
    """The pixels of a cell of the layout."""
    edges = np.rint(np.arange(config.layout + 1) * config.image_size / config.layout)
    y, x = divmod(cell, config.layout)
    x0, x1, y0, y1 = (int(edges[i]) for i in (x, x + 1, y, y + 1))
    return x0, y0, x1, y1
