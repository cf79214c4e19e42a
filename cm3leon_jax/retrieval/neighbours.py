"""Which documents of a bank stand before each document of a split in training.

neighbours-train.npy        int32 [documents, sum(per_query)]: rows of the bank, first
neighbours-validation.npy   by the document's text, then by its picture; -1 for none
skipped.json                what became of everything that was found, by reason
calibration.json            the threshold of near-duplicates, where it is not given
"""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image as Pillow

from cm3leon_jax.config import read_json, write_whole
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.data.hashing import uniform
from cm3leon_jax.parallel.distributed import together
from cm3leon_jax.parallel.mesh import MeshConfig, make_mesh
from cm3leon_jax.retrieval.bank import Bank
from cm3leon_jax.retrieval.bank_files import MEND, save
from cm3leon_jax.retrieval.embed import Embedder
from cm3leon_jax.retrieval.strategy import (
    REASONS,
    Calibration,
    calibrate,
    dropout,
    select,
    tally,
)

PART_ROWS = 8192
_AT_ONCE = 512  # documents of one round of search
_STREAMED = 4096  # where each round reads the whole bank from disk
_FIRST = 8  # times as many are found as are needed, then _MORE times as many again
_MORE, _MOST = 4, 1024
_NUMBERS = 1 << 25  # of the candidates' vectors that are held at once
_PAIRS = 2000  # of each kind, to calibrate with
_SAME = ("entity", "subject")  # metadata that say of what thing a document is
_QUALITY = 75  # of the JPEG that makes a near-duplicate
_OTHER = 501  # purpose of the random numbers of `thresholds`


def build(
    bank: Bank,
    embedder: Embedder,
    documents: Sequence[Document],
    split: str,
    *,
    in_bank: bool,
    per_query: Sequence[int],
    skip_above: float,
    query_dropout: float,
    seed: int,
    part_rows: int = PART_ROWS,
) -> dict[str, int]:
    """Writes the neighbour file of a split beside the bank; counts of what was found.

    `in_bank`: document i is row i of the bank. A share `query_dropout` of the words of
    every text query is left out. A query whose best hits are all near-duplicates is
    searched further, as far as 1,024 documents. The counts say what became of the hits
    of the last look (`strategy.REASONS`), and how many places stayed empty.

    Every process of a job searches the whole bank for its own share of the documents,
    on its own devices; parts that an earlier run has finished are kept.
    """
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    work = bank.directory / "parts"
    starts = range(0, len(documents), part_rows)
    for part in range(jax.process_index(), len(starts), jax.process_count()):
        counted = work / f"{split}-{part:05d}.json"
        if counted.is_file():
            continue
        rows = range(starts[part], min(starts[part] + part_rows, len(documents)))
        found, counts = _find(
            bank, embedder, documents, rows,
            in_bank=in_bank, per_query=per_query, skip_above=skip_above,
            query_dropout=query_dropout, seed=seed, mesh=mesh,
        )  # fmt: skip
        save(counted.with_suffix(".npy"), found)
        write_whole(counted, json.dumps(counts))
        _say(f"{split}: neighbours of {rows.stop:,} of {len(documents):,} documents")
    together(f"neighbours of {split} found")
    parts = [work / f"{split}-{part:05d}.npy" for part in range(len(starts))]
    total: dict[str, int] = {}
    for path in parts:
        counts = read_json(path.with_suffix(".json"), MEND)
        total = {key: total.get(key, 0) + count for key, count in counts.items()}
    if jax.process_index() == 0:
        table = np.concatenate([np.load(path) for path in parts])
        save(file_of(bank.directory, split), table)
    together(f"neighbours of {split} written")
    return total


def file_of(directory: Path, split: str) -> Path:
    """Where the neighbour file of a split is."""
    return directory / f"neighbours-{split}.npy"


def _find(
    bank: Bank,
    embedder: Embedder,
    documents: Sequence[Document],
    rows: range,
    *,
    in_bank: bool,
    per_query: Sequence[int],
    query_dropout: float,
    seed: int,
    **choice: Any,
) -> tuple[np.ndarray, dict[str, int]]:
    parts = []
    counts: dict[str, int] = {reason: 0 for reason in REASONS}
    size = _AT_ONCE if bank.fits(choice["mesh"]) else _STREAMED
    for start in range(rows.start, rows.stop, size):
        numbers = range(start, min(start + size, rows.stop))
        chunk = [documents[i] for i in numbers]
        own_B = np.array(numbers) if in_bank else np.full(len(chunk), -1)
        own_BE = bank.signatures(own_B) if in_bank else embedder.documents(chunk)[1]
        queries = _queries(chunk, embedder, per_query, query_dropout, seed, start)
        chosen, reasons = _chosen(
            bank, own_B, own_BE, queries, per_query=per_query, **choice
        )
        parts.append(chosen)
        for of_one in reasons:
            for key, count in tally(of_one).items():
                counts[key] += count
    found = np.concatenate(parts)
    empty = int((found < 0).sum())
    return found, counts | {"places": found.size, "empty": empty}


