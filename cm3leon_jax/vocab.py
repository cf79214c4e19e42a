"""The one id space shared by text pieces, image codes, classes and special tokens.

```
<pad> <eos> <break> <eoss> | sentinels | text pieces | image codes | classes, spare
  0     1      2      3      4 …
```

A `Layout` is a value read from the config, so a foreign vocabulary (image ids first,
`<break>` after them, …) is the same type with other numbers. The paper's `<mask>` and
`<infill>` are one id here: a sentinel marks the hole and is repeated before its filling
(paper section 1.4).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

SPECIAL, TEXT, IMAGE, CLASS = range(4)


@dataclass(frozen=True)
class Layout:
    """Where everything lives in one id space; immutable and hashable.

    `size` is the number of rows of the embedding table. `sentinels`, `text`, `image`
    and `classes` are ranges of ids. Raises ValueError where two of them overlap or
    reach outside `[0, size)`. Chameleon's vocabulary also has what its documents begin
    with (`bos`) and what ends a turn of a conversation (`turn`); ours has neither.
    """

    size: int
    pad: int
    eos: int
    brk: int
    eoss: int
    sentinels: range
    text: range
    image: range
    classes: range
    bos: int | None = None
    turn: int | None = None

    def __post_init__(self):
        parts = {
            name: range(getattr(self, name), getattr(self, name) + 1)
            for name in ("pad", "eos", "brk", "eoss", "bos", "turn")
            if getattr(self, name) is not None
        }
        for name in ("sentinels", "text", "image", "classes"):
            parts[name] = getattr(self, name)
        for name, part in parts.items():
            if part.step != 1 or (part and (part[0] < 0 or part[-1] >= self.size)):
                raise ValueError(f"layout.{name}={part} is not inside [0, {self.size})")
        for (one, a), (two, b) in itertools.combinations(parts.items(), 2):
            if a and b and a.start < b.stop and b.start < a.stop:
                raise ValueError(f"layout.{one}={a} and layout.{two}={b} overlap")

    def plain(self) -> dict[str, Any]:
        """The fields that are there, as JSON has them: a range is [start, stop]."""
        return {
            key: [value.start, value.stop] if isinstance(value, range) else value
            for key, value in vars(self).items()
            if value is not None
        }

    def text_ids(self, pieces: Any) -> np.ndarray:
        """Text pieces `[0, len(text))` -> ids, int32, same shape."""
        return _shift(pieces, range(len(self.text)), self.text.start, "text piece")

    def pieces(self, ids: Any) -> np.ndarray:
        """Ids -> text pieces, the inverse of `text_ids`."""
        return _shift(ids, self.text, -self.text.start, "text id")

    def image_ids(self, codes: Any) -> np.ndarray:
        """Image codes `[0, len(image))` -> ids, int32, same shape."""
        return _shift(codes, range(len(self.image)), self.image.start, "image code")

    def codes(self, ids: Any) -> np.ndarray:
        """Ids -> image codes, the inverse of `image_ids`."""
        return _shift(ids, self.image, -self.image.start, "image id")

    def class_ids(self, labels: Any) -> np.ndarray:
        """Class labels `[0, len(classes))` -> ids, int32, same shape."""
        return _shift(labels, range(len(self.classes)), self.classes.start, "class")

    def labels(self, ids: Any) -> np.ndarray:
        """Ids -> class labels, the inverse of `class_ids`."""
        return _shift(ids, self.classes, -self.classes.start, "class id")

    def modality(self, ids: Any) -> Any:
        """SPECIAL, TEXT, IMAGE or CLASS of every id, int8; numpy or jax arrays alike.

        Only comparisons and sums, so that it also works on traced arrays.
        """
        return (
            TEXT * _inside(ids, self.text)
            + IMAGE * _inside(ids, self.image)
            + CLASS * _inside(ids, self.classes)
        )


def _inside(ids: Any, part: range) -> Any:
    return ((ids >= part.start) & (ids < part.stop)).astype("int8")


def _shift(values: Any, allowed: range, by: int, what: str) -> np.ndarray:
    values = np.asarray(values)
    if values.size == 0:  # an empty list has dtype float64
        return values.astype(np.int32)
    if values.dtype.kind not in "iu":
        raise ValueError(f"{what}s must be integers, got dtype {values.dtype}")
    low, high = int(values.min()), int(values.max())
    if low < allowed.start or high >= allowed.stop:
        bad = low if low < allowed.start else high
        raise ValueError(
            f"{what} {bad} is outside [{allowed.start}, {allowed.stop}): it was made "
            "with another vocabulary than this layout's"
        )
    return (values.astype(np.int64) + by).astype(np.int32)


def build(
    *, text: int, image: int, classes: int, sentinels: int, total: int | None = None
) -> Layout:
    """Our own layout with that many text pieces, image codes, classes and sentinels.

    `total` is the size of the whole id space; None takes the next multiple of 128.
    Ids left over are reserved classes, so classes added later change no other id.
    Raises ValueError for a negative count, or a total that is too small or not a
    multiple of 128.
    """
    counts = {"text": text, "image": image, "classes": classes, "sentinels": sentinels}
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"vocab.{name}={count} must not be negative")
    needed = 4 + sum(counts.values())
    if total is None:
        total = -(-needed // 128) * 128
    if total < needed or total % 128:
        raise ValueError(
            f"vocab.total={total} must be a multiple of 128 and at least {needed} "
            f"(4 specials + {counts})"
        )
    edges = list(itertools.accumulate((4, sentinels, text, image)))
    return Layout(
        size=total,
        pad=0,
        eos=1,
        brk=2,
        eoss=3,
        sentinels=range(edges[0], edges[1]),
        text=range(edges[1], edges[2]),
        image=range(edges[2], edges[3]),
        classes=range(edges[3], total),
    )


def chameleon(
    *, text: int, image: int, sentinels: int, total: int, classes: int = 0
) -> Layout:
    """The layout of Chameleon and its descendants (paper section 1.4).

    ```
    <s> <pad> </s> <unk> | images   | <eoss> <racm3:break> | sentinels   <reserved08706>
     0    1     2    3     4 … 8195   8196      8197         8198 … 8709      8710
    ```

    Begin-image is the old `<break>`, end-image the old `<eoss>`. The 512 sentinels were
    renamed to reserved words after training: here they are sentinels again. The word
    after them ends a turn, the next one is a placeholder, the others up to the `text`
    pieces, which are the last ids, are reserved classes. Raises ValueError where
    `total` is too small.
    """
    eoss = 4 + image
    turn = eoss + 2 + sentinels
    first = total - text
    if min(text, image, sentinels, classes) < 0 or first - turn - 2 < classes:
        raise ValueError(
            f"vocabulary.total={total} does not hold text={text}, image={image}, "
            f"sentinels={sentinels}, classes={classes} and 8 special ids"
        )
    return Layout(
        size=total,
        pad=1,
        eos=2,
        brk=eoss + 1,
        eoss=eoss,
        sentinels=range(eoss + 2, turn),
        text=range(first, total),
        image=range(4, eoss),
        classes=range(turn + 2, first),
        bos=0,
        turn=turn,
    )
