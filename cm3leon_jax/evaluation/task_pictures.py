"""Scores of tasks that paint from more than a text, and of class maps.

| task | key | what |
|---|---|---|
| text_to_image | objects_unseen_wording | F1 of exact objects |
| control_KIND | layout | F1 of (shape, size, place): what the control picture shows |
| | objects | F1 of exact objects, colours from the caption |
| ground | iou | of every box asked for with the box of that thing, 0 without one |
| | objects | F1 of exact objects |
| reference_style | accuracy | F1 of what is to be taken over: by strength the |
| | | background, of every object the colour, the size |
| reference_composition | layout | the same: places, sizes, background |
| reference_content | objects | the same: shapes, colours, sizes, wherever they are, |
| | | so these are not the exact objects of the other tasks |
| reference_… | exact | F1 of exact objects: the caption's part is right too |
| | …_STRENGTH | by strength |
| | …_handed_back | what a copy of the reference would get |
| reference_scales | KIND_MEASURE_SCALE, | how much a reference counts, by the scale |
| | KIND_exact_SCALE | of its picture in guidance (the text's is the config's) |
| variation | objects | F1 of (colour, shape) and the background |
| | different | pictures whose places or sizes are not those of the first |
| segment | miou, ceiling, … | `segmentation.py` |
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data import controls
from cm3leon_jax.data.documents import Document, highest_label
from cm3leon_jax.data.shapes import Object
from cm3leon_jax.data.tasks import STRENGTHS
from cm3leon_jax.evaluation import oracle, scenes, segmentation, shapes
from cm3leon_jax.evaluation.examples import (
    UNSEEN,
    Scorer,
    asked,
    column,
    drawn,
    evaluator,
    objects,
    picture,
)
from cm3leon_jax.evaluation.protocol import Evaluator, Outcome, Sample, Score
from cm3leon_jax.evaluation.task_report import COPIED
from cm3leon_jax.sampling.sampler import Sampler

CONTROLS = ("edge", "scribble", "segmentation", "depth")
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
REFERENCES = {"style": "accuracy", "composition": "layout", "content": "objects"}
_TARGET = "target_scene"
_PLACED = ("shape", "size", "cell")


def text_to_image(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """As before tuning, and in wordings that neither run has seen."""
    found = shapes.text_to_image(model, documents, seed)
    others = drawn(model, "text_to_image", len(documents), objects, unseen=True)
    new = shapes.text_to_image(model, others, seed).scores["objects"]
    return Outcome(found.scores | {f"objects_{UNSEEN}": new}, found.samples)


def _control(kind: str) -> Scorer:
    def control(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
        painted = asked(
            documents,
            lambda given, wording: model.control(
                given[kind], kind, given["caption"], wording=wording, seed=seed
            ),
        )
        return _exact(model, documents, painted, kind, ("layout", _PLACED))

    return control


def _exact(
    model: CM3Leon,
    documents: Sequence[Document],
    painted: Sequence[Pillow.Image],
    given: str | None,
    facts: tuple[str, Sequence[str]] | None = None,
) -> Outcome:
    """`objects`, of exact ones, and before it a measure of some facts of theirs."""
    truth, found = scenes.wanted(documents, _TARGET), scenes.parsed(model, painted)
    scores: dict[str, Score] = {}
    if facts is not None:
        name, kept = facts
        told, seen = ([bag(o, kept) for o in some] for some in (truth, found))
        scores[name] = scenes.f1(told, seen, truth)
    scores["objects"] = scenes.f1(truth, found, truth)
    samples = _samples(documents, painted, given)
    for i, (w, f) in enumerate(zip(truth, found, strict=True)):
        samples[i] = _judged(samples[i], w == f, scenes.difference(w, f))
    return Outcome(scores, samples)


def bag(objects: Iterable[Object], facts: Sequence[str]) -> frozenset:
    """The facts of every object; what occurs twice is two."""
    counts = Counter(tuple(getattr(o, name) for name in facts) for o in objects)
    return frozenset((fact, i) for fact, n in counts.items() for i in range(n))


def ground(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Things in boxes; of several alike, the pairs with the largest overlap."""
    painted = asked(
        documents,
        lambda given, wording: model.ground(
            given["caption"], given["objects"], wording=wording, seed=seed
        ),
    )
    world = scenes.world_of(model)
    counts = []
    for document, image in zip(documents, painted, strict=True):
        found = oracle.boxes(world, np.asarray(image))
        things = [(f"{o.colour} {o.shape}", box) for o, box in found.items()]
        overlaps = matched(document.metadata["boxes"], things)
        counts.append((sum(overlaps), len(overlaps)))
    score = scenes.ratio(np.array(counts))
    rest = _exact(model, documents, painted, None)
    boxes = [str(d.metadata["boxes"]) for d in documents]
    samples = [
        _judged(s, s.ok, f"{s.note} {b}".strip())
        for s, b in zip(rest.samples, boxes, strict=True)
    ]
    return Outcome({"iou": score} | rest.scores, samples)


