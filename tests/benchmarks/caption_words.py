r"""Is a look found by its place, and a place by its look? What words of captions cost.

    python tests/benchmarks/caption_words.py --workdir runs/full [--checkpoint pretrain]

Held-out scenes of shapes are read picture first, their caption after it, as CM3 moves a
whole text. Of the objects of a caption but the last, which is found by elimination,
it gives the mean nats of

    place   where the caption names the look first ("a small red star at the top left")
    look    colour and shape where it names the place first ("top left: small red star")

and `guess`, those of a draw among the objects not named before: ln of their number. A
size has two words and tells as much about the wording, so it is left out. Takes a
minute on 2 cores. The last line is one JSON object.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cm3leon_jax import CM3Leon
from cm3leon_jax.data import shapes
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.infill import infill
from cm3leon_jax.data.sources import read_documents
from cm3leon_jax.evaluation import scenes
from cm3leon_jax.evaluation.protocol import hardware, interval


def pattern(layout: int) -> str:
    """Of an object in a caption; its group is what is named second."""
    colours, kinds = "|".join(shapes.COLOURS), "|".join(shapes.SHAPES)
    look = rf"(?:{colours}) (?:{kinds})"
    place = "|".join(sorted(shapes.CELL_NAMES[layout], key=len, reverse=True))
    return rf"(?:{place}): \w+ (?P<look>{look})|{look} at the (?P<place>{place})"


def asked(model: CM3Leon, document: Document, pattern: str):
    """What is named second of each object but the last: which of both it is, a row of
    ids, which of them say it, and how many objects are left.

    The row is `<eos> <s0> <break> picture <s0> caption <eoss> <eos>`.
    """
    layout, text = model.layout, model.codec.text
    (ids,) = model.codec.ids([document])
    count = int(np.flatnonzero(ids == layout.brk)[0])
    pieces = layout.pieces(ids[:count]).tolist()
    ends = np.array([len(text.decode(pieces[: n + 1])) for n in range(count)])
    row = infill(np.r_[layout.eos, ids, layout.eos], [(1, 1 + count)], layout)
    objects = list(re.finditer(pattern, text.decode(pieces)))
    for number, found in enumerate(objects[:-1]):
        kind = str(found.lastgroup)
        start, stop = found.span(kind)
        said = np.zeros(len(row), bool)
        said[-2 - count : -2] = (start < ends) & (ends <= stop)
        yield kind, row, said, len(objects) - number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--checkpoint", default="pretrain")
    parser.add_argument("--documents", type=int, default=1000)
    given = parser.parse_args()
    model = CM3Leon.load(given.workdir, checkpoint=given.checkpoint)
    objects = pattern(scenes.world_of(model).layout)
    documents = read_documents(given.workdir / "documents", "test")[: given.documents]
    found = [(d.id, *one) for d in documents for one in asked(model, d, objects)]
    ids, kinds, rows, said, left = zip(*found, strict=True)
    nats, guess = -np.array(model.engine.score(rows, said)), np.log(left)
    result: dict = {"documents": len(documents), "hardware": hardware()}
    for kind in ("place", "look"):
        mine = np.flatnonzero(np.array(kinds) == kind)
        result[kind] = {
            name: interval(values[mine], np.mean, len(mine), [ids[i] for i in mine])
            for name, values in (("nats", nats), ("guess", guess))
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
