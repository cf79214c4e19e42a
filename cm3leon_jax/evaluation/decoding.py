"""Ways of decoding compared, as figure 4 of the paper does: is what is drawn (or
told of a picture) right, how different are the candidates of one prompt, and what do
they cost?

Of the largest number of candidates the first n are what n candidates would have been,
so that one run of each way gives its whole curve.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.shapes import Object, ShapesConfig
from cm3leon_jax.evaluation import oracle, scenes
from cm3leon_jax.sampling.rerank import Ranked, Rerank
from cm3leon_jax.sampling.sampler import Sampler

Samplers = tuple[Sampler, ...]
Objects = frozenset[Object]


def measure(
    model: CM3Leon,
    documents: Sequence[Document],
    samplers: Samplers,
    *,
    task: str = "text_to_image",
    weights: Rerank,
    candidates: Sequence[int],
    seed: int,
    timed: int = 1,
) -> dict[str, Any]:
    """Draws the captions of scenes in one way, or writes captions of their pictures:
    its curve, diversity, and what a prompt costs.

    Costs are of `timed` batches for each number of candidates, after as many that are
    not counted: those compile. 0: no costs.
    """
    world, most = scenes.world_of(model), max(candidates)

    def ask(some: Sequence[Document], n: int, **scored: Any) -> list[Any]:
        how: Any = {"sampler": samplers[:n], "candidates": n, "seed": seed, **scored}
        if task == "text_to_image":
            return model.text_to_image(scenes.captions(some), rerank=weights, **how)
        tuned = "caption_detailed" in model.writer.tasks
        style = "detailed" if tuned else "short"
        return model.caption(scenes.pictures(some), style=style, **how)

    def seconds(n: int) -> float:
        few, start = documents[: max(timed * model.engine.batch // n, 1)], 0.0
        for _ in range(2):
            start = time.monotonic()
            ask(few, n)
        return round((time.monotonic() - start) / len(few), 4)

    cost = {n: {"seconds": seconds(n)} for n in candidates} if timed else {}
    found: Any = ask(documents, most, return_scores=True)
    points = curve(
        scenes.wanted(documents),
        found,
        [[_objects(world, output) for output in each.outputs] for each in found],
        candidates,
    )
    return {
        "samplers": [dataclasses.asdict(sampler) for sampler in samplers],
        "curve": {str(n): points[str(n)] | cost.get(n, {}) for n in candidates},
        "streams": max(sampler.streams for sampler in samplers),
    }


def _objects(world: ShapesConfig, output: Pillow.Image | str) -> Objects:
    if isinstance(output, str):
        return oracle.parse_caption(world, output)
    return oracle.parse(world, np.asarray(output))


def curve(
    wanted: Sequence[Objects],
    found: Sequence[Ranked],
    parsed: Sequence[Sequence[Objects]],
    candidates: Sequence[int],
) -> dict[str, dict[str, Any]]:
    """By number of candidates: `chosen`, F1 over the objects of those that rank first,
    `possible`, of those that each prompt's objects match best (of all prompts together
    another choice may have a little more), and `diversity`.

    `parsed` are the objects of each prompt's candidates, in the order of `found`.
    """
    made = {}
    for n in candidates:
        chosen, possible = [], []
        for objects, ranked, each in zip(wanted, found, parsed, strict=True):
            numbered = zip(ranked.numbers, each, strict=True)
            first = [seen for number, seen in numbered if number < n]
            right = [oracle.f1(oracle.object_counts([objects], [o])) for o in first]
            chosen.append(first[0])
            possible.append(first[int(np.argmax(right))])
        made[str(n)] = {
            "chosen": scenes.f1(wanted, chosen, wanted),
            "possible": scenes.f1(wanted, possible, wanted),
        }
        each = [
            [x for i, x in zip(r.numbers, r.outputs, strict=True) if i < n]
            for r in found
        ]
        made[str(n)]["diversity"] = float(np.mean([diversity(some) for some in each]))
    return made


def diversity(outputs: Sequence[Pillow.Image] | Sequence[str]) -> float:
    """Mean distance of pairs, in [0, 1]; 0 for a single one. Of pictures: the root mean
    square of what their pixels differ by. Of texts: the share of their words that only
    one of the two has."""
    every = [
        Counter(x.split()) if isinstance(x, str) else np.asarray(x, np.float64) / 255
        for x in outputs
    ]
    return float(np.mean([_distance(a, b) for a, b in combinations(every, 2)] or [0]))


def _distance(a: Any, b: Any) -> float:
    if isinstance(a, Counter):
        return 1 - (a & b).total() / max((a | b).total(), 1)
    return float(np.sqrt(np.mean((a - b) ** 2)))
