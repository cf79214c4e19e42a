"""Control by a reference picture of real artwork: style, content, composition.

What a strength means. Style: strongly = drawings of one set and style, moderately = of
another set of the same maker, slightly = of another maker of the same kind (emoji,
flag, icon). Content: strongly = the same subject by another artist, moderately =
another subject of its subgroup (mammals, drinks), slightly = of its class only.
Composition: strongly = same cells, sizes and places within them, moderately = same
cells, slightly = the first drawing's cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cm3leon_jax.data import icon_scenes as scenes
from cm3leon_jax.data.icon_scenes import CELLS, Artwork, Scene, maker
from cm3leon_jax.data.icon_wording import Draws, Example, ground, scene_caption
from cm3leon_jax.data.icons import Drawing

_STRENGTHS = ("strongly", "strongly", "moderately", "slightly")  # one half, quarters


def style(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    """Another subject in the style of the reference; the caption tells no style."""
    strength = _strength(draws)
    if strength == "strongly":
        near = artwork.by_style[lead.style]
    elif strength == "moderately":
        near = [d for d in artwork.by_maker[maker(lead)] if d.style != lead.style]
    else:
        near = artwork.by_kind[scenes.kind(lead)]
        near = [d for d in near if maker(d) != maker(lead)]
    near = [d for d in near if d.subject != lead.subject]
    return _referring(artwork, draws, lead, near, strength, lead.names[0])


def content(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    """What the reference shows, in the style that the caption tells."""
    strength = _strength(draws)
    if strength == "strongly":
        near = artwork.others(lead)
    else:
        label, subgroup = scenes.label_of(lead), scenes.subgroup(lead)
        moderately = strength == "moderately"
        near = artwork.by_subgroup[subgroup] if moderately else artwork.by_class[label]
        if not moderately:
            near = [d for d in near if scenes.subgroup(d) != subgroup]
        near = [d for d in near if label and d.subject != lead.subject]
    return _referring(artwork, draws, lead, near, strength, lead.style)


def variation(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    """The same subject by another artist; nothing is said about either."""
    example = _referring(artwork, draws, lead, artwork.others(lead), "strongly", "-")
    if example is None:
        return None
    source, image = example.fields["reference"], example.fields["image"]
    facts = {key: value for key, value in example.facts.items() if key != "strength"}
    return replace(example, fields={"source": source, "image": image}, facts=facts)


def composition(artwork: Artwork, draws: Draws, lead: Drawing) -> Example | None:
    """Other drawings where the reference has its own. The caption names them in the
    order of the reference's cells, without places."""
    rng, strength = draws.content, _strength(draws)
    count = int(rng.integers(1, len(CELLS) + 1))
    scene = scenes.draw(artwork, rng, lead, count=count)
    if scene is None:
        return None
    first = int(rng.integers(count))
    cells = [item.cell for item in scene.items]
    if strength == "slightly":
        kept = cells[first]
        free = rng.permutation([cell for cell in range(len(CELLS)) if cell != kept])
        cells = [kept, *(int(cell) for cell in free)]
    other = artwork.items[int(rng.integers(len(artwork.items)))]
    reference = scenes.draw(artwork, rng, other, count=count, cells=cells)
    if reference is None or _shared(scene, reference):
        return None
    if strength == "strongly":
        layout = {item.cell: (item.size, item.at) for item in scene.items}
        items = []
        for item in reference.items:
            size, at = layout[item.cell]
            items.append(replace(item, size=size, at=at))
        if not all(artwork.shows(item, reference.background) for item in items):
            return None
        reference = replace(reference, items=tuple(items))
    target, source = artwork.compose(scene), artwork.compose(reference)
    items = (*scene.items, *reference.items)
    return Example(
        fields={
            "strength": strength,
            "reference": source.picture,
            "caption": scene_caption(scene, places=False),
            "image": target.picture,
        },
        pieces=tuple(item.drawing for item in items),
        facts={
            "strength": strength,
            "scene": scenes.to_json(reference, source),
            "target_scene": scenes.to_json(scene, target),
        },
    )


def _strength(draws: Draws) -> str:
    return _STRENGTHS[int(draws.content.integers(len(_STRENGTHS)))]


def _shared(one: Scene, other: Scene) -> bool:
    subjects = {item.drawing.subject for item in one.items}
    return any(item.drawing.subject in subjects for item in other.items)


def _referring(
    artwork: Artwork,
    draws: Draws,
    lead: Drawing,
    near: Sequence[Drawing],
    strength: str,
    words: str,
) -> Example | None:
    """`lead` as the picture to be made, one of `near` as the reference."""
    if not near:
        return None
    reference = near[int(draws.content.integers(len(near)))]
    made = artwork.single(lead, draws.content)
    shown = artwork.single(reference, draws.content)
    if made is None or shown is None:
        return None
    picture, background = made
    return Example(
        fields={
            "strength": strength,
            "reference": shown[0],
            "caption": words + ground(background),
            "image": picture,
        },
        pieces=(lead, reference),
        facts={
            "strength": strength,
            "name": lead.names[0],
            "style": lead.style,
            "background": background,
            "reference": reference.id,
        },
    )
