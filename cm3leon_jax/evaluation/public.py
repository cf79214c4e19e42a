"""Public sets: a model is asked in parts, which are kept, and scored by known metrics.

Scores read MEASURE@K, after K retrieved documents, or MEASURE@K_of_N, the best of N
pictures. Pictures lie as files beside the samples (`pictures@K_of_N/ID.png`), so that
any other program can score them, and texts in `texts@K.json`, as the servers of the
sets want them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.config import write_whole
from cm3leon_jax.data.controls import class_picture
from cm3leon_jax.data.pictures import fit
from cm3leon_jax.evaluation import (
    dialogue,
    hallucination,
    ndcg,
    public_sets,
    segmentation,
    text_scores,
    vqa,
)
from cm3leon_jax.evaluation.kept import note
from cm3leon_jax.evaluation.pairs import SHOWN
from cm3leon_jax.evaluation.protocol import Evaluator, Outcome, Sample, Score, interval
from cm3leon_jax.evaluation.public_job import Job
from cm3leon_jax.evaluation.public_pictures import reconstruction, text_to_image
from cm3leon_jax.evaluation.public_sets import PublicConfig
from cm3leon_jax.evaluation.segmentation import TOLERANCE

CUT = "…"  # the end of a text that was cut


def caption(job: Job) -> Outcome:
    """Captions beside those of people, by pycocoevalcap; what is made up, by CHAIR."""
    text_scores.scores(["a cat"] * 2, [["a cat"]] * 2)  # now rather than at the end
    style = {"style": job.config.style, "wording": job.config.wording}
    references = [example.references for example in job.examples]
    things = None
    if "hallucination" in job.config.metrics:
        synonyms = hallucination.read_synonyms(job.folder / "synonyms.txt")
        ids = [example.id for example in job.examples]
        things = hallucination.coco_shown(job.folder, ids)
        note(job.kept, "hallucination", [synonyms, things])

    def ask(own: slice, asked: dict[str, Any]) -> list[str]:
        return job.model.caption(job.pictures(own), **style, **asked)

    def judge(texts: list[str]) -> Mapping[str, Score]:
        scores = text_scores.scores(texts, references)
        if things is not None:
            scores |= hallucination.of_captions(texts, references, things, synonyms)
        return scores

    return _told(job, ("image_id", "caption"), ask, judge)


def answer(job: Job) -> Outcome:
    """Answers to questions, by the VQA accuracy; only written down without any of
    people."""

    def ask(own: slice, asked: dict[str, Any]) -> list[str]:
        questions = [example.question for example in job.examples[own]]
        wording = job.config.wording
        return job.model.answer(job.pictures(own), questions, wording=wording, **asked)

    def judge(texts: list[str]) -> Mapping[str, Score]:
        said = np.array([bool(text) for text in texts], float)
        shown = [x.picture for x in job.examples]  # several questions may share one
        scores = {"answered": interval(said, np.mean, len(said), shown)}
        if "vqa_accuracy" in job.config.metrics:
            right = vqa.accuracy(texts, [x.references for x in job.examples])
            scores["vqa_accuracy"] = interval(right, np.mean, len(right), shown)
        return scores

    return _told(job, ("question_id", "answer"), ask, judge)


def _told(
    job: Job,
    keys: tuple[str, str],
    ask: Callable[[slice, dict[str, Any]], list[str]],
    judge: Callable[[list[str]], Mapping[str, Score]],
) -> Outcome:
    """Texts about pictures, written down under `keys`; what is cut loses the mark that
    says so."""
    scores: dict[str, Score] = {}
    said: dict[int, list[str]] = {}
    for k in job.config.retrieve:

        def work(own: slice, k: int = k) -> list[str]:
            return ask(own, job.options(own, k))

        texts = [x for part in job.parts("texts", work, k) for x in part]
        said[k] = [text.removesuffix(CUT).strip() for text in texts]
        scores |= {f"{key}@{k}": score for key, score in judge(said[k]).items()}
        names = [int(x.id) if x.id.isdigit() else x.id for x in job.examples]
        lines = [
            dict(zip(keys, line, strict=True))
            for line in zip(names, said[k], strict=True)
        ]
        if jax.process_index() == 0:
            write_whole(job.place / f"texts@{k}.json", json.dumps(lines))
    last = said[job.config.retrieve[-1]]
    return Outcome(
        scores,
        [
            Sample(
                text=" ".join(filter(None, (example.question, text))),
                pictures={"picture": Pillow.fromarray(job.picture(example.picture))},
                note="people: " + " / ".join(dict.fromkeys(example.references)),
            )
            for example, text in zip(job.examples[:SHOWN], last, strict=False)
        ],
    )


def rank(job: Job) -> Outcome:
    """Possible answers by their log-likelihoods: NDCG (paper 1.12, VisDial)."""

    def work(own: slice) -> np.ndarray:
        examples = job.examples[own]
        return dialogue.log_likelihoods(
            job.model,
            job.pictures(own),
            [example.question for example in examples],
            [example.options for example in examples],
            job.config.wording,
        )

    scores_NC = np.concatenate([*job.parts("options", work)])
    relevance_NC = np.array([example.relevance for example in job.examples])
    values = ndcg.ndcg(scores_NC, relevance_NC)
    best = scores_NC.argmax(1)
    return Outcome(
        {"ndcg@0": interval(values, np.mean, len(values))},
        [
            Sample(
                text=f"{example.question} {example.options[choice]}",
                pictures={"picture": Pillow.fromarray(job.picture(example.picture))},
                note=f"NDCG {value:.2f}",
            )
            for example, choice, value in zip(
                job.examples[:SHOWN], best, values, strict=False
            )
        ],
    )


def segment(job: Job) -> Outcome:
    """Mean IoU, and F1 of boundaries, over the classes that the model and the set both
    name. All else is background, which is not one of them; pixels that are not counted
    are background in every mask."""
    job.check_side()
    masks, side = job.model.codec.masks, job.config.image_size
    known = public_sets.labels(job.folder)
    sizes = [(job.folder / x.mask).stat().st_size for x in job.examples]
    note(job.kept, "masks", [known, sizes])
    shared = [name for name in job.model.classes[1:] if name in known]
    if masks is None or not shared:
        raise ValueError(
            f"{job.model.system.name} was tuned on the classes "
            f"{', '.join(job.model.classes[1:]) or 'none'}, of which {job.folder} has "
            "none: name its classes in sft.classes"
        )
    numbers = {known[name]: job.model.classes.index(name) for name in shared}
    table = np.array([numbers.get(value, 0) for value in range(256)], np.int32)
    kept, C = sorted(numbers.values()), len(masks.classes)

    def work(own: slice) -> dict[str, Any]:
        marked = np.stack([_mask(job.folder / x.mask, side) for x in job.examples[own]])
        truth, counted = table[marked], marked != public_sets.UNCOUNTED
        asked = job.options(own, 0) | {"wording": job.config.wording}
        pictures = job.pictures(own)
        made = np.stack(job.model.segment(pictures, **asked)) * counted
        best = np.stack([masks.ceiling(labels) for labels in truth]) * counted
        areas = [segmentation.areas(truth, x, C)[..., kept] for x in (made, best)]
        edges = segmentation.boundary_counts(truth, made, C, TOLERANCE)[
            :, np.array(kept) - 1
        ]
        maps = {"classes": made, "best of the grid": best, "truth": truth}
        shown = [
            {"picture": Pillow.fromarray(pictures[i])}
            | {k: Pillow.fromarray(class_picture(x[i], C)) for k, x in maps.items()}
            for i in job.shown(own)
        ]
        return {"areas": np.stack(areas, axis=1), "edges": edges, "shown": shown}

    parts = [*job.parts("masks", work)]
    areas_BP3K = np.concatenate([part["areas"] for part in parts])
    edges_BCK = np.concatenate([part["edges"] for part in parts])
    shown = [row for part in parts for row in part["shown"]]

    n = len(areas_BP3K)
    scores: dict[str, Score] = {
        f"{name}@0": interval(areas_BP3K[:, p], segmentation.miou, n)
        for p, name in enumerate(("miou", "ceiling"))
    }
    if edges_BCK.any():
        found = interval(edges_BCK, lambda x: segmentation.boundary_f1(x.sum(0)), n)
        scores["boundary_f1@0"] = found
    return Outcome(scores, [Sample(text="", pictures=x) for x in shown])


def _mask(path: Path, side: int) -> np.ndarray:
    """The numbers of a mask's pixels: uint8 [side, side]."""
    with Pillow.open(path) as mask:
        # Read as grey: a palette's numbers, not its colours.
        grey = Pillow.fromarray(np.asarray(mask).astype(np.uint8)).convert("RGB")
    return fit(grey, side, Pillow.Resampling.NEAREST)[..., 0]


TASKS: dict[str, Callable[[Job], Outcome]] = {
    "text_to_image": text_to_image,
    "reconstruction": reconstruction,
    "caption": caption,
    "answer": answer,
    "rank": rank,
    "segment": segment,
}


def evaluators(config: PublicConfig, folder: Path) -> dict[str, Evaluator]:
    """The tasks on a set in a folder."""

    def bound(task: Callable[[Job], Outcome]) -> Evaluator:
        def evaluate(model: Any, examples: Sequence[Any], seed: int) -> Outcome:
            return task(Job(config, folder, model, examples, seed))  # a Kept

        return evaluate

    return {name: bound(task) for name, task in TASKS.items()}
