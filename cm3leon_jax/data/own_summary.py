"""What one's own data is like: counts, sizes, captions, languages, licences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from cm3leon_jax.data.part_files import Rejected

_NAMED = 20  # values of a column that are named, the rest are counted together
_QUANTILES = {"least": 0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1}
COLUMNS = ("width", "height", "characters", "licence", "source", "language")


class Summary:
    """Counts over the documents that were chosen for one split."""

    def __init__(self):
        self._numbers = {name: [np.zeros(0, np.int64)] for name in COLUMNS[:3]}
        self._words = {name: Counter() for name in COLUMNS[3:]}

    def add(self, facts: dict[str, np.ndarray]) -> None:
        """The `COLUMNS` of some documents."""
        for name, kept in self._numbers.items():
            kept.append(facts[name])
        for name, counts in self._words.items():
            counts.update(facts[name].tolist())

    def result(self, rejected: Iterable[Rejected]) -> dict[str, Any]:
        """JSON-able; `rejected` are the records that were left out of the split."""
        made: dict[str, Any] = {}
        for name, kept in self._numbers.items():
            values = np.concatenate(kept)
            made[name] = {
                key: int(np.quantile(values, at, method="nearest"))
                for key, at in _QUANTILES.items()
                if len(values)
            }
        for name, counts in self._words.items():
            known = {key or "unknown": n for key, n in counts.most_common(_NAMED)}
            others = counts.total() - sum(known.values())
            made[name] = known | ({"others": others} if others else {})
        if set(made["language"]) <= {"unknown"}:
            made["language"] = "not guessed: bash launch/setup.sh languages"
        made["rejected"] = reasons(rejected)
        return made


def reasons(rejected: Iterable[Rejected]) -> dict[str, dict[str, int]]:
    """{"fault": {reason: how many}, …}, numbers and names in the reasons left out."""
    found: dict[str, Counter] = {}
    for item in rejected:
        words = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", item.reason)
        words = re.sub(r"\d+", "N", words)[:120]
        found.setdefault(item.kind, Counter())[words] += 1
    return {kind: dict(counts.most_common(_NAMED)) for kind, counts in found.items()}
