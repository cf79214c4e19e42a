"""The world of entities: is a look known, by heart or from retrieved documents?

`GROUP@K` of the task `entity` is the share of attributes (shape, colour, size) that
are right where a caption of an entity of that group is drawn with K retrieved
documents, `GROUP@K_oracle` the same with K documents that surely have its name, and
`chance_GROUP` what the commonest attributes of the group score. The memory holds the
new names' documents too: it is given them after training, and only for this.
`new@2_removed` is after these were taken out again, `tail@2_swapped` with a memory of
other documents in its place: both of fewer queries, and near `@0` where documents are
what is known.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.codec import Codec
from cm3leon_jax.data import entities
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.entities import BANK, QUERIES, EntitiesConfig
from cm3leon_jax.data.hashing import uniform
from cm3leon_jax.data.shapes import Object
from cm3leon_jax.evaluation import oracle
from cm3leon_jax.evaluation.kept import note
from cm3leon_jax.evaluation.protocol import Evaluator, Outcome, Sample, Score, interval
from cm3leon_jax.sampling.engine import Engine

GROUPS = ("head", "tail", "new")
PER_GROUP = 340  # queries, of three attributes each
PER_RECALL = 1000  # queries that are looked up only
FEW = 100  # queries of a changed memory, and with random documents five times as many
OTHERS = 1000  # documents of a memory that is swapped in
MOST = 2  # retrieved documents, as in the paper's Table 1
_RANDOM = 601  # purpose of the random numbers of `_random`

Found = list[list[Document]]  # for each query, best first


def entity(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Names drawn with 0, 1 and 2 documents; without a memory, with none."""
    world = _world(model)
    scores: dict[str, Score] = {}
    samples: list[list[Sample]] = []
    asked = _queries(world, documents, PER_GROUP)
    note(model, "entity", asked)
    for group, queries in asked.items():
        common = _commonest([_look(query) for query in queries])
        scores[f"chance_{group}"] = _attributes(queries, [common] * len(queries))
        given: dict[str, Found] = {"0": [[] for _ in queries]}
        if _has_memory(model, world):
            found, right = retrieved(model, queries), same_name(world, queries)
            for k in range(1, MOST + 1):
                given[f"{k}"] = [row[:k] for row in found]
                given[f"{k}_oracle"] = [row[:k] for row in right]
        shown: list[dict[str, Any]] = [{} for _ in queries]
        looks: list[Look] = []
        changed = _changed(model, world, group, queries[:FEW])
        for name, rows in (given | changed).items():
            mine = queries[: len(rows)]
            pictures = _painted(model, mine, rows, seed)
            seen = [_seen(world, *x) for x in zip(mine, pictures, strict=True)]
            scores[f"{group}@{name}"] = _attributes(mine, seen)
            if name in given:
                looks = seen
                for place, picture in zip(shown, pictures, strict=True):
                    place[f"with {name.replace('_', ' ')}"] = picture
        last = given.get(str(MOST), given["0"])
        samples.append([])
        for query, place, row, look in zip(queries, shown, last, looks, strict=True):
            before = {f"retrieved {i + 1}": _picture(d) for i, d in enumerate(row)}
            sample = Sample(
                text=_text(query),
                pictures=before | place | {"truth": _picture(query)},
                ok=look == _look(query),
                note="; ".join([group, *map(_text, row)]),
            )
            samples[-1].append(sample)
    # The groups take turns: a report shows the first few.
    turns = itertools.zip_longest(*samples)
    return Outcome(scores, [sample for turn in turns for sample in turn if sample])


def retrieve(model: CM3Leon, documents: Sequence[Document], _: int) -> Outcome:
    """`recall@2_GROUP`: how often one of the two documents found for a caption has its
    name; `right@2_GROUP`: the share of the documents found that have it. Of up to
    1,000 documents of a group, as many as there are: `n` of the score."""
    world = _world(model)
    if not _has_memory(model, world):
        raise ValueError(f"{model.system.name} has no memory to retrieve from")
    scores: dict[str, Score] = {}
    asked = _queries(world, documents, PER_RECALL)
    note(model, "retrieve", asked)
    for group, queries in asked.items():
        names = [query.metadata["entity"] for query in queries]
        found = retrieved(model, queries)
        same = [
            [d.metadata.get("entity") == name for d in row]
            for name, row in zip(names, found, strict=True)
        ]
        right = np.array([[any(x), sum(x) / max(len(x), 1)] for x in same], float)
        n = len(names)
        for i, measure in enumerate(("recall", "right")):
            scores[f"{measure}@{MOST}_{group}"] = interval(
                right[:, i], np.mean, n, names
            )
    return Outcome(scores)


