"""The shapes world, scored by the oracle on scenes that training has never seen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.shapes import HELD_OUT
from cm3leon_jax.data.shapes import document as draw
from cm3leon_jax.evaluation import filling, hallucination, oracle, scenes
from cm3leon_jax.evaluation.protocol import Evaluator, Outcome, Sample, Score
from cm3leon_jax.evaluation.scenes import Objects

UNSEEN_PAIRS = "/text_to_image/unseen_pairs"


def reconstruction(model: CM3Leon, documents: Sequence[Document], _: int) -> Outcome:
    """`objects`: what the image tokenizer keeps of a picture, the ceiling of all."""
    originals = scenes.pictures(documents)
    painted = model.reconstruct(originals)
    wanted, found = scenes.wanted(documents), scenes.parsed(model, painted)
    samples = [
        Sample(text="", pictures={"original": a, "reconstruction": b}, ok=w == f)
        for a, b, w, f in zip(originals, painted, wanted, found, strict=True)
    ]
    return Outcome({"objects": _objects(documents, wanted, found)}, samples)


def text_to_image(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """`objects`: one picture per caption, no choosing among candidates."""
    prompts = scenes.captions(documents)
    painted = model.text_to_image(prompts, seed=seed)
    wanted, found = scenes.wanted(documents), scenes.parsed(model, painted)
    samples = scenes.samples(prompts, painted, wanted, found)
    return Outcome({"objects": _objects(documents, wanted, found)}, samples)


def unseen_pairs(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """As `text_to_image`, on as many other scenes, each with a colour and shape that
    training has never seen together. `objects`: all; `text_to_image/unseen_pairs`:
    those alone; `reconstruction`: what the image tokenizer keeps of them, the ceiling.
    """
    world = scenes.world_of(model)
    drawn = [draw(world, "test", i, held_out=True) for i in range(len(documents))]
    outcome = text_to_image(model, drawn, seed)

    def alone(images: Sequence[Any]) -> Score:
        both = zip(scenes.wanted(drawn), scenes.parsed(model, images), strict=True)
        return _objects(
            drawn,
            *scenes.columns([tuple(map(_held_out, objects)) for objects in both]),
        )

    painted = [sample.pictures["picture"] for sample in outcome.samples]
    kept = model.reconstruct(scenes.pictures(drawn))
    unseen = {UNSEEN_PAIRS: alone(painted), "reconstruction": alone(kept)}
    return Outcome(outcome.scores | unseen, outcome.samples)


def _held_out(objects: Objects) -> Objects:
    return frozenset(o for o in objects if (o.colour, o.shape) in HELD_OUT)


def caption(model: CM3Leon, documents: Sequence[Document], seed: int) -> Outcome:
    """What the caption of a picture names: `objects` of the likeliest of as many as the
    config says, `objects_of_1` of a single one, written greedily; `hallucinated`: of
    the objects named those that no picture shows, less is better."""
    originals = scenes.pictures(documents)
    world = scenes.world_of(model)
    wanted = scenes.wanted(documents)

    def named(texts: Sequence[str]) -> list[Objects]:
        return [oracle.parse_caption(world, text) for text in texts]

    greedy = dataclasses.replace(model.system.sampling.caption, temperature=0.0)
    alone = named(model.caption(originals, sampler=greedy, seed=seed))
    texts = model.caption(originals, seed=seed)
    found = named(texts)
    scores = {
        "objects": _objects(documents, wanted, found),
        "objects_of_1": _objects(documents, wanted, alone),
        "hallucinated": hallucination.scores(found, wanted)["hallucinated"],
    }
    return Outcome(scores, scenes.samples(texts, originals, wanted, found))


TASKS: dict[str, Evaluator] = {
    "reconstruction": reconstruction,
    "text_to_image": text_to_image,
    "unseen_pairs": unseen_pairs,
    "caption": caption,
    "infill": filling.infill,
}


def _objects(
    documents: Sequence[Document], wanted: Sequence[Any], found: Sequence[Any]
) -> Score:
    return scenes.f1(wanted, found, scenes.wanted(documents))
