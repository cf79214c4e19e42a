"""How surprised a model is, per token, by documents of a task, text and image apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document
from cm3leon_jax.evaluation.protocol import Score, interval
from cm3leon_jax.vocab import CLASS, IMAGE, SPECIAL, TEXT

MODALITIES = {"text": TEXT, "image": IMAGE, "class": CLASS, "special": SPECIAL}


def scores(model: CM3Leon, documents: Sequence[Document]) -> dict[str, Score]:
    """exp of the mean negative log-likelihood of the tokens of each modality, read as
    `<eos> document <eos>`; `n` tokens, intervals over documents.

    Modalities that no document has are left out. ValueError for a document that is
    longer than the context, or none at all.
    """
    if not documents:
        raise ValueError("no documents: nothing to read")
    eos = np.array([model.layout.eos], np.int32)
    rows = [np.concatenate([eos, x, eos]) for x in model.codec.ids(documents)]
    kinds = [np.asarray(model.layout.modality(row)) for row in rows]
    found = {}
    for name, modality in MODALITIES.items():
        counted = [kind == modality for kind in kinds]
        for one in counted:
            one[0] = False  # the first token is given
        tokens = np.array([one.sum() for one in counted])
        if not tokens.any():
            continue
        log_p = np.array(model.engine.score(rows, counted))
        shown = tokens > 0
        table = np.stack([-log_p, tokens], axis=1)[shown]
        found[name] = interval(
            table, lambda x: float(np.exp(x[:, 0].sum() / x[:, 1].sum())), tokens.sum()
        )
    return found