def matched(wanted: Sequence, found: Sequence) -> list[float]:
    """IoU of every wanted (name, box) with a found one of that name, each used once."""
    pairs = sorted(
        (
            (iou(box, other), i, j)
            for i, (name, box) in enumerate(wanted)
            for j, (what, other) in enumerate(found)
            if name == what
        ),
        reverse=True,
    )
    best, used = [0.0] * len(wanted), set()
    for overlap, i, j in pairs:
        if not best[i] and j not in used:
            best[i] = overlap
            used.add(j)
    return best


def iou(one: Sequence[int], other: Sequence[int]) -> float:
    """Of two boxes x0, y0, x1, y1, the last two just outside."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return both / (sum(areas) - both)


def _reference(kind: str, sampler: Sampler | None = None) -> Scorer:
    measure = REFERENCES[kind]

    def refer(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
        words = [d.metadata["strength"] for d in documents]
        painted = asked(
            documents,
            lambda given, wording: model.control(
                given["reference"],
                kind,
                given["caption"],
                strength=STRENGTHS[given["strength"][0]],
                wording=wording,
                sampler=sampler,
                seed=seed,
            ),
        )
        world = scenes.world_of(model)
        given = [picture(x) for x in column(documents, "reference")]
        exact, copy = (
            _exact(model, documents, some, "reference") for some in (painted, given)
        )
        truth, found, copied = [], [], []
        for document, *both in zip(documents, painted, given, strict=True):
            taken = document.metadata["taken"]
            target = scenes.shown(document, _TARGET)
            truth.append(_taken(target.objects, target.background, taken))
            for some, image in zip((found, copied), both, strict=True):
                pixels = np.asarray(image)
                ground = oracle.background(world, pixels)
                some.append(_taken(oracle.parse(world, pixels), ground, taken))
        clusters = scenes.wanted(documents, _TARGET)
        scores = {
            measure: scenes.f1(truth, found, clusters),
            "exact": exact.scores["objects"],
            f"{measure}{COPIED}": scenes.f1(truth, copied, clusters),
            f"exact{COPIED}": copy.scores["objects"],
        }
        for word in STRENGTHS:
            mine = [i for i, w in enumerate(words) if w == word]
            if mine:
                w, f, c = ([x[i] for i in mine] for x in (truth, found, clusters))
                scores[f"{measure}_{word}"] = scenes.f1(w, f, c)
        samples = [
            _judged(s, a == b, f"{w}: {', '.join(d.metadata['taken'])}. {s.note}")
            for s, a, b, w, d in zip(
                exact.samples, truth, found, words, documents, strict=True
            )
        ]
        return Outcome(scores, samples)

    return refer


def reference_scales(
    model: CM3Leon, documents: Sequence[Document], seed: int
) -> Outcome:
    """Guidance of two scales is (text, picture): the picture's is varied."""
    plain = model.system.sampling.control
    scores, samples = {}, []
    for kind, measure in REFERENCES.items():
        some = drawn(model, f"reference_{kind}", len(documents), objects)
        for scale in SCALES:
            sampler = dataclasses.replace(plain, guidance=(plain.scales[0], scale))
            found = _reference(kind, sampler)(model, some, seed)
            for key in (measure, "exact"):
                scores[f"{kind}_{key}_{scale:g}"] = found.scores[key]
            samples += [  # the same one at every scale
                _judged(s, s.ok, f"{scale:g}: {s.note}") for s in found.samples[:1]
            ]
    return Outcome(scores, samples)


