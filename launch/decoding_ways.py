"""The ways of decoding that `decoding_study.py` compares, their settings, its table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cm3leon_jax.evaluation.decoding import Samplers
from cm3leon_jax.evaluation.decoding_report import at
from cm3leon_jax.sampling.sampler import ContrastiveTopK, Sampler

CANDIDATES = (1, 2, 4, 8, 16)
HALVES = ("guided top-p", "CD-K")


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


def told(samplers: Samplers) -> str:
    """The temperature of a way, and what else is not as by default."""
    values, plain = dataclasses.asdict(samplers[0]), dataclasses.asdict(Sampler())
    values |= values.pop("contrastive") or {}
    return ", ".join(
        f"{key} {value}"
        for key, value in values.items()
        if key == "temperature" or value != plain.get(key)
    )


def choice(ways: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of ways in several settings, named "WAY: settings", the best of each by the mean
    F1 over its numbers of candidates."""
    best: dict[str, dict[str, Any]] = {}
    for name, made in ways.items():
        way, _, settings = name.partition(": ")
        values = [point["chosen"]["value"] for point in made["curve"].values()]
        found = {"settings": settings, "mean": round(float(np.mean(values)), 5)}
        if way not in best or found["mean"] > best[way]["mean"]:
            best[way] = found | {"sampler": made["samplers"][0]}
    return best


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The ways as lines of a Markdown table; for each number of candidates F1 of the
    chosen one (of the best possible), diversity, and seconds per prompt."""
    numbers = sorted({int(n) for made in results.values() for n in made["curve"]})
    head = ["chosen (possible) · diversity · seconds", *map(str, numbers)]
    lines = [head, ["---"] * len(head)]
    for name, made in results.items():
        cells = []
        for n in numbers:
            point = made["curve"].get(str(n))
            if point is None:
                cells.append("")
                continue
            values = [point[key]["value"] for key in ("chosen", "possible")]
            told = "{:.3f} ({:.3f})".format(*values)
            parts = [f"{part:.3f}" for part in at(made, n) if part is not None]
            cells.append(" · ".join([told, *parts]))
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