def likelihood(model: CM3Leon, documents: Sequence[Document], _: int) -> Outcome:
    """Nats per image token of a query after K retrieved documents and its own text:
    `nats@K` of all documents, `GROUP@K` of a group's. `nats@2_random` is after random
    documents, of the first 500, `nats@0_same` and `nats@2_same` of the same ones."""
    world = _world(model)
    groups = np.array([document.metadata["group"] for document in documents])
    # Documents of a name are alike: an interval is over names.
    names = [document.metadata.get("entity", document.id) for document in documents]
    given: dict[int, Found] = {0: [[] for _ in documents]}
    if _has_memory(model, world):
        found = retrieved(model, documents)
        given |= {k: [row[:k] for row in found] for k in range(1, MOST + 1)}
    scores: dict[str, Score] = {}
    every, few = np.arange(len(documents)), np.arange(len(documents))[: 5 * FEW]

    def mean(nats: np.ndarray, own: np.ndarray) -> Score:
        return interval(nats[own], np.mean, len(own), [names[i] for i in own])

    for k, rows in given.items():
        ids, starts = query_rows(model.codec, documents, rows)
        nats = nats_per_token(model.engine, ids, starts)
        scores[f"nats@{k}"] = mean(nats, every)
        for group in sorted(set(groups.tolist())):
            scores[f"{group}@{k}"] = mean(nats, every[groups == group])
        if len(given) > 1 and k in (0, MOST):
            scores[f"nats@{k}_same"] = mean(nats, few)
    if len(given) > 1:
        random = _random(world, len(few))
        ids, starts = query_rows(model.codec, documents[: len(few)], random)
        nats = nats_per_token(model.engine, ids, starts)
        scores[f"nats@{MOST}_random"] = mean(nats, few)
    return Outcome(scores)


TASKS: dict[str, Evaluator] = {
    "entity": entity,
    "retrieve": retrieve,
    "likelihood": likelihood,
}


def query_rows(
    codec: Codec, documents: Sequence[Document], found: Found
) -> tuple[list[np.ndarray], list[int]]:
    """`<eos> (document <break>)×K text <break> image` of pairs as ids, and where in
    each row the query's image begins."""
    eos, brk = np.array([[codec.layout.eos], [codec.layout.brk]], np.int32)
    flat = [document for row in found for document in row]
    retrieved = iter(codec.ids(flat) if flat else ())
    rows = []
    for ids, row in zip(codec.ids(documents), found, strict=True):
        parts = [part for _ in row for part in (next(retrieved), brk)]
        rows.append(np.concatenate([eos, *parts, ids]))
    return rows, [len(row) - codec.image_tokens for row in rows]


def nats_per_token(
    engine: Engine, rows: Sequence[np.ndarray], starts: Sequence[int]
) -> np.ndarray:
    """Mean negative log-likelihood of the ids from each start on: float64 [rows]."""
    counts = [len(row) - start for row, start in zip(rows, starts, strict=True)]
    return -np.array(engine.score(rows, starts)) / counts


def retrieved(model: CM3Leon, queries: Sequence[Document]) -> Found:
    """What the model's memory, with the new names in it, has for each caption; nothing
    where it has no memory."""
    if not _has_memory(model, _world(model)):
        return [[] for _ in queries]
    assert model.memory is not None
    texts = [_text(query) for query in queries]
    return model.memory.find(texts, [None] * len(texts), MOST)


def same_name(world: EntitiesConfig, queries: Sequence[Document]) -> Found:
    """Two documents of each query's name: what a perfect retriever finds."""
    made = entities.world(world)
    numbers = {entity.name: n for n, entity in enumerate(made.entities)}
    found = []
    for query in queries:
        n = numbers[query.metadata["entity"]]
        if n < world.entities:
            rows = np.flatnonzero(made.schedule == n)[:MOST].tolist()
            found.append([entities.document(world, "train", row) for row in rows])
        else:
            first = (n - world.entities) * (BANK + QUERIES)
            rows = range(first, first + MOST)
            found.append([entities.document(world, "new", row) for row in rows])
    return found