def _taken(objects: Iterable[Object], ground: str, taken: Sequence[str]) -> frozenset:
    """What is to be the reference's: facts of every object, and the background."""
    facts = [name for name in taken if name != "background"]
    kept = bag(objects, facts) if facts else frozenset()
    return kept | ({ground} if "background" in taken else set())


def variation(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """The same things in other places and sizes."""
    painted = asked(
        documents,
        lambda given, wording: model.variation(
            given["source"], wording=wording, seed=seed
        ),
    )
    world, sources = scenes.world_of(model), scenes.wanted(documents)
    looks = ("colour", "shape")
    truth = [
        bag(scenes.shown(d).objects, looks) | {scenes.shown(d).background}
        for d in documents
    ]
    parsed = scenes.parsed(model, painted)
    found = [
        bag(objects, looks) | {oracle.background(world, np.asarray(image))}
        for objects, image in zip(parsed, painted, strict=True)
    ]
    other = [a != b for a, b in zip(sources, parsed, strict=True)]
    samples = _samples(documents, painted, "source")
    for i, (w, f) in enumerate(zip(truth, found, strict=True)):
        samples[i] = _judged(samples[i], w == f and other[i], "")
    return Outcome(
        {
            "objects": scenes.f1(truth, found, sources),
            "different": scenes.share(other),
        },
        samples,
    )


def segment(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """Class maps beside the best that their grid can say. Pictures of a class that
    the model does not have are left out."""
    masks = model.codec.masks
    if masks is None:
        raise ValueError(f"{model.system.name} has no classes to segment by")
    every = documents
    documents = [d for d in every if highest_label(d) < len(masks.classes)]
    made = asked(
        documents,
        lambda given, wording: model.segment(
            given["image"], wording=wording, seed=seed
        ),
    )
    truth = column(documents, "mask")
    best = [masks.ceiling(mask) for mask in truth]
    scores = segmentation.scores(
        np.stack(truth), np.stack(made), np.stack(best), masks.classes
    )
    scenes.partial(scores, every, documents)

    def coloured(labels: np.ndarray) -> Pillow.Image:
        return picture(controls.class_picture(labels, len(masks.classes)))

    samples = []
    for image, a, b, c in zip(
        column(documents, "image"), made, best, truth, strict=True
    ):
        shown = {"picture": picture(image), "classes": coloured(a)}
        shown |= {"best of the grid": coloured(b), "truth": coloured(c)}
        samples.append(Sample(text="", pictures=shown, ok=bool((a == b).all())))
    return Outcome(scores, samples)


def _samples(
    documents: Sequence[Document], painted: Sequence[Pillow.Image], given: str | None
) -> list[Sample]:
    """What was given, what came, and what was wanted; not yet judged."""
    samples = []
    truth = column(documents, "image")
    for document, made, wanted in zip(documents, painted, truth, strict=True):
        before = {given: picture(column([document], given)[0])} if given else {}
        pictures = before | {"picture": made, "wanted": picture(wanted)}
        texts = [text for text in document.texts[1:]] or list(document.texts)
        samples.append(Sample(text=" ".join(texts), pictures=pictures))
    return samples


def _judged(sample: Sample, ok: bool | None, note: str) -> Sample:
    return Sample(text=sample.text, pictures=sample.pictures, ok=ok, note=note)


TASKS: dict[str, Evaluator] = {
    "text_to_image": text_to_image,
    **{
        f"control_{kind}": evaluator(
            f"control_{kind}", _control(kind), again=("layout",)
        )
        for kind in CONTROLS
    },
    "ground": evaluator("ground", ground, again=("iou",)),
    **{
        f"reference_{kind}": evaluator(
            f"reference_{kind}", _reference(kind), again=(measure, "exact")
        )
        for kind, measure in REFERENCES.items()
    },
    "reference_scales": reference_scales,
    "variation": evaluator("variation", variation, again=("objects",)),
    "segment": evaluator("segment", segment, again=("miou", "miou_of_ceiling")),
}