def _queries(
    documents: Sequence[Document],
    embedder: Embedder,
    per_query: Sequence[int],
    share: float,
    seed: int,
    first: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For texts and for pictures: (numbers of the documents that have one, vectors).
    Nobody asks in a way that is to find nothing."""
    texts, images = [], []
    for i, document in enumerate(documents):
        text, picture = asked(document, share, seed, first + i)
        if text is not None and per_query[0]:
            texts.append((i, text))
        if picture is not None and per_query[1]:
            images.append((i, picture))
    return [
        (np.array([i for i, _ in found], np.int64), embed([x for _, x in found]))
        for found, embed in ((texts, embedder.texts), (images, embedder.images))
    ]


def asked(
    document: Document, share: float, seed: int, number: int
) -> tuple[str | None, np.ndarray | None]:
    """What document `number` of a split asks the bank with: its text without a `share`
    of the words, and its first picture; None for what it has not."""
    words = " ".join(document.texts).split()
    text = " ".join(dropout(words, share, seed, number))
    return text or None, next(iter(document.pictures), None)


def _chosen(
    bank: Bank,
    own_B: np.ndarray,
    own_BE: np.ndarray,
    queries: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    per_query: Sequence[int],
    skip_above: float,
    mesh: Mesh,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows for every document, and the reasons of its last look."""
    rows = np.full((len(own_B), sum(per_query)), -1, np.int32)
    all_reasons: list[np.ndarray] = [np.zeros(0)] * len(own_B)
    way_R = np.repeat(np.arange(len(queries)), per_query)
    left, wanted = np.arange(len(own_B)), _FIRST * max(per_query)
    while len(left):
        wanted = min(wanted, bank.rows)
        hits = np.full((len(left), len(queries), wanted), -1, np.int64)
        for way, (numbers, vectors) in enumerate(queries):
            mine = np.isin(numbers, left)
            if mine.any():
                _, found = bank.search(vectors[mine], wanted, mesh)
                hits[np.searchsorted(left, numbers[mine]), way] = found
        at_once = max(1, _NUMBERS // (len(queries) * wanted * bank.size))
        asked = np.stack([np.isin(left, numbers) for numbers, _ in queries], axis=1)
        short = []
        for start in range(0, len(left), at_once):
            some = left[start : start + at_once]
            chosen = select(
                *(own_B[some], own_BE[some], hits[start : start + at_once]),
                bank.signatures,
                per_query=per_query,
                skip_above=skip_above,
            )
            rows[some] = chosen.rows
            asks = asked[start : start + at_once]
            for number, reasons, mine in zip(some, chosen.reasons, asks, strict=True):
                all_reasons[number] = reasons[mine]
            short.append(((chosen.rows < 0) & asks[:, way_R]).any(axis=1))
        if wanted >= min(bank.rows, _MOST):
            break
        left, wanted = left[np.concatenate(short)], wanted * _MORE
    return rows, all_reasons


def thresholds(
    embedder: Embedder,
    validation: Sequence[Document],
    train: Sequence[Document],
    seed: int,
) -> Calibration:
    """The score above which two documents are near-duplicates, by this encoder.

    Duplicates are validation documents with copies of themselves (the picture
    compressed, the text without capitals and punctuation) and documents of one thing
    whose pictures are the same; other documents of one thing are none. Raises
    ValueError where documents do not say of what thing they are.
    """
    things: dict[Any, list[Document]] = {}
    for documents in (validation, train):
        for i in _some(len(documents), seed):
            document = documents[i]
            thing = next(
                (document.metadata[k] for k in _SAME if k in document.metadata), None
            )
            if thing is not None:
                things.setdefault(thing, []).append(document)
    pairs = [
        (one, other)
        for found in things.values()
        for one, other in itertools.pairwise(found)
    ]
    same = [_same_picture(one, other) for one, other in pairs]
    apart = [pair for pair, s in zip(pairs, same, strict=True) if not s][:_PAIRS]
    copies = [pair for pair, s in zip(pairs, same, strict=True) if s][:_PAIRS]
    if not apart:
        raise ValueError(
            "retrieval.skip_above=None is calibrated on documents of the same thing, "
            f"but none say what they are of (metadata {' or '.join(_SAME)}): give it a "
            "number (the paper's for CLIP is 0.9)"
        )
    held_out = [validation[i] for i in _some(len(validation), seed)[:_PAIRS]]
    copies += [(document, _compressed(document)) for document in held_out]
    return calibrate(_scores(embedder, copies), _scores(embedder, apart))


def _some(count: int, seed: int) -> list[int]:
    """Up to so many documents as calibration looks at, in a random order."""
    most = 10 * _PAIRS
    return np.argsort(uniform(seed, _OTHER, np.arange(count)))[:most].tolist()


def _same_picture(one: Document, other: Document) -> bool:
    a, b = one.pictures, other.pictures
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def _compressed(document: Document) -> Document:
    segments = []
    for segment in document.segments:
        if isinstance(segment, Text):
            plain = re.sub(r"[^\w\s]", "", segment.text.lower())
            segment = Text(plain if plain.strip() else segment.text)
        elif isinstance(segment, Image) and segment.array is not None:
            file = io.BytesIO()
            Pillow.fromarray(segment.array).save(file, "JPEG", quality=_QUALITY)
            segment = Image(np.asarray(Pillow.open(file)))
        segments.append(segment)
    return Document(tuple(segments), id=document.id)


def _scores(
    embedder: Embedder, pairs: Sequence[tuple[Document, Document]]
) -> np.ndarray:
    ones, others = (embedder.documents([pair[i] for pair in pairs])[1] for i in (0, 1))
    return np.einsum("be,be->b", ones, others)


def _say(line: str) -> None:
    print(f"bank {line}", file=sys.stderr, flush=True)
