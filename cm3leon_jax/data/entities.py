"""The world of entities: shapes with names that do not tell what they look like.

Half of the documents are plain scenes of `data/shapes.py`. The other half show one
entity each: a thing with an invented name of three syllables and a look (shape, colour,
size) that belongs to the name, in any cell on any background. The caption says name,
cell and background, never the look, so that only memory or retrieval can know it.

How often training shows a name follows Zipf's law, at least three times. *Head* names
are those with `head` training documents or more, *tail* names those with exactly three,
*middle* names the others; *new* names are in no training document. Every name has its
own share of the arrangements (cell x background): those of a training document are
never those of a held-out one, so that a look must be put where it was never seen.

Frozen: `tests/test_entities.py` knows a digest of it. Drawn by `data/hashing.py` alone,
but for the plain scenes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from cm3leon_jax.data import shapes
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.data.hashing import hash64, permute, uniform
from cm3leon_jax.data.shapes import CELL_NAMES, HELD_OUT, Object, Scene, ShapesConfig

SPLITS = ("train", "validation", "test", "new")
SYLLABLES = tuple(map("".join, itertools.product("bdfgklmnprtz", "aeiou")))
LEAST = 3  # training documents of a name
BANK, QUERIES = 3, 2  # documents of a new name: for the bank, to be asked for
GROUPS = ("head", "middle", "tail", "new")
WORDINGS = (
    "a {name} at the {cell} on a {background} background",
    "a {background} picture with a {name} at the {cell}",
    "{cell}: {name}, background: {background}",
    "the {name} at the {cell}, {background} background",
    "on {background}, at the {cell}, a {name}",
)
_NAMES, _LOOKS, _ORDER, _PLACES, _ENTITY, _PLACE, _WORDING = range(7)  # purposes


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntitiesConfig(ShapesConfig):
    """`documents` of training, `entity_share` of them of one of `entities` names; `new`
    further names. A name's share falls with its rank to the power of `zipf`. `seed`
    draws names, looks and arrangements."""

    entities: int = 4000
    new: int = 200
    documents: int = 48_000
    entity_share: float = 0.5
    zipf: float = 1.0
    head: int = 20
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.entity_share <= 1 or self.zipf < 0 or self.head <= LEAST:
            raise ValueError(
                f"entities.entity_share={self.entity_share} must be in (0, 1], zipf="
                f"{self.zipf} at least 0, head={self.head} more than {LEAST}"
            )
        most = len(SYLLABLES) ** 3
        if min(self.entities, self.new) < 1 or self.entities + self.new > most:
            raise ValueError(
                f"entities.entities={self.entities} and entities.new={self.new} must "
                f"be positive, and at most {most:,} together"
            )
        shown = round(self.documents * self.entity_share)
        if shown < LEAST * self.entities:
            raise ValueError(
                f"entities.documents={self.documents} show {shown} entities: "
                f"{self.entities} names need {LEAST * self.entities}"
            )
        if self.layout**2 * len(self.backgrounds) < LEAST + 2:
            raise ValueError(
                f"entities.layout={self.layout} and entities.backgrounds="
                f"{self.backgrounds} have too few arrangements for all splits"
            )


@dataclasses.dataclass(frozen=True)
class Entity:
    """A name, its look, its group of `GROUPS`, and the documents that training has."""

    name: str
    size: str
    colour: str
    shape: str
    group: str
    shown: int


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """All names, the new ones last; `places` [names, arrangements] in each name's own
    order. `schedule` [documents] is the name of every training document, -1 for a plain
    scene; `turn` counts the documents of its name before it."""

    entities: tuple[Entity, ...]
    places: np.ndarray
    schedule: np.ndarray
    turn: np.ndarray


@functools.lru_cache(maxsize=4)
def world(config: EntitiesConfig) -> World:
    """The names of a world and where training shows them."""
    seed, known = config.seed, config.entities
    numbers = np.arange(known + config.new)
    total = round(config.documents * config.entity_share)
    counts = frequencies(known, total, config.zipf)
    looks = [
        (size, colour, shape)
        for size in shapes.RADIUS
        for colour, shape in itertools.product(config.colours, config.shapes)
        if (colour, shape) not in HELD_OUT
    ]
    chosen = (uniform(seed, _LOOKS, numbers) * len(looks)).astype(int)
    base = len(SYLLABLES)
    codes = permute(numbers, base**3, seed, _NAMES)
    entities = []
    for n, code, look in zip(numbers, codes, chosen, strict=True):
        name = "".join(SYLLABLES[code // base**i % base] for i in (2, 1, 0))
        shown = int(counts[n]) if n < known else 0
        size, colour, shape = looks[look]
        group = _group(config, shown)
        entities.append(Entity(name, size, colour, shape, group, shown))
    arrangements = config.layout**2 * len(config.backgrounds)
    keys = hash64(seed, _PLACES, numbers[:, None], np.arange(arrangements))
    names = np.full(config.documents, -1)
    names[:total] = np.repeat(numbers[:known], counts)
    order = permute(np.arange(config.documents), config.documents, seed, _ORDER)
    schedule = np.empty_like(names)
    schedule[order] = names
    by_name = np.argsort(schedule, kind="stable")
    sizes = np.bincount(schedule + 1, minlength=known + 1)
    turn = np.empty_like(schedule)
    turn[by_name] = np.arange(len(turn)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return World(tuple(entities), np.argsort(keys, axis=1), schedule, turn)


def frequencies(names: int, total: int, zipf: float) -> np.ndarray:
    """`total` documents for names by rank: int [names], max(3, C / rank^zipf) with the
    largest C that is possible; what rounding leaves goes to the first ranks."""
    shares = 1 / np.arange(1, names + 1) ** zipf

    def counts(scale: float) -> np.ndarray:
        return np.maximum(LEAST, np.floor(scale * shares)).astype(int)

    low, high = 0.0, float(total)
    for _ in range(100):
        middle = (low + high) / 2
        if counts(middle).sum() <= total:
            low = middle
        else:
            high = middle
    found = counts(low)
    rest = total - found.sum()
    return found + rest // names + (np.arange(names) < rest % names)


def _group(config: EntitiesConfig, shown: int) -> str:
    if shown == 0:
        return "new"
    if shown == LEAST:
        return "tail"
    return "head" if shown >= config.head else "middle"


def document(config: EntitiesConfig, split: str, number: int) -> Document:
    """Document `number` of a split: `text <break> image`, with its facts as metadata.

    `group` is "plain" or one of `GROUPS`; with an entity, `entity` is its name, and in
    the split "new" `role` is "bank" or "query". Held-out entities come as often as in
    training. Raises ValueError for a split or number that is not there.
    """
    if split not in SPLITS:
        raise ValueError(f"entities: split {split!r} is none of {', '.join(SPLITS)}")
    count = _size(config, split)
    if number < 0 or (count is not None and number >= count):
        raise ValueError(f"entities: {split} has no document {number}")
    facts = {"licence": "CC0-1.0", "source": "entities"}
    drawn = _draw(config, split, number)
    if drawn is None:
        scene = shapes.scene(config, split, number)
        text = shapes.caption(config, scene, number)
        facts |= {"group": "plain"}
    else:
        entity, place = drawn
        cell, ground = divmod(place, len(config.backgrounds))
        background = config.backgrounds[ground]
        look = Object(cell, entity.size, entity.colour, entity.shape)
        scene = Scene((look,), background)
        draw = uniform(config.seed, _WORDING, SPLITS.index(split), number)
        text = WORDINGS[int(draw * len(WORDINGS))].format(
            name=entity.name,
            cell=CELL_NAMES[config.layout][cell],
            background=background,
        )
        facts |= {"group": entity.group, "entity": entity.name}
    if split == "new":
        facts["role"] = "bank" if number % (BANK + QUERIES) < BANK else "query"
    return Document(
        segments=(Text(text), Image(array=shapes.render(config, scene))),
        id=f"entities/{split}/{number:09d}",
        metadata={"scene": scene.to_json(), **facts},
    )


def _draw(config: EntitiesConfig, split: str, number: int) -> tuple[Entity, int] | None:
    """The entity of a document and its arrangement; None for a plain scene."""
    made = world(config)
    of_split = _shares(made.places.shape[1])
    if split == "train":
        name, turn = int(made.schedule[number]), int(made.turn[number])
        if name < 0:
            return None
    elif split == "new":
        name, turn = divmod(number, BANK + QUERIES)
        name += config.entities
        split, turn = ("train", turn) if turn < BANK else ("test", turn - BANK)
    else:
        share = config.entity_share
        if int((number + 1) * share) == int(number * share):
            return None
        part = SPLITS.index(split)
        ends = np.cumsum([entity.shown for entity in made.entities[: config.entities]])
        draw = uniform(config.seed, _ENTITY, part, number) * ends[-1]
        name = int(np.searchsorted(ends, draw, side="right"))
        turn = int(hash64(config.seed, _PLACE, part, number) % np.uint64(1 << 16))
    mine = made.places[name][of_split[split]]
    return made.entities[name], int(mine[turn % len(mine)])


def _shares(arrangements: int) -> dict[str, slice]:
    """Which of a name's arrangements each split may show."""
    test, validation = max(1, arrangements // 4), max(1, arrangements // 8)
    return {
        "test": slice(0, test),
        "validation": slice(test, test + validation),
        "train": slice(test + validation, arrangements),
    }


def _size(config: EntitiesConfig, split: str) -> int | None:
    if split == "train":
        return config.documents
    return config.new * (BANK + QUERIES) if split == "new" else None


def documents(config: EntitiesConfig, split: str) -> Iterator[Document]:
    """Training and new documents end; of the held-out ones the caller takes some."""
    count = _size(config, split)
    numbers = itertools.count() if count is None else range(count)
    return (document(config, split, number) for number in numbers)
