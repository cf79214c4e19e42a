"""Edits of composited scenes: recolour, add, remove, replace (paper 1.12, edit tasks).

The picture before and the one after differ within one cell of the layout only.
"""

from __future__ import annotations

from typing import Any

from cm3leon_jax.data import icon_scenes as scenes
from cm3leon_jax.data.icon_scenes import CELLS, Artwork, Scene
from cm3leon_jax.data.icon_wording import Draws, Example, a
from cm3leon_jax.data.icons import Drawing

HIDDEN = 128  # the grey of what a region hides (design section 2.13)

# Kind -> wordings of training, and wordings that it never uses. `{it}` is the name,
# the place, or "it" where a region is given.
EDITS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "recolour": (
        ("make {it} {colour}", "change the colour of {it} to {colour}"),
        ("paint {it} {colour}", "{it} should be {colour}"),
    ),
    "add": (
        ("add {new} {where}", "put {new} {where}"),
        ("there should be {new} {where} too", "draw {new} {where}"),
    ),
    "remove": (("remove {it}", "delete {it}"), ("erase {it}", "get rid of {it}")),
    "replace": (
        ("replace {it} with {new}", "turn {it} into {new}"),
        ("swap {it} for {new}", "show {new} instead of {it}"),
    ),
}
_BY_PLACE = 0.4  # of the things meant are meant by where they are
_COUNTS = {"recolour": (1, 4), "add": (1, 3), "remove": (2, 4), "replace": (1, 4)}


def edit(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    """Source, instruction and result. What is to change is told by its name or by its
    place ("the one at the top left")."""
    made = _changed(artwork, draws, lead)
    if made is None:
        return None
    before, after, facts = made
    by_place = draws.words.random() < _BY_PLACE
    facts["spatial"] = bool(by_place or facts["kind"] == "add")
    where = f"at the {CELLS[facts['cells'][0]]}"
    it = f"the one {where}" if by_place else f"the {facts['target']}"
    return _example(artwork, draws, (before, after), facts, it, where)


def edit_region(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    """The same with the region given as a picture: the source, its cell hidden. The
    instruction does not tell the place."""
    made = _changed(artwork, draws, lead)
    if made is None:
        return None
    before, after, facts = made
    facts["spatial"] = False
    example = _example(artwork, draws, (before, after), facts, "it", "here")
    x0, y0, x1, y1 = example.facts["region"]
    region = example.fields["source"].copy()
    region[y0:y1, x0:x1] = HIDDEN
    return example.having(region=region)


def _changed(
    artwork: Artwork, draws: Draws, lead: Drawing
) -> tuple[Scene, Scene, dict[str, Any]] | None:
    """A scene before and after, and the edit's facts."""
    rng = draws.content
    kind = str(rng.choice(list(EDITS)))
    fewest, most = _COUNTS[kind]
    count = int(rng.integers(fewest, most + 1))
    before = scenes.draw(artwork, rng, lead, count=count)
    if before is None:
        return None
    target = before.items[int(rng.integers(count))]
    after = None
    if kind == "recolour":
        coloured = artwork.recoloured(target, rng, before.background)
        after = coloured and before.with_item(coloured)
    elif kind == "remove":
        after = before.without(target.cell)
    else:
        cell = target.cell
        if kind == "add":
            taken = {item.cell for item in before.items}
            cell = int(rng.choice([c for c in range(len(CELLS)) if c not in taken]))
        new = scenes.fresh(artwork, rng, before, artwork.mates(lead), cell)
        after = new and before.with_item(new)
        target = new if new and kind == "add" else target
    if after is None:
        return None
    changed = [item for item in after.items if item.cell == target.cell]
    kept = [cell for cell in range(len(CELLS)) if cell != target.cell]
    facts = {
        "kind": kind,
        "cells": [target.cell],
        "kept": kept,
        "target": target.name,
        "new": changed[0].name if changed and kind in ("add", "replace") else None,
        "colour": changed[0].colour if changed else None,
    }
    return before, after, facts


def _example(
    artwork: Artwork,
    draws: Draws,
    pair: tuple[Scene, Scene],
    facts: dict[str, Any],
    it: str,
    where: str,
) -> Example:
    before, after = pair
    instruction = draws.phrase(
        EDITS[facts["kind"]],
        it=it,
        where=where,
        new=a(facts["new"]) if facts["new"] else "",
        colour=facts["colour"] or "",
    )
    source, result = artwork.compose(before), artwork.compose(after)
    items = (*before.items, *after.items)
    return Example(
        fields={
            "source": source.picture,
            "instruction": instruction,
            "image": result.picture,
        },
        pieces=tuple(item.drawing for item in items),
        facts={
            "edit": facts,
            "region": list(artwork.cell_box(facts["cells"][0])),
            "scene": scenes.to_json(before, source),
            "target_scene": scenes.to_json(after, result),
        },
    )
