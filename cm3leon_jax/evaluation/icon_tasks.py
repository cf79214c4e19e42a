"""Real artwork after tuning: what can be measured where no oracle reads pictures.

Examples are made by `data/icon_tasks.py` of names that training has never seen. What is
wanted is one artist's answer of many that would be right, so beside scores of pictures
stand those of that answer after the image tokenizer (`…_ceiling`), and none says that a
picture is right; the report's failures are those that miss the first measure:

| task | key | what |
|---|---|---|
| edit, edit_region | nearer | the changed quarter is nearer to the result wanted than |
| | | to the source; also by kind, and where a place was told (`_spatial`) |
| | kept | pixels outside it that are those of the source, but for rounding |
| | trained_directional, | the cosine of the changes of picture and caption, and that |
| | trained_similarity | of the two pictures, by an encoder (if one is given) |
| infill | visible, hidden_psnr, | pixels outside the mask; dB inside (`_untold`); and |
| | seams | jumps at its border over those of the reconstruction |
| segment | miou, ceiling, … | `segmentation.py`, against masks from alpha |
| control_edge, _scribble | edge_f1 | Canny edges of both pictures, a pixel apart |
| control_segmentation, ground | boxes | IoU of what is painted, whatever it is, with |
| reference_composition | | the boxes of all that is wanted (if strongly) |
| reference_style | style | pictures whose features are nearest to the style wanted |
| reference_style_new | style | the same, of artists that no training has seen |
| whatever paints | one_of_ten | pictures nearest to the wanted among ten, by features |
| caption | words, … | F1 of words, of three lengths |
| | hallucinated, … | of the subjects named those that no picture shows |
| answer | accuracy, … | as in `task_texts.py` |
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data import icon_tasks
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.icon_edits import EDITS
from cm3leon_jax.data.icon_scenes import CELLS
from cm3leon_jax.data.icon_sets import SETS
from cm3leon_jax.data.icon_wording import ground
from cm3leon_jax.data.icons import BACKGROUNDS, SPLITS, Drawing, IconsConfig, drawings
from cm3leon_jax.data.tasks import STRENGTHS
from cm3leon_jax.evaluation import (
    clip_scores,
    filling,
    hallucination,
    looks,
    oracle,
    pairs,
    scenes,
    task_pictures,
    task_texts,
)
from cm3leon_jax.evaluation.examples import (
    Scorer,
    asked,
    column,
    drawn,
    enough,
    evaluator,
    one,
    picture,
)
from cm3leon_jax.evaluation.protocol import Evaluator, Outcome, Sample, Score, interval
from cm3leon_jax.evaluation.reconstruction import psnr

_GOOD, _DB = 0.5, 15.0  # less, of a score or inside a mask, is shown as a failure
_KNOWN_STYLES = 400  # validation drawings from which styles are told
Pictures = Sequence[np.ndarray]
Measure = Callable[[CM3Leon, Sequence[Document], Pictures], dict[str, Score]]


def _paint(task: str, given: str | None, *measures: Measure) -> Scorer:
    """A scorer that paints the examples of a task; samples show what was `given`."""

    def score(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
        painted = _painted(model, task, documents, seed)
        wanted = column(documents, "image")
        scores: dict[str, Score] = {}
        for measure in measures:
            scores |= measure(model, documents, [np.asarray(x) for x in painted])
            if measure is not _edited:
                best = measure(model, documents, _rebuilt(model, wanted))
                scores |= {f"{key}_ceiling": value for key, value in best.items()}
        good = _good(scores.values(), len(documents))
        before = column(documents, given or "image")
        samples = [
            Sample(
                text=" ".join(document.texts),
                pictures=({str(given): picture(a)} if given else {})
                | {"picture": b, "the artist's": picture(c)},
                ok=ok,
            )
            for document, a, b, c, ok in zip(
                documents, before, painted, wanted, good, strict=True
            )
        ]
        return Outcome(scores, samples)

    return score


def _good(scores: Iterable[Any], count: int, least: float = _GOOD) -> list[bool | None]:
    """Whether each of so many examples has that much of the first score with a row for
    each; None where it has no part in it."""
    for score in scores:
        if len(score.rows) == count:
            none = [row.ndim and not row.any() for row in score.rows]
            enough = [bool(score.statistic(x[None]) >= least) for x in score.rows]
            return [None if a else b for a, b in zip(none, enough, strict=True)]
    return [None] * count


def _painted(
    model: CM3Leon, task: str, documents: Sequence[Document], seed: int
) -> list[Pillow.Image]:
    def ask(given: dict[str, list], wording: int) -> Sequence[Any]:
        options: dict[str, Any] = {"wording": wording, "seed": seed}
        if task == "text_to_image":
            return model.text_to_image(given["caption"], seed=seed)
        if task == "ground":
            return model.ground(given["caption"], given["objects"], **options)
        if task == "variation":
            return model.variation(given["source"], **options)
        if task in ("edit", "edit_region"):
            if task == "edit_region":
                boxes = [tuple(d.metadata["region"]) for d in given["example"]]
                options["regions"] = boxes
            return model.edit(given["source"], given["instruction"], **options)
        form, _, kind = task.partition("_")
        images = given["reference" if form == "reference" else kind]
        if form == "reference":
            options["strength"] = STRENGTHS[given["strength"][0]]
        return model.control(images, kind, given["caption"], **options)

    return asked(documents, ask)


def _rebuilt(model: CM3Leon, images: Pictures) -> list[np.ndarray]:
    return [np.asarray(image) for image in model.reconstruct(list(images))]


def _recognised(_, documents: Sequence[Document], made: Pictures) -> dict[str, Score]:
    names = [d.metadata["artwork"][0]["subject"] for d in documents]
    made_BE, wanted_BE = map(looks.shown, (made, column(documents, "image")))
    return {"one_of_ten": scenes.share(looks.found_among(made_BE, wanted_BE, names))}


def _edited(model, documents: Sequence[Document], made: Pictures) -> dict[str, Score]:
    before, after = (_rebuilt(model, column(documents, n)) for n in ("source", "image"))
    near, kept = [], []
    for document, a, b, new in zip(documents, before, after, made, strict=True):
        x0, y0, x1, y1 = document.metadata["region"]
        where = np.zeros(new.shape[:2], bool)
        where[y0:y1, x0:x1] = True
        near.append(looks.nearer(new, b, a, where))
        kept.append(filling.kept(a, new, ~where))
    scores = {"nearer": scenes.share(near), "kept": scenes.share(kept)}
    if (embedder := getattr(model, "embedder", None)) is not None:
        told = [
            [_told(d.metadata[scene]) for d in documents]
            for scene in ("scene", "target_scene")
        ]
        sources = column(documents, "source")
        scores |= clip_scores.edited(embedder, sources, made, *told)
        wanted = column(documents, "image")
        best = clip_scores.edited(embedder, sources, wanted, *told)
        scores |= {f"{key}_ceiling": value for key, value in best.items()}
    facts = [d.metadata["edit"] for d in documents]
    groups = {kind: [f["kind"] == kind for f in facts] for kind in EDITS}
    groups["spatial"] = [f["spatial"] for f in facts]
    for name, mine in groups.items():
        if any(mine):
            scores[f"nearer_{name}"] = scenes.share(np.array(near)[mine])
    return scores


def _told(scene: dict[str, Any]) -> str:
    """All that is in a scene, as captions say it."""
    things = (f"{x['name']} at the {CELLS[x['cell']]}" for x in scene["objects"])
    return ", ".join(things) + ground(scene["background"])


def _placed(_, documents: Sequence[Document], made: Pictures) -> dict[str, Score]:
    """A composition that is to be followed but moderately has other boxes."""
    counts = []
    for document, pixels in zip(documents, made, strict=True):
        scene = document.metadata["target_scene"]
        if document.metadata.get("strength", "strongly") != "strongly":
            counts.append((0, 0))
            continue
        drawn_YX = looks.painted(pixels, BACKGROUNDS[scene["background"]])
        boxes_YX = np.zeros_like(drawn_YX)
        for x0, y0, x1, y1 in (thing["box"] for thing in scene["objects"]):
            boxes_YX[y0:y1, x0:x1] = True
        counts.append(((drawn_YX & boxes_YX).sum(), (drawn_YX | boxes_YX).sum()))
    rows = np.array(counts)
    n = int(rows.any(1).sum())
    return {"boxes": scenes.ratio(rows, n)} if n else {}


def _outlined(_, documents: Sequence[Document], made: Pictures) -> dict[str, Score]:
    both = zip(made, column(documents, "image"), strict=True)
    counts = np.array([looks.edge_counts(a, b) for a, b in both])
    return {"edge_f1": interval(counts, looks.edge_f1, len(counts))}


def _styled(model, documents: Sequence[Document], made: Pictures) -> dict[str, Score]:
    """Among the styles of all artists, of whom training may have seen some."""
    world = dataclasses.replace(_world(model), sets=tuple(SETS))
    source = icon_tasks.examples(world, "caption_short", "validation")
    known_ones = list(itertools.islice(source, _KNOWN_STYLES))
    names = [d.metadata["style"] for d in known_ones]
    wanted = [d.metadata["style"] for d in documents]
    mine = [  # only then is the style that of the reference
        i
        for i, d in enumerate(documents)
        if d.metadata["strength"] == "strongly" and wanted[i] in names
    ]
    if not mine:
        return {}
    known_ME = looks.drawn(column(known_ones, "image"))
    styles_BE = looks.drawn([made[i] for i in mine])
    found = looks.nearest(styles_BE, known_ME, names)
    return {"style": scenes.share([found[n] == wanted[i] for n, i in enumerate(mine)])}


def _world(model: CM3Leon) -> IconsConfig:
    """ValueError for a system that was trained on anything else."""
    world = model.system.source
    if not isinstance(world, IconsConfig):
        raise ValueError(f"{model.system.name} was not trained on icons")
    return world


def reference_style_new(
    model: CM3Leon, documents: Sequence[Document], seed: int
) -> Outcome:
    """References by artists whose sets the config leaves out: of held-out names too."""
    world = _world(model)
    others = tuple(name for name in SETS if name not in world.sets)
    if not others:
        raise ValueError(
            f"{model.system.name} was trained on all artists: leave some out of "
            "data.settings.sets, or reference_style_new out of the protocol"
        )
    new = dataclasses.replace(world, sets=others)
    made = icon_tasks.examples(new, "reference_style", "test")
    some = enough(model, "reference_style_new", made, len(documents), one)
    return _STYLE(model, some, seed)


def infill(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """A part of every picture is hidden, 10 to 75 %, and described or not."""
    originals, texts = column(documents, "image"), column(documents, "caption")
    rng, rebuilt = np.random.default_rng(seed), _rebuilt(model, originals)
    sizes = filling.SIZES[0][0], filling.SIZES[-1][1]
    masks = [filling.mask_of_size(rng, model, *sizes) for _ in documents]
    scores: dict[str, Score] = {}
    samples: list[Sample] = []
    for suffix, prompts in (("", texts), ("_untold", None)):
        painted: Any = model.infill(originals, masks, prompts, seed=seed)
        made = [np.asarray(image) for image in painted]
        rows = list(zip(originals, rebuilt, made, masks, strict=True))
        visible = [filling.kept(b, c, ~mask) for _, b, c, mask in rows]
        hidden = [psnr(a[m][None, None], c[m][None, None])[0] for a, _, c, m in rows]
        scores[f"visible{suffix}"] = scenes.share(visible)
        scores[f"hidden_psnr{suffix}"] = scenes.share(hidden)
        jumps = filling.jumps
        borders = [(jumps(c, mask), jumps(b, mask)) for _, b, c, mask in rows]
        scores[f"seams{suffix}"] = filling.seams(borders)
        good = _good([scores[f"hidden_psnr{suffix}"]], len(rows), _DB)
        for a, image, mask, ok in zip(originals, painted, masks, good, strict=True):
            grey = filling.blanked(picture(a), mask)
            shown = {"blanked": grey, "infilled": image, "the artist's": picture(a)}
            samples.append(Sample(text=suffix.strip("_"), pictures=shown, ok=ok))
    return Outcome(
        scores, [x for i in range(len(masks)) for x in samples[i :: len(masks)]]
    )


def caption(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """`words` of short captions, the names; `words_detailed`, `words_long`."""
    scores, samples = {}, []
    subjects = _subjects(_world(model))
    for form in task_texts.FORMS:
        some = drawn(model, f"caption_{form}", len(documents), one)
        found = asked(
            some,
            lambda given, wording, form=form: model.caption(
                given["image"], style=form, wording=wording, seed=seed
            ),
        )
        rows = list(zip(column(some, "caption"), found, strict=True))
        counts = np.array([pairs.overlap(a, b) for a, b in rows])
        of = "" if form == "short" else f"_{form}"
        scores[f"words{of}"] = interval(counts, oracle.f1, len(counts))
        good = _good([scores[f"words{of}"]], len(rows))
        shown = [
            {x["subject"] for x in document.metadata["artwork"]} for document in some
        ]
        told = [{*hallucination.named(text, subjects)} for text in found]
        scores[f"hallucinated{of}"] = hallucination.scores(told, shown)["hallucinated"]
        samples += [
            Sample(
                text=b,
                pictures={"picture": picture(x)},
                ok=ok,
                note=f"the artist's: {a}",
            )
            for (a, b), x, ok in zip(rows, column(some, "image"), good, strict=True)
        ]
    return Outcome(scores, samples)


@functools.lru_cache(maxsize=1)
def _subjects(world: IconsConfig) -> dict[str, str]:
    """What artists call things, and what they mean: name -> subject."""
    found = (x for split in SPLITS for x in drawings(world, split))
    known = [x for x in found if isinstance(x, Drawing)]
    return {name.lower(): x.subject for x in known for name in (*x.names, x.subject)}


_STYLE = _paint("reference_style", "reference", _styled, _recognised)
_PAINTED: dict[str, tuple[Scorer, tuple[str, ...]]] = {
    name: (_paint(name, given, *measures), again)
    for name, given, measures, again in (
        ("text_to_image", None, (_recognised,), ()),
        ("edit", "source", (_edited,), ("nearer", "kept")),
        ("edit_region", "source", (_edited,), ("nearer", "kept")),
        ("ground", None, (_placed,), ("boxes",)),
        ("control_edge", "edge", (_outlined,), ("edge_f1",)),
        ("control_scribble", "scribble", (_outlined,), ("edge_f1",)),
        ("control_segmentation", "segmentation", (_placed,), ("boxes",)),
        ("reference_style", "reference", (_styled, _recognised), ()),
        ("reference_content", "reference", (_recognised,), ()),
        ("reference_composition", "reference", (_placed,), ()),
        ("variation", "source", (_recognised,), ()),
    )
}
TASKS: dict[str, Evaluator] = {
    "reconstruction": pairs.reconstruction,
    "likelihood": pairs.likelihood,
    "caption": caption,
    "answer": evaluator("answer", task_texts.answer, one, ("accuracy",)),
    "infill": evaluator("infill", infill, one),
    "segment": evaluator("segment", task_pictures.segment, one, ("miou",)),
    **{name: evaluator(name, f, one, again) for name, (f, again) in _PAINTED.items()},
    "reference_style_new": reference_style_new,
}
