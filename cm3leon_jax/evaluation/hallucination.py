"""Things that captions name and pictures do not show, of whatever kind they are.

Rohrbach et al. 2018 (arXiv:1809.02156): of the things named, each time that they are,
the share that is not there (CHAIR_i), and of the captions, the share that names any
such thing (CHAIR_s). Counted as by their code, which finds singulars with `pattern` and
takes "baby bear" (so with "adult", and with "passenger" for jets and trains), "toilet
seat", "bow tie" for one thing: put such names on the lines of those things.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path

import numpy as np

from cm3leon_jax import config as configs
from cm3leon_jax.evaluation import scenes
from cm3leon_jax.evaluation.protocol import Score

_WORD = re.compile(r"[^\W_]+")


def read_synonyms(path: str | Path) -> dict[str, str]:
    """Names of things -> category: a category a line, its names separated by commas,
    the first of them naming it (the format of CHAIR's own list)."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: put there a text file with a category a line, as in "
            "'person, girl, boy, man, woman'"
        )
    lines = Path(path).read_text().splitlines()
    found = {}
    for line in lines:
        names = [name.strip().lower() for name in line.split(",") if name.strip()]
        found |= {name: names[0] for name in names}
    if not found:
        raise ValueError(f"{path} names nothing")
    return found


def named(caption: str, synonyms: Mapping[str, str]) -> list[str]:
    """The categories that a caption names, each as often as it does; longer names
    first ("hot dog" is no dog).

    Plurals in s and es are known; others have to be among the synonyms.
    """
    words = _WORD.findall(caption.lower())
    longest = max((len(name.split()) for name in synonyms), default=0)
    found, start = [], 0
    while start < len(words):
        for length in range(longest, 0, -1):
            name = " ".join(words[start : start + length])
            forms = (name, name.removesuffix("s"), name.removesuffix("es"))
            known = [synonyms[form] for form in forms if form in synonyms]
            if known:
                found.append(known[0])
                start += length
                break
        else:
            start += 1
    return found


def scores(found: Sequence[Collection], shown: Sequence[Set]) -> dict[str, Score]:
    """`hallucinated`, of what is named, as often as it stands in `found`;
    `hallucinated_captions`; and `named`, of the things shown those that are named:
    saying nothing is no way to a good score."""
    if len(found) != len(shown) or not found:
        raise ValueError(f"{len(found)} captions of {len(shown)} pictures")
    counts = np.array(
        [
            (sum(x not in s for x in f), len(f), len(s & set(f)), len(s))
            for f, s in zip(found, shown, strict=True)
        ]
    )
    return {
        "hallucinated": scenes.ratio(counts[:, :2]),
        "hallucinated_captions": scenes.share(counts[:, 0] > 0),
        "named": scenes.ratio(counts[:, 2:]),
    }


def coco_shown(folder: Path, ids: Sequence[str]) -> list[set[str]]:
    """The categories of the things marked in COCO's pictures of these numbers.

    FileNotFoundError says which file to put where.
    """
    path = folder / "annotations/instances_val2014.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: it is in cocodataset.org's 2014 Train/Val "
            "annotations, and says what the pictures show"
        )
    made = configs.read_json(path, "fetch it again")
    names = {kind["id"]: kind["name"] for kind in made["categories"]}
    found: dict[str, set[str]] = {}
    for thing in made["annotations"]:
        shown = found.setdefault(str(thing["image_id"]), set())
        shown.add(names[thing["category_id"]])
    return [found.get(key, set()) for key in ids]


def of_captions(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    things: Sequence[Set[str]],
    synonyms: Mapping[str, str],
) -> dict[str, Score]:
    """`scores` of captions of pictures that show `things`, and what people named."""
    shown = [
        {synonyms.get(name, name) for name in marked}.union(
            *(named(text, synonyms) for text in said)
        )
        for marked, said in zip(things, references, strict=True)
    ]
    return scores([named(text, synonyms) for text in texts], shown)
