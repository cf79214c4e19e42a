"""Ways of decoding compared, as figure 4 of the paper does: is what is drawn right, how
different are the candidates of one prompt, and what does it cost?

Of the largest number of candidates the first n are what n candidates would have been,
so that one run of each way gives its whole curve.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image as Pillow

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.shapes import Object, Scene, ShapesConfig
from cm3leon_jax.evaluation import oracle
from cm3leon_jax.evaluation.protocol import Score, interval
from cm3leon_jax.sampling.rerank import Ranked, Rerank
from cm3leon_jax.sampling.sampler import ContrastiveTopK, Sampler

CANDIDATES = (1, 2, 4, 8, 16)
Samplers = tuple[Sampler, ...]
Objects = frozenset[Object]


def ways(
    *, temperature: float, top_p: float, guidance: float, contrast: ContrastiveTopK
) -> dict[str, Samplers]:
    """The ways that are compared, by name; the last, half of the candidates by guided
    top-p and half by CD-K, is the paper's best."""
    plain = Sampler(temperature=temperature)
    nucleus = Sampler(temperature=temperature, top_p=top_p)
    guided = dataclasses.replace(nucleus, guidance=guidance)
    contrastive = Sampler(temperature=temperature, contrastive=contrast)
    original = dataclasses.replace(contrast, k=1)
    return {
        "temperature": (plain,),
        "top-p": (nucleus,),
        "guided temperature": (dataclasses.replace(plain, guidance=guidance),),
        "guided top-p": (guided,),
        "CD": (dataclasses.replace(contrastive, contrastive=original),),
        "CD-K": (contrastive,),
        "half and half": (guided, contrastive),
    }


def measure(
    model: CM3Leon,
    documents: Sequence[Document],
    samplers: Samplers,
    *,
    weights: Rerank,
    candidates: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Draws the captions of scenes in one way: its curve, diversity and cost."""
    world = model.system.source
    if not isinstance(world, ShapesConfig):
        raise ValueError(f"{model.system.name} is not of the shapes world")
    start = time.monotonic()
    most = max(candidates)
    found: Any = model.text_to_image(
        [document.texts[0] for document in documents],
        sampler=samplers,
        candidates=most,
        rerank=weights,
        return_scores=True,
        seed=seed,
    )
    seconds = time.monotonic() - start
    scenes = [Scene.from_json(document.metadata["scene"]) for document in documents]
    wanted = [frozenset(scene.objects) for scene in scenes]
    parsed = [
        [oracle.parse(world, np.asarray(picture)) for picture in ranked.outputs]
        for ranked in found
    ]
    return {
        "samplers": [dataclasses.asdict(sampler) for sampler in samplers],
        "curve": curve(wanted, found, parsed, candidates),
        "diversity": float(np.mean([diversity(ranked.outputs) for ranked in found])),
        "seconds": round(seconds, 2),
        "seconds_per_candidate": round(seconds / (len(documents) * most), 4),
        "streams": max(sampler.streams for sampler in samplers),
    }


def curve(
    wanted: Sequence[Objects],
    found: Sequence[Ranked],
    parsed: Sequence[Sequence[Objects]],
    candidates: Sequence[int],
) -> dict[str, dict[str, Score]]:
    """By number of candidates: `chosen`, F1 over the objects of those that rank first,
    and `possible`, of those that have most objects right: what no ranking can exceed.

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
            name: interval(counts, oracle.f1, counts[:, 2].sum(), wanted)
            for name, counts in (
                ("chosen", oracle.object_counts(wanted, chosen)),
                ("possible", oracle.object_counts(wanted, possible)),
            )
        }
    return made


def diversity(pictures: Sequence[Pillow.Image]) -> float:
    """Mean distance of pairs of pictures: the root mean square of what their pixels
    differ by, in [0, 1]; 0 for a single one."""
    pixels = [np.asarray(picture, np.float64) / 255 for picture in pictures]
    distances = [np.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(pixels, 2)]
    return float(np.mean(distances)) if distances else 0.0


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The ways as lines of a Markdown table: F1 of the chosen candidate (of the best
    possible one) by their number, diversity, and seconds per candidate."""
    numbers = sorted({int(n) for made in results.values() for n in made["curve"]})
    head = ["", *(f"{n}" for n in numbers), "diversity", "s / candidate"]
    lines = [head, ["---"] * len(head)]
    for name, made in results.items():
        cells = []
        for n in numbers:
            point = made["curve"].get(str(n))
            cells.append(
                f"{point['chosen']['value']:.3f} ({point['possible']['value']:.3f})"
                if point
                else ""
            )
        costs = [f"{made['diversity']:.3f}", f"{made['seconds_per_candidate']:.3f}"]
        lines.append([name, *cells, *costs])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
