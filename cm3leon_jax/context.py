"""Retrieved documents before prompts: what is found, what fits, what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from cm3leon_jax.codec import HOLE, Codec
from cm3leon_jax.data.documents import Document
from cm3leon_jax.inputs import listed
from cm3leon_jax.retrieval.embed import Embedder
from cm3leon_jax.retrieval.recall import Memory
from cm3leon_jax.sampling import prompts as forms
from cm3leon_jax.sampling.prompts import Prompt

# How many documents to retrieve for each prompt (0: none), or lists of documents to be
# used, one list for each.
Retrieve = int | Sequence[Sequence[Document]]


class Query(NamedTuple):
    """What documents are retrieved by: a text, a square picture uint8 [Y, X, 3], or
    both."""

    text: str | None
    image: np.ndarray | None


class Context:
    """A memory (or None) and a decoder's context of `limit` tokens.

    `fallbacks` counts the documents that could not be had: "alike", in whose place the
    memory had only near-duplicates of those found, "missing", of which it has no more,
    and "dropped", which the context does not hold.
    """

    def __init__(self, codec: Codec, limit: int, memory: Memory | None):
        self.codec, self.limit, self.memory = codec, limit, memory
        self.fallbacks: Counter[str] = Counter()
        self.encoder: Embedder | None = None

    @property
    def embedder(self) -> Embedder | None:
        """Of texts and pictures: the `encoder` that was given, or the memory's."""
        return self.encoder or (None if self.memory is None else self.memory.embedder)

    def documents(
        self,
        retrieve: Retrieve,
        texts: Sequence[str | None],
        images: Sequence[np.ndarray | None],
    ) -> list[list[Document]]:
        """The documents for each query (a text, a picture, or both): those given, or
        those retrieved. ValueError where there is no memory, or no list for each."""
        if not isinstance(retrieve, int | np.integer):
            given = [list(row) for row in retrieve]
            if len(given) != len(texts):
                raise ValueError(
                    f"retrieve has {len(given)} lists of documents for {len(texts)} "
                    "prompts: give one list each, which may be empty"
                )
            return [
                listed(row, Document, f"retrieve[{i}]") if row else []
                for i, row in enumerate(given)
            ]
        if retrieve < 0:
            raise ValueError(f"retrieve={retrieve} must not be negative")
        if retrieve == 0:
            return [[] for _ in texts]
        if self.memory is None:
            raise ValueError(
                f"retrieve={retrieve}: this system has no memory to retrieve from; "
                "give documents, or use a system with a section `retrieval`"
            )
        found = self.memory.look(texts, images, retrieve)
        short = [retrieve - len(row.documents) for row in found]
        alike = [min(n, row.alike) for n, row in zip(short, found, strict=True)]
        self._count("alike", alike)
        self._count("missing", [n - a for n, a in zip(short, alike, strict=True)])
        return [row.documents for row in found]

    def rows(
        self,
        retrieve: Retrieve,
        texts: Sequence[str | None],
        images: Sequence[np.ndarray | None],
    ) -> list[list[np.ndarray]]:
        """The ids of the documents for each query, all their pictures encoded
        together."""
        found = self.documents(retrieve, texts, images)
        flat = [document for row in found for document in row]
        ids = iter(self.codec.ids(flat) if flat else ())
        return [[next(ids) for _ in row] for row in found]

    def rows_like(
        self, retrieve: Retrieve, documents: Sequence[Document]
    ) -> list[list[np.ndarray]]:
        """As `rows`, for documents as queries."""
        queries = self.queries(retrieve, documents)
        return self.rows(
            retrieve, [q.text for q in queries], [q.image for q in queries]
        )

    def queries(self, retrieve: Retrieve, documents: Sequence[Document]) -> list[Query]:
        """What documents ask by: all their texts, without holes, and their first
        picture. Nothing where nothing is to be retrieved."""
        if not isinstance(retrieve, int | np.integer) or retrieve <= 0:
            return [Query(None, None) for _ in documents]
        return [
            Query(" ".join(d.texts).replace(HOLE, " "), self.codec.first_picture(d))
            for d in documents
        ]

    def before(
        self, wanted: Sequence[Prompt], rows: Sequence[Sequence[np.ndarray]]
    ) -> list[Prompt]:
        """Prompts with the documents (ids) of each before them, as many as fit."""
        made, lost = [], []
        for prompt, row in zip(wanted, rows, strict=True):
            whole, count = forms.after(prompt, row, self.codec.layout, self.limit)
            made.append(whole)
            lost.append(len(row) - count)
        self._count("dropped", lost)
        return made

    def _count(self, what: str, numbers: Sequence[int]) -> None:
        """Counts, and says, that prompts have fewer documents than they should."""
        if any(numbers):
            self.fallbacks[what] += sum(numbers)
            short = sum(number > 0 for number in numbers)
            logging.warning(
                "%d of %d prompts go on with fewer documents (%s: %d)",
                *(short, len(numbers), what, sum(numbers)),
            )
