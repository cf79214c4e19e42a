"""Some queries with all that was found for them, to be looked at.

`examples/index.jsonl` beside a bank, one query a line:
`{"query": {"text", "picture"}, "found": [{"by": "text" | "picture", "score", "reason",
"id", "text", "picture"}, …]}`, pictures as files of the folder. Scores are inner
products of the query's vector with the documents' vectors; `reason` is one of
`strategy.REASONS`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image as Pillow

from cm3leon_jax.config import write_whole
from cm3leon_jax.data.documents import Document
from cm3leon_jax.retrieval.bank import Bank
from cm3leon_jax.retrieval.embed import Embedder
from cm3leon_jax.retrieval.neighbours import asked
from cm3leon_jax.retrieval.strategy import NOT_NEEDED, NOTHING, REASONS, select

FOLDER = "examples"
QUERIES = 12
WAYS = ("text", "picture")
_FOUND = 8  # hits a neighbour that is wanted


def write(
    bank: Bank,
    embedder: Embedder,
    documents: Sequence[Document],
    *,
    per_query: Sequence[int],
    skip_above: float,
    query_dropout: float,
    seed: int,
    mesh: Mesh | None = None,
) -> Path:
    """Asks for some documents of the bank (document i being row i) as for training."""
    folder = bank.directory / FOLDER
    folder.mkdir(exist_ok=True)
    count = min(QUERIES, len(documents))
    numbers = np.unique(np.linspace(0, len(documents) - 1, count).astype(np.int64))
    chunk = [documents[i] for i in numbers.tolist()]
    questions = [
        asked(document, query_dropout, seed, number)
        for document, number in zip(chunk, numbers.tolist(), strict=True)
    ]
    wanted = min(_FOUND * max(per_query), bank.rows)
    hits = np.full((len(chunk), len(WAYS), wanted), -1, np.int64)
    scores = np.zeros(hits.shape, np.float32)
    for way, embed in enumerate((embedder.texts, embedder.images)):
        asking: dict[int, Any] = {  # a text, or pixels
            i: parts[way] for i, parts in enumerate(questions) if parts[way] is not None
        }
        if asking:
            mine, vectors = list(asking), embed(list(asking.values()))
            scores[mine, way], hits[mine, way] = bank.search(vectors, wanted, mesh)
    chosen = select(
        *(numbers, bank.signatures(numbers), hits, bank.signatures),
        per_query=per_query,
        skip_above=skip_above,
    )
    lines = []
    for i, document in enumerate(chunk):
        shown = _shown(document, f"{i}", folder)
        shown["text"] = questions[i][0] or shown["text"]
        found = []
        for way, reasons in enumerate(chosen.reasons[i]):
            looked = np.flatnonzero((reasons != NOT_NEEDED) & (reasons != NOTHING))
            for n in looked.tolist():
                (other,) = bank.documents([hits[i, way, n]])
                found.append(
                    {
                        "by": WAYS[way],
                        "score": round(float(scores[i, way, n]), 4),
                        "reason": REASONS[reasons[n]],
                        "id": other.id,
                        **_shown(other, f"{i}-{way}-{n}", folder),
                    }
                )
        lines.append({"query": shown, "found": found})
    path = folder / "index.jsonl"
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def _shown(document: Document, name: str, folder: Path) -> dict[str, Any]:
    """The text and the first picture of a document, which is written as a file."""
    made: dict[str, Any] = {"text": " ".join(document.texts), "picture": None}
    for array in document.pictures[:1]:
        Pillow.fromarray(array).save(folder / f"{name}.png")
        made["picture"] = f"{name}.png"
    return made