def added(world: EntitiesConfig) -> list[Document]:
    """The documents of the new names that a memory is given after training."""
    new = entities.documents(world, "new")
    return [document for document in new if document.metadata["role"] == "bank"]


def _changed(
    model: CM3Leon, world: EntitiesConfig, group: str, queries: Sequence[Document]
) -> dict[str, Found]:
    """What is found for new names without their documents, and for tail names by
    another memory; afterwards the memory is as it was."""
    if not _has_memory(model, world):
        return {}
    assert model.memory is not None
    texts = [_text(query) for query in queries]
    if group == "new":
        gone = added(world)
        model.memory.remove([document.id for document in gone], keep=False)
        found = model.memory.find(texts, [None] * len(texts), MOST)
        model.memory.add(gone, keep=False)
        return {f"{MOST}_removed": found}
    if group == "tail":
        every = entities.documents(world, "train")
        others = (d for d in every if d.metadata["group"] != "tail")
        memory = model.memory.other(list(itertools.islice(others, OTHERS)))
        return {f"{MOST}_swapped": memory.find(texts, [None] * len(texts), MOST)}
    return {}


def _random(world: EntitiesConfig, count: int) -> Found:
    """Random training documents, the same each time."""
    draws = uniform(0, _RANDOM, np.arange(count)[:, None], np.arange(MOST))
    rows = (draws * world.documents).astype(np.int64).tolist()
    return [[entities.document(world, "train", n) for n in row] for row in rows]


def _world(model: CM3Leon) -> EntitiesConfig:
    world = model.system.source
    if not isinstance(world, EntitiesConfig):
        raise ValueError(f"{model.system.name} was not trained on entities")
    return world


def _queries(
    world: EntitiesConfig, documents: Sequence[Document], most: int
) -> dict[str, list[Document]]:
    """At most `most` documents of each group, to be asked for."""
    new = entities.documents(world, "new")
    asked = [d for d in new if d.metadata["role"] == "query"]
    # Every name once before any comes again.
    asked = [d for turn in range(QUERIES) for d in asked[turn::QUERIES]]
    by_group = {
        group: [d for d in documents if d.metadata["group"] == group][:most]
        for group in GROUPS[:-1]
    }
    by_group["new"] = asked[:most]
    for group, queries in by_group.items():
        if not queries:
            raise ValueError(f"no held-out document of a {group} name: take more")
    return by_group


def _has_memory(model: CM3Leon, world: EntitiesConfig) -> bool:
    """Whether the model retrieves; if so, its memory holds the new names now."""
    if model.memory is None:
        return False
    known = set(model.memory.ids)
    model.memory.add([d for d in added(world) if d.id not in known], keep=False)
    return True


def _painted(
    model: CM3Leon, queries: Sequence[Document], given: Found, seed: int
) -> list[Pillow.Image]:
    prompts = [_text(query) for query in queries]
    if not any(given):
        return model.text_to_image(prompts, seed=seed)
    return model.text_to_image(prompts, retrieve=given, seed=seed)


Look = tuple[str, str, str]  # shape, colour, size


def _look(document: Document) -> Look:
    (thing,) = document.metadata["scene"]["objects"]
    return thing["shape"], thing["colour"], thing["size"]


def _seen(world: EntitiesConfig, query: Document, picture: Pillow.Image) -> Look:
    """The look of what was painted; nothing is right where it stands in another cell
    than was asked for, or not alone."""
    (thing,) = query.metadata["scene"]["objects"]
    objects: list[Object] = list(oracle.parse(world, np.asarray(picture)))
    if [o.cell for o in objects] != [thing["cell"]]:
        return "", "", ""
    return objects[0].shape, objects[0].colour, objects[0].size


def _attributes(queries: Sequence[Document], looks: Sequence[Look]) -> Score:
    right = np.array(
        [
            [a == b for a, b in zip(_look(query), look, strict=True)]
            for query, look in zip(queries, looks, strict=True)
        ],
        float,
    )
    names = [query.metadata["entity"] for query in queries]
    return interval(right, np.mean, right.size, names)


def _commonest(looks: Sequence[Look]) -> Look:
    shape, colour, size = (
        Counter(values).most_common(1)[0][0] for values in zip(*looks, strict=True)
    )
    return shape, colour, size


def _text(document: Any) -> str:
    return document.segments[0].text


def _picture(document: Any) -> Pillow.Image:
    return Pillow.fromarray(document.segments[1].array)
