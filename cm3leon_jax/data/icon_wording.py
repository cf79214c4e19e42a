"""What task examples of real artwork say, and what their builders hand over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cm3leon_jax.data.icon_scenes import CELLS, Rng, Scene
from cm3leon_jax.data.icons import Drawing


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Random numbers of an example: of what it shows and, apart, of its wording, so
    that wordings never trained are tried on the same pictures."""

    content: Rng
    words: Rng
    unseen: bool

    def phrase(self, forms: tuple[Sequence[str], Sequence[str]], **parts: str) -> str:
        """One of the seen or the unseen forms, filled in."""
        return str(self.words.choice(forms[self.unseen])).format(**parts)


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a builder makes: the fields of the task, the artwork in it, other facts."""

    fields: dict[str, Any]
    pieces: tuple[Drawing, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def having(self, **fields: Any) -> Example:
        """The same with some fields set."""
        return replace(self, fields={**self.fields, **fields})


def origin(pieces: Iterable[Drawing]) -> dict[str, Any]:
    """Licence and source of all artwork used: each piece's, and together."""
    artwork = {piece.id: {"id": piece.id, **piece.facts} for piece in pieces}
    facts = artwork.values()
    return {
        "licence": " AND ".join(sorted({fact["licence"] for fact in facts})),
        "source": "; ".join(sorted({fact["source"] for fact in facts})),
        "artwork": list(facts),
    }


def ground(background: str) -> str:
    """The end of a caption: as in pretraining, white goes without saying."""
    return "" if background == "white" else f", on a {background} background"


def a(name: str) -> str:
    """A name with its article, as far as its letters tell: "an apple", "grapes"."""
    plural = name.endswith("s") and not name.endswith(("ss", "us", "is"))
    if plural or name.startswith(("people ", "men ", "women ")):
        return name
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def style_of(scene: Scene) -> str | None:
    """The style of all items, None if they have several."""
    styles = {item.drawing.style for item in scene.items}
    return styles.pop() if len(styles) == 1 else None


def scene_caption(scene: Scene, *, places: bool) -> str:
    """Names, in the order of cells, with or without their places; style and ground."""
    words = [
        f"{item.name} at the {CELLS[item.cell]}" if places else item.name
        for item in scene.items
    ]
    style = style_of(scene)
    words += [style] if style else []
    return ", ".join(words) + ground(scene.background)


def scene_narration(scene: Scene) -> str:
    """Everything in the scene, a sentence each."""
    count = len(scene.items)
    many = ("no", "one", "two", "three", "four")[count]
    sentences = [
        f"On a {scene.background} background there "
        + ("is one drawing." if count == 1 else f"are {many} drawings.")
    ]
    for item in scene.items:
        sentence = f"At the {CELLS[item.cell]}, {item.size}, is {a(item.name)}"
        tags = item.drawing.emoji.tags[:2] if item.drawing.emoji else ()
        sentences.append(f"{sentence} ({', '.join(tags)})." if tags else f"{sentence}.")
    style = style_of(scene)
    if style:
        sentences.append(f"The style is that of a {style}.")
    return " ".join(sentences)
