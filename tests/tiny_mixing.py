"""Token caches with neighbours, shared by the tests of what is made of them."""

from pathlib import Path

import numpy as np
from tiny_data import GRID, LAYOUT, build_cache, make_documents

from cm3leon_jax.data import records
from cm3leon_jax.data.infill import InfillConfig
from cm3leon_jax.data.mixing import Neighbours
from cm3leon_jax.data.packing import PackingConfig
from cm3leon_jax.data.pipeline import Rows

INFILL = InfillConfig(spans=1, segment=0.2, region=0.3, region_without_text=0.5)
MODES = {
    "causal": InfillConfig(spans=0, segment=0, region=0, region_without_text=0),
    "spans": InfillConfig(spans=3, segment=0, region=0, region_without_text=0),
    "segment": InfillConfig(spans=0, segment=1, region=0, region_without_text=0),
    "region": InfillConfig(spans=0, segment=0, region=1, region_without_text=0.5),
    "mixed": INFILL,
}
LENGTHS = {"concatenate": 64, "first_fit": 150}
RECORDS, HELD_OUT = 60, 20


def _table(rng, rows, bank, own):
    """Four neighbours each, never itself, with holes, some records without any."""
    table = np.stack([rng.permutation(bank)[:5] for _ in range(rows)])
    if own:
        mine = table == np.arange(rows)[:, None]
        table = np.where(mine, table[:, 4:], table)
    table = table[:, :4].astype(np.int32)
    table[rng.random(table.shape) < 0.1] = -1
    table[::17] = -1
    return table


def write(path: Path) -> None:
    """The tokens of two splits, and the neighbours of their records."""
    build_cache(path, make_documents(RECORDS))
    held_out = make_documents(HELD_OUT, seed=1)
    build_cache(path, held_out, split="validation")
    rng = np.random.default_rng(0)
    for split, rows in (("train", RECORDS), ("validation", HELD_OUT)):
        table = _table(rng, rows, RECORDS, own=split == "train")
        np.save(path / f"neighbours-{split}.npy", table)


def cache(folder, split="train"):
    return records.TokenRecords(folder, split, layout=LAYOUT, grid=GRID)


def neighbours(folder, split="train", **changes):
    path = folder / f"neighbours-{split}.npy"
    return Neighbours(path, cache(folder), **({"documents": 3} | changes))


def rows_of(folder, kind, mode="mixed", split="train", row_length=None, **changes):
    length = row_length or LENGTHS[kind]
    packing = PackingConfig(kind=kind, row_length=length)
    return Rows(
        *(cache(folder, split), LAYOUT, MODES[mode], packing, 0),
        neighbours(folder, split, **changes),
    )
