"""What all scores of the shapes world are made of: wanted and found objects, and F1."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.shapes import Object, Scene, ShapesConfig
from cm3leon_jax.evaluation import oracle
from cm3leon_jax.evaluation.kept import digest
from cm3leon_jax.evaluation.protocol import Sample, Score, interval

Objects = frozenset[Object]


def world_of(model: CM3Leon) -> ShapesConfig:
    """ValueError for a system that was trained on anything else."""
    world = model.system.source
    if not isinstance(world, ShapesConfig):
        raise ValueError(
            f"{model.system.name} was not trained on shapes: the oracle can't score it"
        )
    return world


def shown(document: Document, key: str = "scene") -> Scene:
    """The scene that metadata tells: `scene`, or `target_scene` of a task."""
    return Scene.from_json(document.metadata[key])


def wanted(documents: Sequence[Document], key: str = "scene") -> list[Objects]:
    return [frozenset(shown(d, key).objects) for d in documents]


def parsed(model: CM3Leon, pictures: Sequence[Pillow.Image]) -> list[Objects]:
    world = world_of(model)
    return [oracle.parse(world, np.asarray(picture)) for picture in pictures]


def pictures(documents: Sequence[Any]) -> list[Pillow.Image]:
    """Of pairs `text <break> image`."""
    return [Pillow.fromarray(d.segments[1].array) for d in documents]


def captions(documents: Sequence[Any]) -> list[str]:
    return [d.segments[0].text for d in documents]


def f1(
    wanted: Sequence[Any], found: Sequence[Any], clusters: Sequence[Hashable]
) -> Score:
    """F1 of two sets a picture, which may hold anything. A small world repeats itself:
    pictures with equal `clusters` (the arrangement asked for, as a rule) count as one
    observation for the interval."""
    counts = oracle.object_counts(wanted, found)
    return interval(counts, oracle.f1, counts[:, 2].sum(), clusters)


def share(values: Sequence[Any] | np.ndarray) -> Score:
    """The mean of what was found of every example: of truth values, what is right."""
    return interval(np.array(values, float), np.mean, len(values))


def ratio(counts_B2: np.ndarray, n: int | None = None) -> Score:
    """Of what there is (the second of each row) the share that is right (the first),
    both added up before they are divided; `n` counts what there is unless given."""

    def value(rows: np.ndarray) -> float:
        right, every = rows.sum(0)
        return float(right / max(every, 1))

    return interval(counts_B2, value, counts_B2[:, 1].sum() if n is None else n)


def samples(
    texts: Sequence[str],
    pictures: Sequence[Pillow.Image],
    wanted: Sequence[Any],
    found: Sequence[Any],
) -> list[Sample]:
    """Texts with their pictures, right where all wanted was found and no more."""
    rows = zip(texts, pictures, wanted, found, strict=True)
    return [
        Sample(text=text, pictures={"picture": x}, ok=w == f, note=difference(w, f))
        for text, x, w, f in rows
    ]


def partial(scores: dict[str, Any], all_: Sequence[Any], some: Sequence[Any]) -> None:
    """Says of scores that they are of `some` documents, which fit into the context."""
    for score in scores.values():
        score["left_out"] = len(all_) - len(some)
        score.names = digest([score.names, [document.id for document in some]])


def columns(pairs: Sequence[tuple]) -> tuple[list, list]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def difference(wanted: Any, found: Any) -> str:
    """Which objects are missing and which nobody asked for, in words."""

    def names(objects):
        told = [  # of short captions colour and shape are known
            (o.size, o.colour, o.shape) if isinstance(o, Object) else o[:2]
            for o in sorted(objects)
        ]
        return ", ".join(" ".join(facts) for facts in told)

    missing, extra = wanted - found, found - wanted
    parts = [f"missing: {names(missing)}"] if missing else []
    return "; ".join(parts + ([f"extra: {names(extra)}"] if extra else []))
